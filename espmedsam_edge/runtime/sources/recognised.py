"""What pictures look like, told as they are read: each its own modality, or a warning where it is plainly another."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace

from espmedsam_edge.errors import UserError
from espmedsam_edge.imaging.recognition import likeliest, looks_otherwise, recognise
from espmedsam_edge.runtime.sources.passed_on import PassedOn
from espmedsam_edge.runtime.sources.source import Failure, Source, SourceFrame

log = logging.getLogger(__name__)


class Recogniser:
    """Chooses among some modalities for each picture; says at the first picture of each what it looks like."""

    def __init__(self, among: Sequence[str]) -> None:
        self.among = tuple(among)
        self._told: set[str] = set()

    def modality_of(self, frame: SourceFrame) -> str:
        """What a picture is surely of.

        Raises:
            UserError: it looks like none of them with certainty; the message names the likeliest.
        """
        guess = recognise(frame.segmented, self.among)
        if guess is None or not guess.sure:
            else_likely = likeliest(frame.segmented, self.among)
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
        for frame in self._source:
            if self.kind == "images" or modality is None:
                try:
                    modality = self._recogniser.modality_of(frame)
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
    """Warns once when a picture is surely not of the modality that it is segmented as."""

    def __init__(self, modality: str) -> None:
        self._modality = modality
        self._told = False

    def look_at(self, frame: SourceFrame) -> None:
        """Warn, if it is the first such picture."""
        if self._told:
            return
        found = looks_otherwise(frame.segmented, self._modality)
        if found is not None:
            self._told = True
            log.warning(
                "%s looks like %s and is segmented as %s. Is it the right network? Further ones are not told.",
                frame.source,
                found,
                self._modality,
            )


class DoubtedSource(PassedOn):
    """A source whose pictures, and whose videos' first frames, are looked at.

    Args:
        source: of files, not yet entered.
        doubts: shared by the sources of a run.
    """

    def __init__(self, source: Source, doubts: Doubts) -> None:
        super().__init__(source)
        self._doubts = doubts

    def __iter__(self) -> Iterator[SourceFrame]:
        for number, frame in enumerate(self._source):
            if number == 0 or self.kind == "images":
                self._doubts.look_at(frame)
            yield frame
