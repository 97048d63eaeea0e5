"""What frames go through in a run: a lane for all files, one for each live source, and how far each may read ahead."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import cast

from espmedsam_edge.runtime.latency import Latency
from espmedsam_edge.runtime.run.in_flight import Outcome
from espmedsam_edge.runtime.run.jobs import Job, LiveReport
from espmedsam_edge.runtime.segmentation import Segmentation
from espmedsam_edge.runtime.segmenter import Segmenter
from espmedsam_edge.runtime.sources.source import Interruptible, LiveFrames, SourceFrame

READ_AHEAD_BYTES = 512 << 20
"""What a run holds at most, of all its jobs together: frames that wait, are segmented or are written, with results.

Half of it is the live sources' where a run has files as well, so that neither waits for the other's memory. What does
not fit goes alone: each lane may always hold one frame. Not counted is what sources and sinks keep for themselves, and
what a thread has finished with that very moment.
"""

_PENDING = 4  # frames of files that wait for the segmenter, or a batch of them
_RESULTS = 4  # results of files that wait to be written when more are segmented
_LIVE_RESULTS = 2  # results of a live source that are computed or wait to be written
_LATENCIES = 10_000  # of a source, for its percentiles


@dataclass(eq=False)
class JobState:
    """A job under way. Guarded by the run's condition, as everything here."""

    number: int
    job: Job
    opened: bool = False
    read_out: bool = False  # no frame will come any more
    cut: bool = False  # what was written is not to be kept
    taken: int = 0  # frames, for the limit of them
    held: int = 0  # frames between the source and the sinks
    done: int = 0  # frames that were written or failed
    written: int = 0
    refused: int = 0
    failed: int = 0  # live frames that the network has no finite output for
    latencies: deque[float] = field(default_factory=lambda: deque(maxlen=_LATENCIES))

    @property
    def dropped(self) -> bool:
        """Whether frames of it that are on their way are of no use."""
        return self.cut or self.job.cancelled

    def interrupt(self) -> bool:
        """Have it end with what has come, if it comes by a pipe and is being read; whether it does."""
        source = self.job.source
        going = self.opened and not self.read_out
        return going and isinstance(source, Interruptible) and source.interrupt()


@dataclass(eq=False)
class Item:
    """A frame on its way through a lane, the bytes it counts for, and what came of it."""

    lane: Lane
    state: JobState
    frame: SourceFrame
    size: int
    outcome: Outcome | None = None

    @property
    def modality(self) -> str | None:
        """What the frame was recognised as."""
        return self.frame.modality


class Allowance:
    """Bytes that lanes may hold together."""

    def __init__(self, limit: int) -> None:
        self.limit, self.used = limit, 0


class Lane(ABC):
    """Frames in order from sources through the segmenter to one writing thread."""

    def __init__(self, states: Sequence[JobState], allowance: Allowance) -> None:
        self.states = states
        self.results: deque[Item] = deque()
        self.segmenting = 0
        self._allowance = allowance
        self._held = 0
        self._last_size = 0

    @abstractmethod
    def ready(self) -> bool:
        """Whether a group may begin with a frame of it."""

    @abstractmethod
    def over(self) -> bool:
        """Whether no frame will come."""

    @abstractmethod
    def take(self, group: Sequence[Item]) -> Item | None:
        """Its next frame for a group that holds ``group`` already, if it has one that may go into it."""

    def hold(self, state: JobState, frame: SourceFrame, size: int) -> Item:
        """Count a frame of ``size`` bytes that begins its way."""
        self._allowance.used += size
        self._held += 1
        self._last_size = size
        state.held += 1
        return Item(self, state, frame, size)

    def let_go(self, item: Item) -> None:
        """The frame has come to its end."""
        self._allowance.used -= item.size
        self._held -= 1
        item.state.held -= 1

    def drop(self, state: JobState) -> None:
        """Let go of a job's frames that are not segmented or written just now."""
        for item in [item for item in self.results if item.state is state]:
            self.results.remove(item)
            self.let_go(item)

    def clear(self) -> None:
        """Let go of all frames, once the run was given up."""
        for state in self.states:
            self.drop(state)

    def segmented(self, item: Item, outcome: Outcome) -> None:
        """A frame comes back from the segmenter."""
        self.segmenting -= 1
        item.outcome = outcome
        if item.state.dropped:
            self.let_go(item)
        else:
            self.results.append(item)

    def take_back(self, item: Item) -> None:
        """A frame could not be segmented now; there will be a newer one."""
        self.segmenting -= 1
        item.state.taken -= 1
        self.let_go(item)

    def result_of(self, state: JobState) -> bool:
        """Whether the next result is one of that job's."""
        return bool(self.results) and self.results[0].state is state

    def _fits(self) -> bool:
        """Whether a frame as large as the last one may begin its way: by bytes, or because there is no other."""
        return not self._held or self._allowance.used + self._last_size <= self._allowance.limit


class FileLane(Lane):
    """All files of a run, one after the other: every frame, in order.

    Frames are read ahead up to a batch, and wait until they fill one, their file ends, or no more may be read. A batch
    holds frames of one source and one modality; live frames fill it up, and it goes early with them.

    Args:
        states: their jobs.
        allowance: what it shares with no other.
        batch: of the graph.
        on_hold: whether no frame of it is to be segmented now.
    """

    def __init__(
        self,
        states: Sequence[JobState],
        allowance: Allowance,
        batch: int,
        on_hold: Callable[[], bool] = lambda: False,
    ) -> None:
        super().__init__(states, allowance)
        self._batch, self._on_hold = batch, on_hold
        self.pending: deque[Item] = deque()

    def may_read(self) -> bool:
        """Whether one more frame may be read."""
        return len(self.pending) < max(_PENDING, self._batch) and self._fits()

    @property
    def lacks_frames(self) -> bool:
        """Whether another frame is likely to come soon, and would be segmented."""
        return len(self.results) < _RESULTS and not self._read_out

    @property
    def _read_out(self) -> bool:
        return not self.states or self.states[-1].read_out

    def ready(self) -> bool:
        if not self.pending or len(self.results) >= _RESULTS or self._on_hold():
            return False
        return len(self.pending) >= self._batch or self.pending[0].state.read_out or not self.may_read()

    def over(self) -> bool:
        return not self.pending and self._read_out

    def take(self, group: Sequence[Item]) -> Item | None:
        if not (self.pending if group else self.ready()) or self._on_hold():
            return None
        first = self.pending[0]
        if len(self.results) >= _RESULTS or any(
            item.modality != first.modality or (item.lane is self and item.state is not first.state) for item in group
        ):
            return None
        self.segmenting += 1
        return self.pending.popleft()

    def take_back(self, item: Item) -> None:
        """See ``Lane.take_back``; it waits again, before all others."""
        if item.state.dropped:
            super().take_back(item)
        else:
            self.segmenting -= 1
            self.pending.appendleft(item)

    def drop(self, state: JobState) -> None:
        super().drop(state)
        for item in [item for item in self.pending if item.state is state]:
            self.pending.remove(item)
            self.let_go(item)


class LiveLane(Lane):
    """A live source: its newest frame, and no more than two results of it that are not yet written.

    Args:
        state: its job.
        allowance: what it shares with the other live sources.
        enough: whether no more of a job's frames are wanted.
        size_of: the bytes that a frame counts for.
        max_latency: see ``Limits``.
    """

    def __init__(
        self,
        state: JobState,
        allowance: Allowance,
        enough: Callable[[JobState], bool],
        size_of: Callable[[SourceFrame], int],
        max_latency: float | None,
    ) -> None:
        super().__init__([state], allowance)
        self.state = state
        self.source = cast(LiveFrames, state.job.source)
        self._enough, self._size_of, self._max_latency = enough, size_of, max_latency

    def ready(self) -> bool:
        if not self.source.waiting or self.state.read_out or self._enough(self.state):
            return False
        return len(self.results) + self.segmenting < _LIVE_RESULTS and self._fits()

    def over(self) -> bool:
        return self.state.read_out

    def take(self, group: Sequence[Item]) -> Item | None:
        """See ``Lane.take``; a frame that is too old is refused."""
        if not self.ready() or (frame := self.source.poll()) is None:
            return None
        if too_old(frame, self._max_latency):
            self.state.refused += 1
            return None
        self.state.taken += 1
        self.segmenting += 1
        return self.hold(self.state, frame, self._size_of(frame))


def take_back(group: Sequence[Item]) -> None:
    """Frames could not be segmented now."""
    for item in reversed(group):
        item.lane.take_back(item)


def too_old(frame: SourceFrame, max_latency: float | None) -> bool:
    """Whether a live frame is older than the limit, in seconds; None: no limit."""
    return max_latency is not None and frame.captured is not None and time.monotonic() - frame.captured > max_latency


def size_of(frame: SourceFrame, segmenter: Segmenter) -> int:
    """The bytes of a frame and of what a segmenter makes of it: mask, logits and, where it draws, overlay."""
    height, width = frame.image.shape[:2]
    draws = segmenter.frame_backend is not None and segmenter.frame_options.overlay is not None
    drawn = frame.image.nbytes if draws else 0
    return int(frame.image.nbytes + height * width + drawn + 4 * (segmenter.image_size // 4) ** 2)


def live_report(lane: LiveLane) -> LiveReport:
    """What became of the lane's source so far."""
    state, source = lane.state, lane.source
    latency = Latency.of(list(state.latencies)) if state.latencies else None
    return LiveReport(
        name=source.name,
        label=source.files[0],
        frames=state.written,
        skipped=source.skipped,
        refused=state.refused,
        reconnects=source.reconnects,
        latency=latency,
        failed=state.failed,
    )


def of_the_whole(frame: SourceFrame, outcome: Outcome, least: float | None = None) -> Outcome:
    """What came of a frame's crop as what came of the frame, with its confidence; ``least``: what is asked of that."""
    if not isinstance(outcome, Segmentation):
        return outcome
    return (outcome if frame.crop is None else outcome.placed(frame.crop, frame.size)).judged(frame.likeness, least)
