"""Capture, inference and writing at the same time: a thread each, bounded queues, order kept, nothing dropped.

This is the run over files; runs with a live source among theirs go on in ``live_run``.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial

from espmedsam_edge.errors import UserError
from espmedsam_edge.runtime.run.bounded_queue import Aborted, BoundedQueue
from espmedsam_edge.runtime.run.controls import Adjustable, Controls, RunSettings
from espmedsam_edge.runtime.run.in_flight import InFlight, Outcome
from espmedsam_edge.runtime.run.jobs import STAGES, Job, Limits, RunProgress, RunReport
from espmedsam_edge.runtime.run.live_run import LiveRun
from espmedsam_edge.runtime.run.threads import ThreadGroup
from espmedsam_edge.runtime.segmentation import DoesNotFit
from espmedsam_edge.runtime.segmenter import Segmenter
from espmedsam_edge.runtime.sinks.sink import Sink
from espmedsam_edge.runtime.sources.files import Failure, Source, SourceFrame

__all__ = ["STAGES", "Job", "Limits", "RunProgress", "RunReport", "run_pipeline"]

_QUEUE_ITEMS = 4
_QUEUE_BYTES = 256 << 20
_NEXT_FRAME_SECONDS = 0.001  # how long frames on a GPU wait for another one to overlap with


def run_pipeline(
    segmenter: Segmenter,
    jobs: Sequence[Job],
    shared: Sequence[Sink] = (),
    on_progress: Callable[[RunProgress], None] | None = None,
    controls: Controls | None = None,
    limits: Limits = Limits(),
    stop: threading.Event | None = None,
) -> RunReport:
    """Segment every frame of every job, in order, and hand each to the job's sinks and to the shared ones.

    Files are done one after the other and every frame of them; live sources run at the same time, beside each other and
    beside the files, and each gives its newest frame. With a live source, Ctrl-C (a first time) ends the reading, and
    sinks finish what the live sources gave.

    A source or a sink that fails, or a frame too large for the GPU that was asked for, becomes a failure in the report,
    and the rest is done. The calling thread only waits:
    Ctrl-C there, or an error in any stage, stops all stages, and sinks then remove what is not finished.

    Args:
        segmenter: what runs; a graph with a batch gets frames in groups, of two jobs only where one is live.
        jobs: not yet entered.
        shared: sinks for all jobs, entered by the caller; an error in one ends the run.
        on_progress: called after each frame, from another thread.
        controls: asked before each group of frames; None: nothing changes while it runs.
        limits: when to end.
        stop: does what Ctrl-C does once it is set, from any thread.

    Raises:
        UserError: a shared sink or the backend failed.
        KeyboardInterrupt: Ctrl-C or ``stop``, once everything has stopped.
    """
    run = LiveRun if any(job.source.live for job in jobs) else _Run
    return run(segmenter, jobs, shared, on_progress, controls or Adjustable(), limits, stop).run()


@dataclass
class _Begin:
    number: int
    job: Job


@dataclass
class _Frame:
    job: Job
    frame: SourceFrame


@dataclass
class _Result:
    job: Job
    frame: SourceFrame
    result: Outcome


@dataclass
class _End:
    job: Job


class _AllDone:
    pass


_Captured = _Begin | _Frame | _End | _AllDone
_Segmented = _Begin | _Result | _End | _AllDone


@dataclass
class _Run:
    segmenter: Segmenter
    jobs: Sequence[Job]
    shared: Sequence[Sink]
    on_progress: Callable[[RunProgress], None] | None
    controls: Controls
    limits: Limits
    stop: threading.Event | None = None
    captured: BoundedQueue[_Captured] = field(default_factory=lambda: BoundedQueue(_QUEUE_ITEMS, _QUEUE_BYTES))
    segmented: BoundedQueue[_Segmented] = field(default_factory=lambda: BoundedQueue(_QUEUE_ITEMS, _QUEUE_BYTES))
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STAGES, 0.0))
    failures: list[Failure] = field(default_factory=list)
    frames: int = 0
    error: BaseException | None = None
    aborted: bool = False
    deadline: float | None = None

    def __post_init__(self) -> None:
        self.in_flight: InFlight[_Frame] = InFlight(self.segmenter, self._hand_on)

    def run(self) -> RunReport:
        begin = time.perf_counter()
        stages = (("capture", self._capture), ("infer", self._infer), ("write", self._write))
        threads = ThreadGroup([(name, partial(self._guarded, stage)) for name, stage in stages])
        try:
            threads.start()
            threads.wait(self.stop)
        except BaseException:
            self._abort()
            threads.wait()
            raise
        if self.error is not None:
            raise self.error
        return RunReport(self.frames, self.failures, time.perf_counter() - begin, self.seconds)

    def _guarded(self, stage: Callable[[], None]) -> None:
        """Run a stage in its thread; its error, whatever it is, ends the run and is raised in the calling thread."""
        try:
            stage()
        except Aborted:
            pass
        except _SharedSinkFailed as failed:
            self._fail(failed.error)
        except BaseException as error:  # noqa: BLE001 (nothing is swallowed: run() raises it again)
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        self.error = self.error or error
        self._abort()

    def _abort(self) -> None:
        self.aborted = True
        self.captured.abort()
        self.segmented.abort()

    def _capture(self) -> None:
        for number, job in enumerate(self.jobs):
            self.captured.put(_Begin(number, job))
            try:
                with job.source as source:
                    self._read(job, source)
            except UserError as error:
                self.failures.append(Failure(job.source.name, str(error)))
            self.failures += job.source.failures
            self.captured.put(_End(job))
        self.captured.put(_AllDone())

    def _read(self, job: Job, source: Source) -> None:
        frames = iter(source)
        count = 0
        while not job.cancelled and count != self.limits.frames and not self._over():
            begin = time.perf_counter()
            frame = next(frames, None)
            self.seconds["decode"] += time.perf_counter() - begin
            if frame is None:
                return
            self.captured.put(_Frame(job, frame), frame.image.nbytes)
            count += 1

    def _over(self) -> bool:
        seconds = self.limits.seconds
        if seconds is None:
            return False
        self.deadline = self.deadline or time.monotonic() + seconds
        return time.monotonic() >= self.deadline

    def _infer(self) -> None:
        group: list[_Frame] = []
        while True:
            # The next frame is copied in while the ones before are computed, if it is there in time.
            while self.in_flight and not self.captured.wait(_NEXT_FRAME_SECONDS):
                self.in_flight.collect()
            item = self.captured.get()
            if isinstance(item, _Frame):
                group.append(item)
                if len(group) == self.segmenter.batch:
                    self._segment(group)
                    group = []
                continue
            self._segment(group)
            group = []
            self.in_flight.collect_all()
            self.segmented.put(item)
            if isinstance(item, _AllDone):
                return

    def _segment(self, group: Sequence[_Frame]) -> None:
        if not group:
            return
        settings = self._settings()
        self.in_flight.segment(group, [item.frame.image for item in group], settings)

    def _hand_on(self, group: Sequence[_Frame], results: Sequence[Outcome]) -> None:
        for item, result in zip(group, results, strict=True):
            size = item.frame.image.nbytes
            if not isinstance(result, DoesNotFit):
                size += result.mask.nbytes
                for stage in ("preprocess", "inference", "postprocess"):
                    self.seconds[stage] += getattr(result.timings, stage)
            self.segmented.put(_Result(item.job, item.frame, result), size)

    def _settings(self) -> RunSettings:
        """What the controls say, once they do not say to wait."""
        while (settings := self.controls.current()).paused:
            if self.aborted:
                raise Aborted
            self.in_flight.collect_all()
            self.controls.wait_for_change(settings, 0.2)
        return settings

    def _write(self) -> None:
        while not isinstance(item := self.segmented.get(), _AllDone):
            if isinstance(item, _Begin):
                self._write_job(item)

    def _write_job(self, begin: _Begin) -> None:
        job, done, ended = begin.job, 0, False
        try:
            with ExitStack() as sinks:
                for sink in job.sinks:
                    sinks.enter_context(sink)
                while isinstance(item := self.segmented.get(), _Result):
                    self._write_frame(job, item)
                    done += 1
                    if self.on_progress is not None:
                        failed = len(job.source.failures)
                        self.on_progress(RunProgress(begin.number, job.source.name, done + failed, job.source.length))
                ended = True
        except UserError as error:  # one of the job's sinks could not go on, or could not finish its file
            job.cancelled = True
            self.failures.append(Failure(job.source.name, str(error)))
        while not ended:
            ended = not isinstance(self.segmented.get(), _Result)

    def _write_frame(self, job: Job, item: _Result) -> None:
        begin = time.perf_counter()
        try:
            if isinstance(item.result, DoesNotFit):
                raise item.result
            for sink in job.sinks:
                sink.write(item.frame, item.result)
        except UserError as error:
            if job.source.kind == "video":  # a video with a hole in it is not wanted; single images are independent
                raise
            self.failures.append(Failure(str(item.frame.path), str(error)))
            return
        try:
            for sink in self.shared:
                sink.write(item.frame, item.result)
        except UserError as error:
            raise _SharedSinkFailed(error) from error
        self.frames += 1
        self.seconds["write"] += time.perf_counter() - begin


class _SharedSinkFailed(Exception):
    def __init__(self, error: UserError) -> None:
        super().__init__(str(error))
        self.error = error
