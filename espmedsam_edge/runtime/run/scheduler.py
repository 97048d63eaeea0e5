"""Reading, segmenting and writing at the same time, for files, live sources and both together.

A thread reads the files and one writes their results; each live source has a thread of each kind for itself. Between
them a single thread takes frames from the lanes in turn, as many as the graph's batch holds, and segments them. No
number of files adds a thread, and no sink holds up another lane's.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial

from espmedsam_edge.errors import UserError
from espmedsam_edge.runtime.run import lanes
from espmedsam_edge.runtime.run.controls import Controls
from espmedsam_edge.runtime.run.in_flight import InFlight, Outcome
from espmedsam_edge.runtime.run.jobs import STAGES, Job, Limits, RunProgress, RunReport
from espmedsam_edge.runtime.run.lanes import Allowance, FileLane, Item, JobState, Lane, LiveLane
from espmedsam_edge.runtime.run.threads import ThreadGroup
from espmedsam_edge.runtime.segmentation import NotFinite
from espmedsam_edge.runtime.segmenter import Segmenter
from espmedsam_edge.runtime.sinks.background import BackgroundSink
from espmedsam_edge.runtime.sinks.sink import Sink, Tally
from espmedsam_edge.runtime.sources.source import Failure, SourceFrame

log = logging.getLogger(__name__)

NEXT_FRAME_SECONDS = 0.001
"""How long frames on a GPU wait for another one of a file to overlap with."""

_PAUSE_SECONDS = 0.2  # at most, between two looks at whether a paused run has to end


class Aborted(Exception):
    """The run is given up, or a job of it; sinks that are left by it do not keep what is not finished."""


class Run:
    """See ``pipeline.run_pipeline``, whose arguments these are."""

    def __init__(
        self,
        segmenter: Segmenter,
        jobs: Sequence[Job],
        shared: Sequence[Sink],
        on_progress: Callable[[RunProgress], None] | None,
        controls: Controls,
        limits: Limits,
        segmenter_of: Callable[[str], Segmenter] | None = None,
    ) -> None:
        self.segmenter, self.shared, self.on_progress = segmenter, shared, on_progress
        self.controls, self.limits = controls, limits
        self.states = [JobState(number, job) for number, job in enumerate(jobs)]
        files = [state for state in self.states if not state.job.source.live]
        live = [state for state in self.states if state.job.source.live]
        share = lanes.READ_AHEAD_BYTES // (2 if files and live else 1)
        self.files = FileLane(files, Allowance(share), segmenter.batch, lambda: self.in_flight.away)
        self.size_of = partial(lanes.size_of, segmenter=segmenter)
        of_all = Allowance(share)
        self.live = [LiveLane(state, of_all, self._enough, self.size_of, limits.max_latency) for state in live]
        self.in_turn: deque[Lane] = deque([*self.live, *([self.files] if files else [])])
        self.seconds = dict.fromkeys(STAGES, 0.0)
        self.failures: list[Failure] = []
        self.error: BaseException | None = None
        self.changed = threading.Condition()
        self.sharing = threading.Lock()  # shared sinks are called by one lane at a time
        self.stopping = self.aborted = False  # read no more, finish what there is; drop everything
        self.deadline: float | None = None
        self.in_flight: InFlight[Item] = InFlight(segmenter, self._segmented, segmenter_of, self._comes_anew)

    def run(self, stop: threading.Event | None = None) -> RunReport:
        """Run until every source has ended, a limit is reached, or Ctrl-C or ``stop``."""
        begin = time.perf_counter()
        work: list[tuple[str, Callable[[], None]]] = [("infer", self._infer)]
        if self.files.states:
            work += [("read", self._read_files), ("write", partial(self._write, self.files))]
        for lane in self.live:
            work += [("capture", partial(self._capture, lane)), ("write", partial(self._write, lane))]
        threads = ThreadGroup([(name, partial(self._guarded, stage)) for name, stage in work])
        interrupted = False
        try:
            threads.start()
            try:
                threads.wait(stop)
            except KeyboardInterrupt:
                if not self.live and not any(state.interrupt() for state in self.files.states):
                    raise
                interrupted = True
                self._stop()
                threads.wait(leave="read")
        except BaseException:
            self._abort()
            threads.wait(leave="read")
            raise
        finally:
            self._clear()
        if self.error is not None:
            raise self.error
        frames = sum(state.written for state in self.states)
        told = [lanes.live_report(lane) for lane in self.live]
        cut = any(state.cut for state in self.states)
        return RunReport(frames, self.failures, time.perf_counter() - begin, self.seconds, told, interrupted, cut)

    def _guarded(self, stage: Callable[[], None]) -> None:
        """Run a stage in its thread; its error, whatever it is, ends the run and is raised in the calling thread."""
        try:
            stage()
        except Aborted:
            pass
        except BaseException as error:  # noqa: BLE001 (nothing is swallowed: run() raises it again)
            self._fail(error)

    # Ends and waits.

    def _fail(self, error: BaseException) -> None:
        self.error = self.error or error
        self._abort()

    def _abort(self) -> None:
        self.aborted = True
        for state in self.files.states:
            state.interrupt()
        self._tell()

    def _clear(self) -> None:
        """Let go of the frames of a run that was given up."""
        for lane in self.in_turn:
            lane.clear()

    def _tell(self) -> None:
        with self.changed:
            self.changed.notify_all()

    def _stop(self) -> None:
        """After Ctrl-C: live sources and pipes end, files are cut off and their unfinished outputs are not kept."""
        with self.changed:
            self.stopping = True
            for state in self.files.states:
                if not state.read_out and not state.interrupt():
                    state.cut = True
                    self.files.drop(state)
            self.changed.notify_all()

    def _failed(self, state: JobState, error: UserError) -> None:
        state.job.failed = True
        self.failures.append(Failure(state.job.source.name, str(error)))

    def _ending(self) -> bool:
        """Whether to read no more."""
        return self.stopping or (self.deadline is not None and time.monotonic() >= self.deadline)

    def _enough(self, state: JobState) -> bool:
        """Whether no more of a job's frames are wanted."""
        return self._ending() or state.dropped or state.taken == self.limits.frames or self._in_vain(state)

    def _in_vain(self, state: JobState) -> bool:
        """Whether all that would take the job's results has failed."""
        sinks = [sink for sink in (*state.job.sinks, *self.shared) if not isinstance(sink, Tally)]
        return bool(sinks) and all(isinstance(sink, BackgroundSink) and sink.failed for sink in sinks)

    def _wait(self, condition: Callable[[], bool], seconds: float | None = None) -> None:
        """Wait, holding ``changed``, for a condition, which the end of reading may make true, or some seconds.

        Raises:
            Aborted: the run was aborted.
        """
        until = None if seconds is None else time.monotonic() + seconds
        while not self.aborted and not condition():
            now = time.monotonic()
            if until is not None and now >= until:
                break
            ends = [end for end in (until, self.deadline) if end is not None and end > now]
            self.changed.wait(min(*ends, now + 3600) - now if ends else None)  # no platform waits for 1e300 s
        if self.aborted:
            raise Aborted

    # Reading.

    def _read_files(self) -> None:
        for state in self.files.states:
            try:
                if not self._ending():
                    self._read_file(state)
            finally:
                self._read_to_the_end(state)

    def _read_file(self, state: JobState) -> None:
        source = state.job.source
        try:
            with source:
                self._opened(state)
                frames = iter(source)
                while self._more_wanted(state):
                    begin = time.perf_counter()
                    frame = next(frames, None)
                    self.seconds["decode"] += time.perf_counter() - begin
                    if frame is None:
                        break
                    with self.changed:
                        if not state.dropped:
                            self.files.pending.append(self.files.hold(state, frame, self.size_of(frame)))
                            state.taken += 1
                        self.changed.notify_all()
                    del frame  # not held while waiting to read the next
        except UserError as error:
            self._failed(state, error)
        self.failures += source.failures

    def _more_wanted(self, state: JobState) -> bool:
        """Wait until one more frame may be read; False: none is wanted."""
        with self.changed:
            self._wait(lambda: self._enough(state) or self.files.may_read())
            return not self._enough(state)

    def _capture(self, lane: LiveLane) -> None:
        state, source = lane.state, lane.source
        try:
            with source:
                source.listen(self._tell)
                self._opened(state)
                with self.changed:
                    self._wait(lambda: self._enough(state) or (source.finished and not source.waiting))
        except UserError as error:
            self._failed(state, error)
        finally:
            self._read_to_the_end(state)
        self.failures += source.failures

    def _opened(self, state: JobState) -> None:
        with self.changed:
            state.opened = True
            if self.deadline is None and self.limits.seconds is not None:
                self.deadline = time.monotonic() + self.limits.seconds
            self.changed.notify_all()

    def _read_to_the_end(self, state: JobState) -> None:
        with self.changed:
            state.read_out = True
            self.changed.notify_all()

    # Segmenting.

    def _infer(self) -> None:
        while self._frames_come():
            settings = self.controls.current()
            if settings.paused and not self._ending():
                self.in_flight.collect_all()
                self.controls.wait_for_change(settings, _PAUSE_SECONDS)
                continue
            group = self._next_group()
            if group:
                self.in_flight.segment(group, [item.frame.segmented for item in group], settings, group[0].modality)
            del group  # not held while waiting for the next

    def _frames_come(self) -> bool:
        """Wait until a frame can be segmented, taking back meanwhile what is under way; False: none will come.

        A live frame that is new now may come late: it waits for none to overlap with, unless a file's is on its way.
        """
        while True:
            with self.changed:
                seconds = None if not self.in_flight else NEXT_FRAME_SECONDS if self.files.lacks_frames else 0.0
                self._wait(lambda: self._ready() or self._over(), seconds)
                if self._ready():
                    return True
                if not self.in_flight and self._over():
                    return False
            if self.in_flight:
                self.in_flight.collect()

    def _ready(self) -> bool:
        return any(lane.ready() for lane in self.in_turn)

    def _over(self) -> bool:
        return all(lane.over() for lane in self.in_turn)

    def _comes_anew(self) -> bool:
        """Whether there will be newer frames than those that cannot be segmented now."""
        return not self._ending() and any(not lane.over() for lane in self.live)

    def _next_group(self) -> list[Item]:
        """Frames of the lanes in turn, at most a batch."""
        group: list[Item] = []
        with self.changed:
            passed = 0  # lanes in a row that had nothing
            while len(group) < self.segmenter.batch and passed < len(self.in_turn):
                item = self.in_turn[0].take(group)
                self.in_turn.rotate(-1)
                passed = 0 if item is not None else passed + 1
                if item is not None:
                    group.append(item)
            self.changed.notify_all()
        return group

    def _segmented(self, group: Sequence[Item], outcomes: Sequence[Outcome]) -> None:
        if self.in_flight.away:
            with self.changed:
                lanes.take_back(group)
                self._wait(self._ending, _PAUSE_SECONDS)
            return
        least, pairs = self.limits.min_confidence, zip(group, outcomes, strict=True)
        outcomes = [lanes.of_the_whole(item.frame, outcome, least) for item, outcome in pairs]
        with self.changed:
            for item, outcome in zip(group, outcomes, strict=True):
                if not isinstance(outcome, UserError):
                    for stage in ("preprocess", "inference", "postprocess"):
                        self.seconds[stage] += getattr(outcome.timings, stage)
                    if item.frame.captured is not None:
                        item.state.latencies.append(time.monotonic() - item.frame.captured)
                item.lane.segmented(item, outcome)
            self.changed.notify_all()

    # Writing.

    def _write(self, lane: Lane) -> None:
        for state in lane.states:
            self._write_job(lane, state)

    def _write_job(self, lane: Lane, state: JobState) -> None:
        """Write a job's results; what fails of its own sinks ends that job alone."""
        try:
            with self.changed:
                self._wait(lambda: state.opened or state.read_out)
            with ExitStack() as sinks:
                for sink in state.job.sinks:
                    sinks.enter_context(sink)
                while self._write_next(lane, state):
                    pass
                if state.cut:
                    raise Aborted
        except UserError as error:  # one of the job's sinks could not go on, or could not finish its file
            with self.changed:
                state.job.cancelled = True
                self._failed(state, error)
                lane.drop(state)
                self.changed.notify_all()
        except Aborted:
            if self.aborted:
                raise

    def _write_next(self, lane: Lane, state: JobState) -> bool:
        """Wait for the job's next result and write it; False: there is none any more."""
        with self.changed:
            self._wait(lambda: lane.result_of(state) or state.cut or (state.read_out and not state.held))
            if state.cut or not lane.result_of(state):
                return False
            item = lane.results.popleft()
            self.changed.notify_all()
        try:
            self._write_result(state, item.frame, item.outcome)
        finally:
            with self.changed:
                lane.let_go(item)
                self.changed.notify_all()
        return True

    def _write_result(self, state: JobState, frame: SourceFrame, outcome: Outcome | None) -> None:
        if lanes.too_old(frame, self.limits.max_latency):
            state.refused += 1
            return
        if isinstance(outcome, NotFinite) and state.job.source.live:  # there is a next one
            state.failed += 1
            if state.failed == 1:
                log.warning("%s: a frame is left out: %s", state.job.source.name, outcome)
            return
        begin = time.perf_counter()
        state.done += 1
        try:
            self._write_frame(state, frame, outcome)
            state.written += 1
        except UserError as error:
            if state.job.source.kind == "video":  # with a hole in it it is not wanted; single images are independent
                raise
            with self.changed:
                self.failures.append(Failure(str(frame.path), str(error)))
        with self.changed:
            self.seconds["write"] += time.perf_counter() - begin
        if self.on_progress is not None:
            source = state.job.source
            done = state.done + len(source.failures)
            self.on_progress(RunProgress(state.number, source.name, done, source.length, source.live))

    def _write_frame(self, state: JobState, frame: SourceFrame, outcome: Outcome | None) -> None:
        if isinstance(outcome, NotFinite):
            raise NotFinite(f"{frame.path}: {outcome.message}", outcome.hint)
        if outcome is None or isinstance(outcome, UserError):
            raise outcome or RuntimeError("a frame that was not segmented")
        outcome = state.job.taken(frame, outcome)
        with self.sharing:
            try:
                for sink in self.shared:
                    sink.write(frame, outcome)
            except UserError as error:
                self._fail(error)
                raise Aborted from error
