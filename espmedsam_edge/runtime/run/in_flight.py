"""Groups of frames that a run has handed to the segmenter and not yet taken back, oldest first."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Generic, TypeVar

from espmedsam_edge.errors import UserError
from espmedsam_edge.imaging.geometry import Frame
from espmedsam_edge.runtime.backends.backend import BackendAway, Started
from espmedsam_edge.runtime.run.controls import RunSettings
from espmedsam_edge.runtime.segmentation import DeviceLost, DoesNotFit, NotFinite, Segmentation
from espmedsam_edge.runtime.segmenter import Segmenter

log = logging.getLogger(__name__)

Item = TypeVar("Item")
Outcome = Segmentation | UserError
"""What came of a frame: it may be too large for the GPU that was asked for, have no result (``NotFinite``), or be one
on which the engine failed, while others do."""

_FAILURES_IN_A_ROW = 3
"""Groups on which the engine fails, one after the other, before it is taken to be broken."""


class InFlight(Generic[Item]):
    """Segments groups of frames, several at once where the backend overlaps them, and hands results on in order.

    Used by one thread.

    Args:
        segmenter: the run's own; the controls may name another one.
        hand_on: gets a group, and what came of each of its frames.
        segmenter_of: what segments frames that were recognised; None: ``segmenter`` does.
        patient: whether a network elsewhere that is out of reach is waited for, since newer frames come.
    """

    def __init__(
        self,
        segmenter: Segmenter,
        hand_on: Callable[[Sequence[Item], Sequence[Outcome]], None],
        segmenter_of: Callable[[str], Segmenter] | None = None,
        patient: Callable[[], bool] = lambda: False,
    ) -> None:
        self._segmenter, self._hand_on, self._segmenter_of = segmenter, hand_on, segmenter_of
        self._patient, self._lost = patient, 0.0
        self._started: deque[tuple[Sequence[Item], Started]] = deque()
        self._failures = 0  # in a row

    def __bool__(self) -> bool:
        """Whether any group is under way."""
        return bool(self._started)

    @property
    def away(self) -> bool:
        """Whether the network was out of reach for the last group, and is waited for."""
        return self._lost > 0 and self._patient()

    def segment(
        self, group: Sequence[Item], frames: Sequence[Frame], settings: RunSettings, modality: str | None = None
    ) -> None:
        """Start a group; hand on what must be done before it.

        Args:
            group: what ``hand_on`` gets, in parts where the segmenter takes fewer frames at once.
            frames: they stay as they are until the group is handed on.
            settings: the modality and the threshold that the controls ask for, else the run's own.
            modality: what the group was recognised as, unless the controls ask for one.

        Raises:
            UserError: the backend is lost, or failed on several groups in a row.
        """
        chosen = settings.segmenter or self._segmenter
        if settings.segmenter is None and modality is not None and self._segmenter_of is not None:
            chosen = self._segmenter_of(modality)
        if chosen.in_flight == 1:
            self.collect_all()
            threshold = settings.threshold
            more = () if threshold is None else (threshold,)
            self._hand_on(group, self._outcomes(group, partial(chosen.segment_batch, frames, *more)))
            return
        for first in range(0, len(group), chosen.batch):
            part = slice(first, first + chosen.batch)
            self._start(chosen, group[part], frames[part], settings)

    def _start(self, chosen: Segmenter, group: Sequence[Item], frames: Sequence[Frame], settings: RunSettings) -> None:
        while len(self._started) >= chosen.in_flight:
            self.collect()
        try:
            started = chosen.start(frames, settings.threshold)
        except DoesNotFit as error:
            self.collect_all()
            alone = [error] if len(frames) == 1 else [_outcome(chosen, frame, settings) for frame in frames]
            self._hand_on(group, alone)
        except UserError as error:
            self._note(error)
            self.collect_all()
            self._hand_on(group, [error] * len(group))
        else:
            self._started.append((group, started))

    def collect(self) -> None:
        """Wait for the oldest group and hand it on.

        Raises:
            UserError: the backend is lost, or failed on several groups in a row.
        """
        group, started = self._started.popleft()
        self._hand_on(group, self._outcomes(group, started.results))

    def collect_all(self) -> None:
        """Hand on everything.

        Raises:
            UserError: the backend is lost, or failed on several groups in a row.
        """
        while self._started:
            self.collect()

    def _outcomes(self, group: Sequence[Item], results: Callable[[], Sequence[Segmentation]]) -> Sequence[Outcome]:
        outcomes: Sequence[Outcome]
        try:
            outcomes = results()
        except NotFinite as error:
            outcomes = error.outcomes
        except UserError as error:
            self._note(error)
            return [error] * len(group)
        self._failures = 0
        if self._lost:
            log.info("The network is back after %.1f s.", time.monotonic() - self._lost)
            self._lost = 0.0
        return outcomes

    def _note(self, error: UserError) -> None:
        """Count a group that the engine failed on; raise the error of a backend that is no use any more."""
        if isinstance(error, BackendAway) and self._patient():
            if not self._lost:
                log.warning("%s Frames are left out until it is back.", error)
                self._lost = time.monotonic()
            return
        self._failures += 0 if isinstance(error, DoesNotFit) else 1
        if isinstance(error, DeviceLost) or self._failures >= _FAILURES_IN_A_ROW:
            raise error


def _outcome(segmenter: Segmenter, frame: Frame, settings: RunSettings) -> Outcome:
    try:
        return segmenter.segment_batch([frame], settings.threshold)[0]
    except (DoesNotFit, NotFinite) as error:
        return error
