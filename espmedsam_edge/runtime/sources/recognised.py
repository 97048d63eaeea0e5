"""What pictures look like, told as they are read: each its own modality, and how much it is of each one's kind."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace

from espmedsam_edge.errors import UserError
from espmedsam_edge.imaging.recognition import (
    DOUBTFUL,
    Look,
    confidences,
    fitted,
    likeliest,
    look,
    looks_otherwise,
    recognise,
)
from espmedsam_edge.runtime.sources.passed_on import PassedOn
from espmedsam_edge.runtime.sources.source import Failure, Source, SourceFrame

log = logging.getLogger(__name__)

LOOK_SECONDS = 1.0
"""How often a video or a live source is looked at: what it shows changes with the scene, not from frame to frame."""

_LOOK_FRAMES = 25  # where there are no times


class Eye:
    """Looks at a source's frames: at pictures each, at what moves once a second."""

    def __init__(self, *, each: bool) -> None:
        self._each = each
        self._last: SourceFrame | None = None
        self._likeness: dict[str, float] = {}

    def look_at(self, frame: SourceFrame) -> tuple[SourceFrame, Look | None]:
        """The frame with its likeness; and what was seen, where it was looked at."""
        if not self._due(frame):
            return replace(frame, likeness=self._likeness), None
        seen = look(frame.segmented)
        self._last, self._likeness = replace(frame, image=frame.image[:1, :1]), confidences(seen)
        return replace(frame, likeness=self._likeness), seen

    def _due(self, frame: SourceFrame) -> bool:
        last = self._last
        if self._each or last is None:
            return True
        now, then = (one.time if one.captured is None else one.captured for one in (frame, last))
        if now is None or then is None:
            return frame.index - last.index >= _LOOK_FRAMES
        return not 0 <= now - then < LOOK_SECONDS


class Recogniser:
    """Chooses among some modalities for each picture; says at the first picture of each what it looks like."""

    def __init__(self, among: Sequence[str]) -> None:
        self.among = tuple(among)
        self._told: set[str] = set()

    def modality_of(self, frame: SourceFrame, seen: Look | None = None) -> str:
        """What a picture is surely of; ``seen``: what was seen of it already.

        Raises:
            UserError: it looks like none of them with certainty; the message names the likeliest.
        """
        seen = seen or look(frame.segmented)
        guess = recognise(seen, self.among)
        if guess is None or not guess.sure:
            else_likely = likeliest(seen, self.among)
            raise UserError(
                f"{frame.source} looks like none of the modalities with certainty{else_likely}.",
                f"Name it: --modality {'|'.join(self.among)}",
                exit_code=1,
            )
        if guess.modality not in self._told:
            more = "" if self._told else " Another: --modality NAME"
            self._told.add(guess.modality)
            log.info("%s looks like %s (%s).%s", frame.source, guess.modality, guess.per_cent, more)
        return guess.modality


class RecognisedSource(PassedOn):
    """A source whose frames say what modality they are of, videos by their first; what is not clear is a failure.

    Args:
        source: of files, not yet entered.
        recogniser: shared by the sources of a run.
    """

    def __init__(self, source: Source, recogniser: Recogniser) -> None:
        super().__init__(source)
        self._recogniser = recogniser

    def __iter__(self) -> Iterator[SourceFrame]:
        modality: str | None = None
        eye = Eye(each=self.kind == "images")
        for one in self._source:
            frame, seen = eye.look_at(one)
            if self.kind == "images" or modality is None:
                try:
                    modality = self._recogniser.modality_of(frame, seen)
                except UserError as error:
                    self.failures.append(Failure(frame.source, str(error)))
                    if self.kind == "video":
                        return
                    continue
            yield replace(frame, modality=modality)


def first_modality(sources: Sequence[RecognisedSource]) -> tuple[str | None, list[Failure]]:
    """What the first picture that is clear is of, or None with a failure for each picture there is.

    Args:
        sources: not yet entered; they are done with afterwards.
    """
    failures: list[Failure] = []
    for source in sources:
        try:
            with source:
                for frame in source:
                    return frame.modality, []
        except UserError as error:
            failures.append(Failure(source.name, str(error)))
        failures += source.failures
    return None, failures


class Doubts:
    """Warns once when a picture is plainly of another modality than it is segmented as, and once when of none."""

    def __init__(self, modality: str) -> None:
        self._modality = modality
        self._told: set[bool] = set()

    def hear(self, frame: SourceFrame, seen: Look) -> None:
        """Warn, if it is the first such picture."""
        confidence = (frame.likeness or {}).get(self._modality, 1.0)
        found = looks_otherwise(seen, self._modality)
        if (found is not None) in self._told or (found is None and confidence >= DOUBTFUL):
            return
        self._told.add(found is not None)
        what = f"looks like {found}" if found else f"looks unlike {self._modality} (confidence {confidence:.2f})"
        log.warning(
            "%s %s and is segmented as %s. Is it the right network? Further ones are not told.",
            frame.source,
            what,
            self._modality,
        )


class DoubtedSource(PassedOn):
    """A source whose frames say how much they are of each modality's kind.

    Args:
        source: not yet entered.
        doubts: shared by the sources of a run; None: nothing is said.
    """

    def __init__(self, source: Source, doubts: Doubts | None) -> None:
        super().__init__(source)
        self._doubts = doubts
        self._eye = Eye(each=source.kind == "images")

    def __iter__(self) -> Iterator[SourceFrame]:
        for frame in self._source:
            yield self._judged(frame)

    def poll(self) -> SourceFrame | None:
        frame = super().poll()
        return None if frame is None else self._judged(frame)

    def _judged(self, frame: SourceFrame) -> SourceFrame:
        judged, seen = self._eye.look_at(frame)
        if self._doubts is not None and seen is not None:
            self._doubts.hear(judged, seen)
        return judged


def unjudged(modalities: Sequence[str]) -> list[str]:
    """Those of some modalities whose kind of picture is not known, so that their results have no confidence."""
    return [name for name in modalities if name not in fitted().kinds]
