"""Sinks in threads of their own, so that a slow disk or network never holds up a live source."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

from espmedsam_edge.errors import UserError
from espmedsam_edge.runtime.latency import Latency
from espmedsam_edge.runtime.segmentation import Segmentation
from espmedsam_edge.runtime.sinks.sink import Sink
from espmedsam_edge.runtime.sources.source import Failure, SourceFrame

log = logging.getLogger(__name__)

_LAG_SECONDS = 0.3  # that a frame may wait before fewer are taken, and how long a change has to work
_MOST_THINNING = 16
_MOST_FRAMES = 60
_MOST_BYTES = 128 << 20
_PATIENCE_SECONDS = 10.0
_AGES = 10_000  # of a source, for their percentiles

End = tuple["type[BaseException] | None", "BaseException | None", "TracebackType | None"]


class BackgroundSink:
    """Hands frames to a sink in another thread, and never waits for it while frames come.

    A sink that is too slow gets fewer frames, evenly: while frames wait longer than 0.3 s, every second one is left
    out, of those that wait and of those that come, then three of four, and so on; when none waits any more, it gets
    more again. Never do more than 60 or 128 MB wait. So what a kill takes along stays short, and a disk's hiccup costs
    some frames, not all. Frames left out are counted. If the sink fails, one line says so, the rest goes on without it,
    and the failure counts for the run's exit code. If it was the last, the run ends, and its failure is told then. At
    the end the sink has ten seconds to finish; a disk or network that hangs longer is left behind. How old live frames
    are when the sink has written them is kept for the report.

    Args:
        sink: not yet entered; used from that thread only.
        name: what to call it in messages.
        failures: takes what failed.
        patience: seconds to wait for it at the end.
        clock: seconds, as ``time.monotonic``, by which frames are captured, too.
        max_latency: seconds; a live frame that is older when its turn comes is refused. None: none is.
        goes_on: asked when the sink has failed, whether the run has anything left to go on for.
    """

    def __init__(
        self,
        sink: Sink,
        name: str,
        failures: list[Failure],
        patience: float = _PATIENCE_SECONDS,
        clock: Callable[[], float] = time.monotonic,
        max_latency: float | None = None,
        goes_on: Callable[[], bool] = lambda: True,
    ) -> None:
        self.name = name
        self._goes_on = goes_on
        self._sink, self._failures, self._patience = sink, failures, patience
        self._clock, self._max_latency = clock, max_latency
        self._waiting: deque[tuple[float, SourceFrame, Segmentation]] = deque()  # with the time since when
        self._step, self._stepped = 1, clock()  # every which frame is taken, and since when
        self._caught_up = clock()
        self._size = 0
        self._given = 0
        self._end: End | None = None
        self._broken = False
        self._bug: BaseException | None = None
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="espmedsam-sink", daemon=True)
        self._ages: dict[Path, deque[float]] = {}
        self.refused: Counter[Path] = Counter()
        self.left_out = 0

    @property
    def failed(self) -> bool:
        """Whether it takes no more frames."""
        return self._broken

    def ages(self, label: Path) -> list[float]:
        """Seconds from capture to written of a live source's last frames; ``label`` is their ``SourceFrame.path``."""
        with self._changed:
            return list(self._ages.get(label, ()))

    def __enter__(self) -> BackgroundSink:
        self._thread.start()
        return self

    def write(self, frame: SourceFrame, result: Segmentation) -> None:
        """Leave a frame for the sink, at once; it is left out if too many wait already or the sink has failed."""
        size = _bytes_of(frame, result)
        if self._bug is not None:
            raise self._bug
        with self._changed:
            if self._broken:
                return
            full = len(self._waiting) >= _MOST_FRAMES or self._size + size > _MOST_BYTES
            thinned = self._given % self._adapted_step() != 0
            self._given += 1
            if thinned or (self._waiting and full):
                self.left_out += 1
                if self.left_out == 1:
                    log.warning("warning: %s cannot keep up: frames are left out of it.", self.name)
                return
            self._waiting.append((self._clock(), frame, result))
            self._size += size
            self._changed.notify_all()

    def _adapted_step(self) -> int:
        """Twice as much, or half, of what it was, if that has had its time to work."""
        now = self._clock()
        if now - self._stepped > _LAG_SECONDS:
            lag = now - self._waiting[0][0] if self._waiting else 0.0
            step = self._step
            if lag > _LAG_SECONDS:
                step = min(2 * step, _MOST_THINNING)
            elif not self._waiting:
                step = max(step // 2, 1)
            if step != self._step:
                self._step, self._stepped = step, now
        return self._step

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with self._changed:
            self._end = (kind, error, traceback)
            self._changed.notify_all()
        self._thread.join(self._patience)
        if self._bug is not None:
            raise self._bug
        if self._thread.is_alive():
            self._give_up(f"{self.name} did not end within {self._patience:g} s. Check the disk or the network.")
        if self.left_out:
            left_out = f"{self.left_out} frames were left out of {self.name}: it could not keep up."
            self._failures.append(Failure(self.name, f"{left_out} Write to a faster disk, or write less."))

    def _run(self) -> None:
        try:
            self._sink.__enter__()
            try:
                while (item := self._next()) is not None:
                    self._write(*item)
            except BaseException as failed:
                self._sink.__exit__(type(failed), failed, failed.__traceback__)
                raise
            self._sink.__exit__(*(self._end or (None, None, None)))
        except UserError as failed:
            self._give_up(str(failed))
        except BaseException as failed:  # noqa: BLE001 (nothing is swallowed: write or __exit__ raises it again)
            self._bug = failed

    def _write(self, frame: SourceFrame, result: Segmentation) -> None:
        if frame.captured is None:
            self._sink.write(frame, result)
            return
        if self._max_latency is not None and self._clock() - frame.captured > self._max_latency:
            self.refused[frame.path] += 1
            return
        self._sink.write(frame, result)
        with self._changed:
            self._ages.setdefault(frame.path, deque(maxlen=_AGES)).append(self._clock() - frame.captured)

    def _give_up(self, line: str) -> None:
        with self._changed:
            self._broken = True
            self._waiting.clear()
            self._failures.append(Failure(self.name, line))
            ending = self._end is not None
        if not ending and self._goes_on():
            log.warning("warning: %s The rest goes on without it.", line)

    def _next(self) -> tuple[SourceFrame, Segmentation] | None:
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._end is not None)
            if not self._waiting:
                return None
            self._catch_up()
            _, frame, result = self._waiting.popleft()
            self._size -= _bytes_of(frame, result)
            return frame, result

    def _catch_up(self) -> None:
        """If frames wait too long, leave every second of them out, never the newest; then let that work for a while."""
        now = self._clock()
        if now - self._waiting[0][0] > _LAG_SECONDS and now - self._caught_up > _LAG_SECONDS:
            kept = list(self._waiting)[::-2]
            self.left_out += len(self._waiting) - len(kept)
            self._waiting = deque(reversed(kept))
            self._size = sum(_bytes_of(frame, result) for _, frame, result in kept)
            self._caught_up = now


def _bytes_of(frame: SourceFrame, result: Segmentation) -> int:
    return frame.image.nbytes + result.mask.nbytes


@dataclass
class BackgroundSinks:
    """The sinks of a run that work in threads of their own.

    Attributes:
        failures: takes what fails of them.
        max_latency: see ``BackgroundSink``.
        others: whether the run has something to go on for besides these: a view, or files.
        sinks: all of them.
    """

    failures: list[Failure] = field(default_factory=list)
    max_latency: float | None = None
    others: bool = False
    sinks: list[BackgroundSink] = field(default_factory=list)

    def add(self, name: str, sink: Sink) -> BackgroundSink:
        """Let a sink work in the background; ``name`` is what messages call it."""
        self.sinks.append(BackgroundSink(sink, name, self.failures, max_latency=self.max_latency, goes_on=self._go_on))
        return self.sinks[-1]

    def _go_on(self) -> bool:
        return self.others or not all(sink.failed for sink in self.sinks)

    def slowest(self, label: Path) -> tuple[str, Latency] | None:
        """Which sink wrote a source's frames last, and their age then; None where none was written."""
        found = [(sink.name, Latency.of(ages)) for sink in self.sinks if (ages := sink.ages(label))]
        return max(found, key=lambda one: one[1].p99, default=None)

    def refused(self, label: Path) -> int:
        """How many of a source's frames were too old when their turn came, in the sink that refused most."""
        return max((sink.refused[label] for sink in self.sinks), default=0)
