"""The networks of a run: one for everything, or one for each modality that its pictures are recognised as."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack

from espmedsam_edge.bundle import Bundle, Graph
from espmedsam_edge.errors import UserError
from espmedsam_edge.imaging.overlay import OverlayStyle
from espmedsam_edge.imaging.recognition import recognisable
from espmedsam_edge.runtime.bundle_choice import Chosen, choose_bundle
from espmedsam_edge.runtime.request import ModelOptions, NetworkReport
from espmedsam_edge.runtime.segmentation import Segmentation
from espmedsam_edge.runtime.segmenter import Segmenter
from espmedsam_edge.runtime.segmenter_pool import SegmenterPool
from espmedsam_edge.runtime.sinks.sink import Sink, Tally
from espmedsam_edge.runtime.sources.recognised import (
    DoubtedSource,
    Doubts,
    RecognisedSource,
    Recogniser,
    first_modality,
    unjudged,
)
from espmedsam_edge.runtime.sources.source import Failure, Source, SourceFrame
from espmedsam_edge.runtime.tiling import AUTO, OFF

log = logging.getLogger(__name__)

StyleOf = Callable[[str], OverlayStyle]


class Networks:
    """Chosen at once; looked for in the pictures where they decide; loaded when they are needed, each once.

    Args:
        model: as the request has it; a segmenter that is loaded already stays the caller's.

    Attributes:
        modality: what everything is segmented as; None: what each picture is recognised as.
        bundle, graph: what runs; None as long as no picture has decided.
        segmenter: once loaded; where pictures decide, the first one's.
        parameters: of how the masks are made, for DICOM-SEG; whole once the first network is loaded.
        pool: where those of further pictures come from, once loaded; None: all are segmented alike.

    Raises:
        UserError: a bundle, a modality or a precision that will not do.
    """

    segmenter: Segmenter

    def __init__(self, model: ModelOptions | Segmenter) -> None:
        self._model = model
        if isinstance(model, Segmenter):
            self._chosen = Chosen(model.bundle, model.modality)
        else:
            self._chosen = choose_bundle(model.bundle, model.modality, model.precision)
        self.modality = self._chosen.modality
        self.bundle: Bundle | None = self._chosen.bundle
        self.graph: Graph | None = None
        self.parameters: dict[str, str] = {}
        if self.modality is not None:
            self._take(self.modality)
        self.pool: SegmenterPool | None = None
        self.counts = ModalityCounts()
        self.refusals = Refusals()
        self.min_confidence = None if isinstance(model, Segmenter) else model.min_confidence

    def _take(self, modality: str) -> None:
        model = self._model
        if isinstance(model, Segmenter):
            self.graph = model.graph
        else:
            self.bundle = self._chosen.bundle_of(modality)
            self.graph = self.bundle.graph(modality, model.precision)

    def refuse(self, name: str) -> None:
        """Raise an error where the modality of a source that is read only once is not named."""
        if self.modality is None:
            choices = f"Name it: --modality {'|'.join(self._chosen.among)}"
            raise UserError(f"the modality of {name} cannot be told.", choices)

    def look_at(
        self, sources: Sequence[Source], again: Callable[[], Sequence[Source]]
    ) -> tuple[list[Source], list[Failure]]:
        """Sources whose pictures are recognised as they are read, or looked at where a bundle or a modality is named.

        Args:
            sources: of the run, not yet entered.
            again: the same, opened anew, to look for the first picture that is clear.

        Returns:
            No sources and a failure for each picture, where none is clear.

        Raises:
            UserError: a live source, whose modality must be named.
        """
        if self.modality is not None:
            quiet = isinstance(self._model, Segmenter)  # who loads a network knows what for
            if unjudged([self.modality]) and self.min_confidence:
                reason = "what such pictures look like is not known"
                log.warning("--min-confidence has no effect for %s: %s.", self.modality, reason)
            if not recognisable([self.modality]):
                return list(sources), []
            doubts = None if quiet else Doubts(self.modality)
            return [DoubtedSource(source, None if source.live else doubts) for source in sources], []
        among = self._chosen.among
        for source in sources:
            if source.live:
                self.refuse(source.name)
        recogniser = Recogniser(among)
        first, failures = first_modality([RecognisedSource(source, recogniser) for source in again()])
        if first is None:
            return [], failures
        self._take(first)
        return [RecognisedSource(source, recogniser) for source in sources], []

    def load(self, stack: ExitStack, style_of: StyleOf | None, *, many: bool = False, live: bool = False) -> None:
        """Load the first; further ones are loaded when a picture asks for them, and closed with the stack.

        Args:
            stack: closes what is loaded.
            style_of: the overlays' style by modality; None: none are drawn.
            many: as ``Segmenter.load``.
            live: whether there are live sources, of which ``auto`` takes no tiles: their frames would grow old.

        Raises:
            UserError: see ``Segmenter.load``.
        """
        model = self._model
        if isinstance(model, Segmenter):
            self.segmenter = model
            self._describe()
            return
        if self.bundle is None or self.graph is None:
            raise RuntimeError("no picture has decided yet")

        # Results of one run are of one precision: a bundle of several modalities and precisions runs as it says.
        several = self._chosen.bundle is not None and self.modality is None
        precision = self.graph.precision if several else model.precision

        def load(modality: str, bundle: Bundle | None = None) -> Segmenter:
            return Segmenter.load(
                bundle or self._chosen.bundle_of(modality),
                modality,
                precision,
                model.backend_spec(),
                threshold=model.threshold,
                threads=model.threads,
                overlay=None if style_of is None else style_of(modality),
                tta=model.tta,
                many=many,
                tile=OFF if live and model.tile == AUTO else model.tile,
            )

        self.segmenter = stack.enter_context(load(self.graph.modality, self.bundle))
        self._describe()
        if self.modality is None:
            self.pool = stack.enter_context(SegmenterPool(self.bundle, load, self._chosen.among))
            self.pool.add(self.segmenter)

    def _describe(self) -> None:
        segmenter = self.segmenter
        self.parameters |= {
            "precision": segmenter.precision,
            "checkpoint": segmenter.bundle.manifest.weights.checkpoint_sha256,
            "backend": segmenter.choice.backend.name,
        }

    def sinks(self) -> list[Sink]:
        """What takes note of the run's results: how many there are of each modality, and those that are refused."""
        return [self.counts, self.refusals]

    def unjudged(self) -> list[str]:
        """The modalities that were segmented and whose results have no confidence."""
        return unjudged(list(self.counts.frames))

    def reports(self) -> list[NetworkReport]:
        """What each network did, where pictures decided; those that did nothing are left out."""
        found: list[NetworkReport] = []
        if self.pool is None:
            return found
        for modality, frames in self.counts.frames.items():
            segmenter = self.pool.loaded(modality)
            if segmenter is not None:
                place, choice = segmenter.bundle.path, segmenter.choice
                found.append(NetworkReport(place, modality, segmenter.precision, choice.taken, frames, choice.why))
        return found


class ModalityCounts(Tally):
    """A sink that counts frames by modality."""

    def __init__(self) -> None:
        self.frames: dict[str, int] = {}

    def write(self, frame: SourceFrame, result: Segmentation) -> None:
        self.frames[result.modality] = self.frames.get(result.modality, 0) + 1


class Refusals(Tally):
    """A sink that takes note of results whose confidence was too low: each picture, and of a video how many."""

    def __init__(self) -> None:
        self._pictures: list[Failure] = []
        self._videos: dict[str, list[int]] = {}

    def write(self, frame: SourceFrame, result: Segmentation) -> None:
        if frame.time is not None or frame.captured is not None:
            counts = self._videos.setdefault(frame.source, [0, 0])
            counts[0] += result.refused
            counts[1] += 1
        elif result.refused:
            line = f"{frame.source} looks unlike {result.modality} (confidence {result.confidence:.2f})"
            self._pictures.append(Failure(str(frame.path), f"{line}: its mask is empty."))

    def failures(self) -> list[Failure]:
        """A line for each picture and each video."""
        return self._pictures + [
            Failure(name, f"{refused} of {count} frames of {name} look unlike their modality: their masks are empty.")
            for name, (refused, count) in self._videos.items()
            if refused
        ]
