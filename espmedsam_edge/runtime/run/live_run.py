"""Runs with live sources: all at once on one segmenter, the newest frame of each, and none held up by another's sinks.

Each job is a lane: a thread that opens and reads its source, and one that writes. Between them a single thread takes
frames from the lanes in turn, as many as the graph's batch holds, and segments them. A lane whose sinks are slow is
passed over until they have caught up; meanwhile its live source goes on and skips. Files share one reading thread.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import cast

from espmedsam_edge.bench.latency import Latency
from espmedsam_edge.errors import UserError
from espmedsam_edge.runtime.run.bounded_queue import Aborted
from espmedsam_edge.runtime.run.controls import Controls, RunSettings
from espmedsam_edge.runtime.run.in_flight import InFlight, Outcome
from espmedsam_edge.runtime.run.jobs import STAGES, Job, Limits, LiveReport, RunProgress, RunReport
from espmedsam_edge.runtime.run.threads import ThreadGroup
from espmedsam_edge.runtime.segmentation import DoesNotFit
from espmedsam_edge.runtime.segmenter import Segmenter
from espmedsam_edge.runtime.sinks.background import BackgroundSink
from espmedsam_edge.runtime.sinks.sink import Sink
from espmedsam_edge.runtime.sources.files import Failure, LiveFrames, SourceFrame

_READ_AHEAD = 4  # frames of a file that wait for the segmenter
_RESULTS = 2  # results of a lane that wait to be written
_LATENCIES = 10_000  # of a source, for its percentiles


@dataclass(eq=False)
class _Lane:
    """A job under way. Everything in it is guarded by the run's condition."""

    number: int
    job: Job
    pending: deque[SourceFrame] = field(default_factory=deque)  # of a file; a live source keeps its own
    results: deque[tuple[SourceFrame, Outcome]] = field(default_factory=deque)
    open: bool = False
    read_out: bool = False  # no frame will come any more
    cut: bool = False  # what was written is not to be kept
    taken: int = 0
    segmenting: int = 0
    written: int = 0
    refused: int = 0
    latencies: deque[float] = field(default_factory=lambda: deque(maxlen=_LATENCIES))

    @property
    def live(self) -> LiveFrames | None:
        """The source, if it is live."""
        return cast(LiveFrames, self.job.source) if self.job.source.live else None

    def has_frame(self) -> bool:
        live = self.live
        return live.waiting if live is not None else bool(self.pending)

    def take(self) -> SourceFrame | None:
        live = self.live
        return live.poll() if live is not None else self.pending.popleft()


class LiveRun:
    """See ``pipeline.run_pipeline``, whose arguments these are."""

    def __init__(
        self,
        segmenter: Segmenter,
        jobs: Sequence[Job],
        shared: Sequence[Sink],
        on_progress: Callable[[RunProgress], None] | None,
        controls: Controls,
        limits: Limits,
        stop: threading.Event | None = None,
    ) -> None:
        self.segmenter, self.shared, self.on_progress = segmenter, shared, on_progress
        self.controls, self.limits, self.stop = controls, limits, stop
        self.lanes = [_Lane(number, job) for number, job in enumerate(jobs)]
        self.seconds = dict.fromkeys(STAGES, 0.0)
        self.failures: list[Failure] = []
        self.error: BaseException | None = None
        self.changed = threading.Condition()
        self.sharing = threading.Lock()  # shared sinks are called by one lane at a time
        self.stopping = False  # read no more, finish what there is
        self.aborted = False  # drop everything
        self.deadline: float | None = None
        self.next_lane = 0
        self.in_flight: InFlight[tuple[_Lane, SourceFrame]] = InFlight(segmenter, self._hand_on)

    def run(self) -> RunReport:
        """Run until every source has ended, a limit is reached or Ctrl-C."""
        begin = time.perf_counter()
        files = [lane for lane in self.lanes if lane.live is None]
        live = [lane for lane in self.lanes if lane.live is not None]
        work: list[tuple[str, Callable[[], None]]] = [
            ("infer", self._infer),
            ("files", partial(self._read_files, files)),
        ]
        work += [("capture", partial(self._capture, lane)) for lane in live]
        work += [("write", partial(self._write, lane)) for lane in self.lanes]
        threads = ThreadGroup([(name, partial(self._guarded, stage)) for name, stage in work])
        interrupted = False
        try:
            threads.start()
            try:
                threads.wait(self.stop)
            except KeyboardInterrupt:
                interrupted = True
                self._stop()
                threads.wait()
        except BaseException:
            self._abort()
            threads.wait()
            raise
        if self.error is not None:
            raise self.error
        for lane in self.lanes:
            self.failures += lane.job.source.failures
        frames = sum(lane.written for lane in self.lanes)
        told = [_told(lane, lane.live) for lane in self.lanes if lane.live is not None]
        return RunReport(frames, self.failures, time.perf_counter() - begin, self.seconds, told, interrupted)

    def _guarded(self, stage: Callable[[], None]) -> None:
        """Run a stage in its thread; its error, whatever it is, ends the run and is raised in the calling thread."""
        try:
            stage()
        except Aborted:
            pass
        except BaseException as error:  # noqa: BLE001 (nothing is swallowed: run() raises it again)
            self.error = self.error or error
            self._abort()

    def _tell(self) -> None:
        with self.changed:
            self.changed.notify_all()

    def _abort(self) -> None:
        self.aborted = True
        self._tell()

    def _stop(self) -> None:
        """After Ctrl-C: live sources end, files are cut off and their unfinished outputs are not kept."""
        with self.changed:
            self.stopping = True
            for lane in self.lanes:
                lane.cut = lane.cut or (lane.live is None and not lane.read_out)
            self.changed.notify_all()

    def _wait(self, condition: Callable[[], bool]) -> None:
        """Wait, holding ``changed``, for a condition.

        Raises:
            Aborted: the run was aborted.
        """
        self.changed.wait_for(lambda: self.aborted or condition())
        if self.aborted:
            raise Aborted

    # Reading.

    def _read_files(self, lanes: Iterable[_Lane]) -> None:
        for lane in lanes:
            try:
                if not self.stopping:
                    self._read_file(lane)
            finally:
                self._read_to_the_end(lane)

    def _read_file(self, lane: _Lane) -> None:
        try:
            with lane.job.source as source:
                self._opened(lane)
                frames = iter(source)
                while True:
                    begin = time.perf_counter()
                    frame = next(frames, None)
                    self.seconds["decode"] += time.perf_counter() - begin
                    if frame is None:
                        return
                    with self.changed:
                        self._wait(lambda: len(lane.pending) < _READ_AHEAD or self._enough(lane))
                        if self._enough(lane):
                            return
                        lane.pending.append(frame)
                        self.changed.notify_all()
        except UserError as error:
            self.failures.append(Failure(lane.job.source.name, str(error)))

    def _capture(self, lane: _Lane) -> None:
        try:
            with lane.job.source as source:
                live = cast(LiveFrames, source)
                live.listen(self._tell)
                self._opened(lane)
                with self.changed:
                    self._wait(lambda: self._enough(lane) or (live.finished and not live.waiting))
        except UserError as error:
            self.failures.append(Failure(lane.job.source.name, str(error)))
        finally:
            self._read_to_the_end(lane)

    def _opened(self, lane: _Lane) -> None:
        with self.changed:
            lane.open = True
            if self.deadline is None and self.limits.seconds is not None:
                self.deadline = time.monotonic() + self.limits.seconds
            self.changed.notify_all()

    def _read_to_the_end(self, lane: _Lane) -> None:
        with self.changed:
            lane.read_out = True
            self.changed.notify_all()

    def _enough(self, lane: _Lane) -> bool:
        return self.stopping or lane.job.cancelled or lane.taken == self.limits.frames or self._in_vain(lane)

    def _in_vain(self, lane: _Lane) -> bool:
        """Whether all that would take the lane's results has failed."""
        sinks = [*lane.job.sinks, *self.shared]
        return bool(sinks) and all(isinstance(sink, BackgroundSink) and sink.failed for sink in sinks)

    # Segmenting.

    def _infer(self) -> None:
        while True:
            settings = self._settings()
            with self.changed:
                group = self._next_group()
            if group is None:
                return
            if group:
                self.in_flight.segment(group, [frame.image for _, frame in group], settings)
            else:
                self.in_flight.collect_all()

    def _settings(self) -> RunSettings:
        """What the controls say, once they do not say to wait or there is nothing to wait for."""
        while (settings := self.controls.current()).paused:
            self.in_flight.collect_all()
            with self.changed:
                self._check_deadline()
                if self.aborted:
                    raise Aborted
                if self.stopping or all(lane.read_out and not lane.pending for lane in self.lanes):
                    return settings
            self.controls.wait_for_change(settings, 0.2)
        return settings

    def _check_deadline(self) -> None:
        if self.deadline is not None and time.monotonic() >= self.deadline and not self.stopping:
            self.stopping = True
            self.changed.notify_all()

    def _next_group(self) -> list[tuple[_Lane, SourceFrame]] | None:
        """Frames of the lanes in turn, at most a batch; None when no more will come. Holds ``changed``.

        None of them where groups are under way that had better be taken back: a frame that is new now may come late.
        """
        while not any(self._ready(lane) for lane in self.lanes):
            if self.aborted:
                raise Aborted
            if self.in_flight:
                return []
            if all(lane.read_out and not lane.pending for lane in self.lanes):
                return None
            self._check_deadline()
            left = None if self.deadline is None or self.stopping else max(0.0, self.deadline - time.monotonic())
            self.changed.wait(left)
        self._check_deadline()
        group: list[tuple[_Lane, SourceFrame]] = []
        passed = 0  # lanes in a row that had nothing
        while len(group) < self.segmenter.batch and passed < len(self.lanes):
            lane = self.lanes[self.next_lane]
            self.next_lane = (self.next_lane + 1) % len(self.lanes)
            frame = self._take(lane)
            passed = 0 if frame is not None else passed + 1
            if frame is not None:
                group.append((lane, frame))
        self.changed.notify_all()
        return group

    def _ready(self, lane: _Lane) -> bool:
        if lane.live is not None and (self._enough(lane) or lane.read_out):
            return False
        if lane.job.cancelled or lane.cut or lane.taken == self.limits.frames:
            lane.pending.clear()
        return lane.has_frame() and len(lane.results) + lane.segmenting < _RESULTS

    def _take(self, lane: _Lane) -> SourceFrame | None:
        if not self._ready(lane):
            return None
        frame = lane.take()
        if frame is None:
            return None
        if self._too_old(frame):
            lane.refused += 1
            return None
        lane.taken += 1
        lane.segmenting += 1
        return frame

    def _too_old(self, frame: SourceFrame) -> bool:
        limit = self.limits.max_latency
        return limit is not None and frame.captured is not None and time.monotonic() - frame.captured > limit

    def _hand_on(self, group: Sequence[tuple[_Lane, SourceFrame]], results: Sequence[Outcome]) -> None:
        with self.changed:
            for (lane, frame), result in zip(group, results, strict=True):
                if not isinstance(result, DoesNotFit):
                    for stage in ("preprocess", "inference", "postprocess"):
                        self.seconds[stage] += getattr(result.timings, stage)
                    if frame.captured is not None:
                        lane.latencies.append(time.monotonic() - frame.captured)
                lane.segmenting -= 1
                lane.results.append((frame, result))
            self.changed.notify_all()

    # Writing.

    def _write(self, lane: _Lane) -> None:
        try:
            with ExitStack() as sinks:
                with self.changed:
                    self._wait(lambda: lane.open or lane.read_out)
                for sink in lane.job.sinks:
                    sinks.enter_context(sink)
                while (item := self._next_result(lane)) is not None:
                    self._write_frame(lane, *item)
                if lane.cut:
                    raise Aborted
        except UserError as error:  # one of the job's sinks could not go on, or could not finish its file
            with self.changed:
                lane.job.cancelled = True
                self.failures.append(Failure(lane.job.source.name, str(error)))
                self.changed.notify_all()
            while self._next_result(lane) is not None:
                pass

    def _next_result(self, lane: _Lane) -> tuple[SourceFrame, Outcome] | None:
        with self.changed:
            self._wait(
                lambda: bool(lane.results) or lane.cut or (lane.read_out and not lane.pending and not lane.segmenting)
            )
            if lane.cut or not lane.results:
                return None
            item = lane.results.popleft()
            self.changed.notify_all()
            return item

    def _write_frame(self, lane: _Lane, frame: SourceFrame, result: Outcome) -> None:
        if self._too_old(frame):
            lane.refused += 1
            return
        begin = time.perf_counter()
        try:
            if isinstance(result, DoesNotFit):
                raise result
            for sink in lane.job.sinks:
                sink.write(frame, result)
        except UserError as error:
            if lane.job.source.kind == "video":
                raise
            self.failures.append(Failure(str(frame.path), str(error)))
            return
        with self.sharing:
            try:
                for sink in self.shared:
                    sink.write(frame, result)
            except UserError as error:
                self.error = self.error or error
                self._abort()
                raise Aborted from error
        lane.written += 1
        self.seconds["write"] += time.perf_counter() - begin
        if self.on_progress is not None:
            source = lane.job.source
            done, expected = lane.written + len(source.failures), source.length
            self.on_progress(RunProgress(lane.number, source.name, done, expected, source.live))


def _told(lane: _Lane, live: LiveFrames) -> LiveReport:
    latency = Latency.of(list(lane.latencies)) if lane.latencies else None
    return LiveReport(live.name, live.files[0], lane.written, live.skipped, lane.refused, live.reconnects, latency)
