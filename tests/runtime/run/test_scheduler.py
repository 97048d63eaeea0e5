"""What a run keeps whatever happens in it: order, completeness, its bound of memory, its number of threads, overlap."""

from __future__ import annotations

import itertools
import os
import random
import signal
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, cast

import numpy as np
import pytest
from scripted_feeds import EndlessFeed

from espmedsam_edge.errors import UserError
from espmedsam_edge.runtime.run import lanes
from espmedsam_edge.runtime.run.controls import Adjustable
from espmedsam_edge.runtime.run.jobs import Job, Limits, RunProgress
from espmedsam_edge.runtime.run.pipeline import run_pipeline
from espmedsam_edge.runtime.segmentation import Segmentation, Timings
from espmedsam_edge.runtime.segmenter import Segmenter
from espmedsam_edge.runtime.sources.live import BackOff, LiveSource
from espmedsam_edge.runtime.sources.source import Failure, SourceFrame

QUICK = BackOff(first=0.001, longest=0.002)


class Memory:
    """Bytes of arrays that are alive, by the garbage collector's word, and the most there ever were."""

    def __init__(self) -> None:
        self.now = self.most = 0
        self._lock = threading.Lock()

    def counted(self, array: Any) -> Any:
        """The array, counted until nobody holds it."""
        self._add(array.nbytes)
        weakref.finalize(array, self._add, -array.nbytes)
        return array

    def _add(self, size: int) -> None:
        with self._lock:
            self.now += size
            self.most = max(self.most, self.now)


class Double:
    """A segmenter without a network: marks where a frame's first pixel is, after ``seconds``; counts its masks."""

    in_flight, image_size = 1, 32
    frame_backend = None
    frame_options = SimpleNamespace(overlay=None)

    def __init__(self, batch: int = 1, seconds: float = 0, memory: Memory | None = None) -> None:
        self.batch, self.seconds, self.memory = batch, seconds, memory or Memory()
        self.on_batch: Callable[[Sequence[Any]], None] = lambda frames: None

    def segment_batch(self, frames: Sequence[Any], threshold: float | None = None) -> list[Segmentation]:
        assert 1 <= len(frames) <= self.batch
        self.on_batch(frames)
        time.sleep(self.seconds)
        return [self._segmented(frame) for frame in frames]

    def _segmented(self, frame: Any) -> Segmentation:
        mask = self.memory.counted(np.full(frame.shape[:2], frame[0, 0, 0], np.uint8))
        return Segmentation(mask, "fundus", np.zeros((8, 8), np.float32), 0.5, Timings(0, 0, 0))


def segmenter(*arguments: Any, **options: Any) -> Segmenter:
    return cast(Segmenter, Double(*arguments, **options))


class Frames:
    """A file of numbered frames of the sizes given; ``broken_at`` ends it with an error."""

    live = False

    def __init__(
        self,
        name: str,
        sizes: Sequence[tuple[int, int]],
        kind: Literal["images", "video"] = "video",
        memory: Memory | None = None,
        broken_at: int | None = None,
        seconds: float = 0,
    ) -> None:
        self.name, self.sizes, self.kind, self.memory = name, sizes, kind, memory or Memory()
        self.files, self.fps = [Path(name)], Fraction(10)
        self.length: int | None = len(sizes)
        self.failures: list[Failure] = []
        self.broken_at, self.seconds = broken_at, seconds
        self.on_read: Callable[[int], None] = lambda index: None

    def __enter__(self) -> Frames:
        if self.broken_at == -1:
            raise UserError(f"{self.name} cannot be opened.")
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def __iter__(self) -> Iterator[SourceFrame]:
        for index in range(len(self.sizes)):
            if index == self.broken_at:
                raise UserError(f"{self.name} is broken.")
            self.on_read(index)
            time.sleep(self.seconds)
            yield self._frame(index)

    def _frame(self, index: int) -> SourceFrame:
        image = self.memory.counted(np.full((*self.sizes[index], 3), index % 256, np.uint8))
        return SourceFrame(image, self.files[0], index, index / 10)


class Sink:
    """Remembers frames' numbers, checks that results are theirs, and fails where it is told to."""

    def __init__(self, seconds: float = 0, failing_at: int | None = None, at_the_end: bool = False) -> None:
        self.seconds, self.failing_at, self.at_the_end = seconds, failing_at, at_the_end
        self.got: list[tuple[str, int]] = []
        self.entered, self.exited = 0, 0
        self.left_by: type[BaseException] | None = None
        self.on_write: Callable[[SourceFrame], None] = lambda frame: None

    def __enter__(self) -> Sink:
        self.entered += 1
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.exited, self.left_by = self.exited + 1, kind
        if self.at_the_end:
            raise UserError("came out incomplete.")

    def write(self, frame: SourceFrame, result: Segmentation) -> None:
        assert self.entered == 1
        assert self.exited == 0
        if frame.index == self.failing_at:
            raise UserError("no space left.")
        assert result.mask.shape == frame.image.shape[:2]
        assert result.mask[0, 0] == frame.image[0, 0, 0]
        self.on_write(frame)
        time.sleep(self.seconds)
        self.got.append((str(frame.path), frame.index))

    @property
    def numbers(self) -> list[int]:
        return [index for _, index in self.got]


class Unmanaged(Sink):
    """A shared sink, which the run does not enter."""

    def __init__(self) -> None:
        super().__init__()
        self.entered = 1


def camera(feed: Any, name: str) -> LiveSource:
    return LiveSource(feed, f"test://{name}", name, QUICK)


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    yield
    assert [thread.name for thread in threading.enumerate() if thread.name.startswith("espmedsam-")] == []


# Whatever the jobs are.


def a_file(chosen: random.Random, name: str, memory: Memory) -> tuple[Frames, Sink]:
    """A file of random frames and its sink; one of them may fail somewhere, and the sink at its end besides."""
    count = chosen.choice([0, 1, 2, 7, 20])
    sizes = [(chosen.randint(1, 60), chosen.randint(1, 60)) for _ in range(count)]
    kind: Literal["images", "video"] = chosen.choice(["images", "video"])
    fault = chosen.choice([None, None, None, "source", "sink"])
    at = chosen.randint(0, count)
    source = Frames(name, sizes, kind, memory, at - 1 if fault == "source" else None, chosen.choice([0, 0, 0.0005]))
    sink = Sink(chosen.choice([0, 0, 0.001]), at if fault == "sink" else None, chosen.random() < 0.1)
    return source, sink


def expected(source: Frames, sink: Sink) -> tuple[list[int], int]:
    """The frames that the sink must have got, and how many failures there must be of the file."""
    read = len(source.sizes) if source.broken_at is None else max(0, source.broken_at)
    numbers, failures = list(range(read)), int(source.broken_at is not None and source.broken_at < len(source.sizes))
    failed = sink.failing_at in numbers
    if failed and source.kind == "video":
        numbers = numbers[: sink.failing_at]
    elif failed and sink.failing_at is not None:
        numbers.remove(sink.failing_at)
    ended = failed and source.kind == "video"  # one failure, whatever else the end brings
    return numbers, failures + failed + (sink.at_the_end and not ended)


@pytest.mark.parametrize("seed", range(60))
def test_any_jobs_are_done_in_order_completely_and_once(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Random files with failing sources and sinks, alone or with cameras, within a bound of few frames or none."""
    chosen, memory = random.Random(seed), Memory()
    monkeypatch.setattr(lanes, "READ_AHEAD_BYTES", chosen.choice([1, 20_000, 60_000, 10**9]))
    double = Double(chosen.choice([1, 1, 2, 3, 5]), chosen.choice([0, 0, 0.0005]), memory)
    files = [a_file(chosen, f"f{number}", memory) for number in range(chosen.randint(0, 12))]
    cameras = [(camera(EndlessFeed(), f"c{number}"), Sink()) for number in range(chosen.choice([0, 0, 1, 3]))]
    shared, progress = Unmanaged(), list[RunProgress]()
    jobs = [Job(source, [sink]) for source, sink in [*files, *cameras]]
    chosen.shuffle(jobs)
    report = run_pipeline(cast(Segmenter, double), jobs, [shared], progress.append, limits=Limits(frames=25))
    for source, sink in files:
        numbers, failures = expected(source, sink)
        assert sink.numbers == numbers
        assert (sink.entered, sink.exited) == (1, 1)
        assert [index for name, index in shared.got if name == source.name] == numbers
        assert sum(failure.name == source.name for failure in report.failures) == failures
        steps = [step.done for step in progress if step.name == source.name]
        assert steps == list(range(1, len(steps) + 1))
    for live, sink in cameras:
        assert len(sink.numbers) == 25
        assert sink.numbers == sorted(set(sink.numbers))
        assert [index for name, index in shared.got if name == str(live.files[0])] == sink.numbers
    assert len(shared.got) == len(set(shared.got)) == report.frames
    names = [job.source.name for job in jobs]
    of_files = [name for name, _ in shared.got if name.startswith("f")]
    assert of_files == sorted(of_files, key=names.index)  # one file after the other


@pytest.mark.parametrize("seed", range(30))
def test_ctrl_c_at_any_moment_leaves_whole_files_and_finished_recordings(seed: int) -> None:
    chosen, memory = random.Random(1000 + seed), Memory()
    double = Double(chosen.choice([1, 1, 3]), chosen.choice([0, 0.0005]), memory)
    files = [
        (Frames(f"f{number}", [(8, 8)] * chosen.choice([0, 1, 9, 30]), memory=memory), Sink(chosen.choice([0, 0.001])))
        for number in range(chosen.randint(1, 9))
    ]
    cameras = [(camera(EndlessFeed(), f"c{number}"), Sink()) for number in range(chosen.choice([0, 1, 2]))]
    jobs = [Job(source, [sink]) for source, sink in [*files, *cameras]]
    pressed_at, steps = chosen.randint(1, 60), itertools.count(1)

    def press(progress: RunProgress) -> None:
        if next(steps) == pressed_at:
            os.kill(os.getpid(), signal.SIGINT)

    try:
        report = run_pipeline(cast(Segmenter, double), jobs, on_progress=press)
    except KeyboardInterrupt:
        assert cameras == []
    else:
        assert report.interrupted == bool(cameras)
        assert report.frames == sum(len(sink.got) for _, sink in [*files, *cameras])
    for source, sink in files:
        assert sink.numbers == list(range(len(sink.numbers)))
        assert sink.entered == sink.exited
        if sink.exited and sink.left_by is None:
            assert len(sink.numbers) == len(source.sizes)
    for _, sink in cameras:
        assert sink.left_by is None
        assert sink.exited == 1
        assert sink.numbers == sorted(set(sink.numbers))
    assert memory.now == 0


# Memory.


class BigFeed(EndlessFeed):
    """A camera whose frames are counted."""

    def __init__(self, side: int, memory: Memory) -> None:
        super().__init__()
        self.side, self.memory = side, memory

    def read(self) -> Any:
        if self.stopped:
            return None
        self.count += 1
        return self.memory.counted(np.full((self.side, self.side, 3), self.count % 256, np.uint8))


@pytest.mark.parametrize("fast", ["reading", "segmenting", "writing"])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("frames", [1, 2, 5, 9])
def test_files_hold_no_more_than_the_bound(batch: int, frames: int, fast: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """``frames`` fit; the arrays that are alive are counted, whatever the run believes."""
    side = 64
    bound = frames * (4 * side * side + 256)  # a frame, its mask, its logits
    monkeypatch.setattr(lanes, "READ_AHEAD_BYTES", bound)
    memory = Memory()
    pause = {stage: 0.0 if stage == fast else 0.0005 for stage in ("reading", "segmenting", "writing")}
    sinks = [Sink(pause["writing"]) for _ in range(4)]
    jobs = [
        Job(Frames(f"f{number}", [(side, side)] * 15, memory=memory, seconds=pause["reading"]), [sink])
        for number, sink in enumerate(sinks)
    ]
    run_pipeline(segmenter(batch, pause["segmenting"], memory), jobs)
    assert [sink.numbers for sink in sinks] == [list(range(15))] * 4
    assert memory.most <= bound + (batch + 1) * 4 * side * side  # what two threads have just finished with
    assert memory.now == 0


@pytest.mark.parametrize("batch", [1, 3])
def test_nothing_is_held_while_a_run_waits_for_its_source(batch: int) -> None:
    memory, source, waited = Memory(), Frames("f", [(64, 64)] * 7), list[int]()
    source.memory = memory

    def wait(index: int) -> None:
        until = time.monotonic() + 10
        while index % batch == 0 and memory.now and time.monotonic() < until:
            time.sleep(0.001)
        waited.append(memory.now if index % batch == 0 else 0)

    source.on_read = wait
    run_pipeline(segmenter(batch, memory=memory), [Job(source, [Sink()])])
    assert waited == [0] * 7


def test_a_frame_above_the_bound_goes_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lanes, "READ_AHEAD_BYTES", 1000)
    memory, sink = Memory(), Sink()
    run_pipeline(segmenter(4, memory=memory), [Job(Frames("f", [(64, 64)] * 10, memory=memory), [sink])])
    assert sink.numbers == list(range(10))
    assert memory.most <= 3 * 4 * 64 * 64  # one, and what two threads have just finished with


def test_cameras_and_files_together_hold_no_more_than_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files with slow sinks and four cameras, of which three have a sink that hangs until the files are done.

    The bound is ten frames with their masks, half of them the cameras'.
    """
    side = 64
    image = 3 * side * side
    monkeypatch.setattr(lanes, "READ_AHEAD_BYTES", 10 * (image + side * side + 256))
    of_files, of_cameras, let_go = Memory(), Memory(), threading.Event()
    files, seen, hanging = [Sink(0.002) for _ in range(3)], Sink(), [Sink() for _ in range(3)]
    feeds = [BigFeed(side, of_cameras) for _ in range(4)]

    def hang(frame: SourceFrame) -> None:
        assert let_go.wait(60)

    for sink in hanging:
        sink.on_write = hang

    def stop(progress: RunProgress) -> None:
        if (progress.name, progress.done) == ("f2", 20):
            let_go.set()
            for feed in feeds:
                feed.stopped = True

    jobs = [
        Job(camera(feed, f"c{n}"), [sink]) for n, (feed, sink) in enumerate(zip(feeds, [seen, *hanging], strict=True))
    ]
    jobs += [Job(Frames(f"f{n}", [(side, side)] * 20, memory=of_files), [sink]) for n, sink in enumerate(files)]
    run_pipeline(segmenter(), jobs, on_progress=stop)
    assert [sink.numbers for sink in files] == [list(range(20))] * 3
    assert len(seen.got) > 10
    assert of_files.most <= (5 + 2) * image  # two threads may have just finished with one
    assert of_cameras.most <= (5 + 5 + 4 * 2) * image  # as five may here; each camera's newest frame, the one it reads


def test_forty_full_hd_clips_and_a_camera_stay_small() -> None:
    """Four frames of each clip and a slow disk: four to segment and four to write, one in each of the two threads."""
    memory, size = Memory(), (1080, 1920)
    feed, sinks = EndlessFeed(), [Sink(0.002) for _ in range(40)]

    def stop(progress: RunProgress) -> None:
        feed.stopped = feed.stopped or (progress.name, progress.done) == ("f39", 4)

    jobs = [Job(Frames(f"f{n}", [size] * 4, memory=memory), [sink]) for n, sink in enumerate(sinks)]
    run_pipeline(segmenter(memory=memory), [Job(camera(feed, "c"), [Sink()]), *jobs], on_progress=stop)
    assert [sink.numbers for sink in sinks] == [[0, 1, 2, 3]] * 40
    of_the_camera = 4 * 16 * 20
    assert memory.most <= (10 + 2) * 4 * 1080 * 1920 + of_the_camera  # two threads may have just finished with one


# Threads.


def test_one_camera_and_forty_files_need_seven_threads() -> None:
    """The run's own, one that segments, two for all files, three for a camera: it is opened, read and written."""
    names, most = set[str](), 0

    def look(frame: SourceFrame) -> None:
        nonlocal most
        found = [thread.name for thread in threading.enumerate() if thread.name.startswith("espmedsam-")]
        names.update(found)
        most = max(most, len(found))

    feed, sinks = EndlessFeed(), [Sink() for _ in range(40)]
    for sink in sinks:
        sink.on_write = look

    def stop(progress: RunProgress) -> None:
        feed.stopped = feed.stopped or progress.name == "f39"

    jobs = [Job(Frames(f"f{n}", [(16, 20)] * 4), [sink]) for n, sink in enumerate(sinks)]
    run_pipeline(segmenter(), [Job(camera(feed, "c"), [Sink()]), *jobs], on_progress=stop)
    assert [sink.numbers for sink in sinks] == [[0, 1, 2, 3]] * 40
    assert most == 7, names


# Who waits for whom.


def test_reading_segmenting_and_writing_go_on_at_the_same_time() -> None:
    """Frame n is written while n + 1 is segmented and n + 2 read: the three meet, or the barrier breaks."""
    meet, rounds = threading.Barrier(3), 20
    double, source, sink = Double(), Frames("f", [(8, 8)] * (rounds + 2)), Sink()

    def at(index: int, first: int) -> None:
        if first <= index < first + rounds:
            meet.wait(20)

    source.on_read = lambda index: at(index, 2)
    double.on_batch = lambda frames: at(int(frames[0][0, 0, 0]), 1)
    sink.on_write = lambda frame: at(frame.index, 0)
    run_pipeline(cast(Segmenter, double), [Job(source, [sink])])
    assert sink.numbers == list(range(rounds + 2))


def test_a_file_is_read_while_the_one_before_is_finished() -> None:
    first, second, begun = Sink(), Frames("b", [(8, 8)] * 3), threading.Event()

    class Finishing(Sink):
        def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
            super().__exit__(kind)
            assert begun.wait(20)

    first = Finishing()
    second.on_read = lambda index: begun.set()
    run_pipeline(segmenter(), [Job(Frames("a", [(8, 8)] * 3), [first]), Job(second, [Sink()])])
    assert first.exited == 1


@pytest.mark.parametrize("bound", [1, lanes.READ_AHEAD_BYTES])
def test_a_files_hanging_sink_holds_no_camera_up(bound: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file's first result is written only when the camera has had fifty, whatever the files hold."""
    monkeypatch.setattr(lanes, "READ_AHEAD_BYTES", bound)
    let_go, feed, slow, live = threading.Event(), EndlessFeed(), Sink(), Sink()

    def count(frame: SourceFrame) -> None:
        if len(live.got) == 50:
            feed.stopped = True
            let_go.set()

    def hang(frame: SourceFrame) -> None:
        assert let_go.wait(60)

    live.on_write, slow.on_write = count, hang
    run_pipeline(segmenter(4), [Job(Frames("f", [(16, 20)] * 30), [slow]), Job(camera(feed, "c"), [live])])
    assert slow.numbers == list(range(30))


@pytest.mark.parametrize("bound", [1, lanes.READ_AHEAD_BYTES])
def test_a_cameras_hanging_sink_holds_no_file_and_no_camera_up(bound: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The segmenter takes no more of that camera than the sink has in hand and two more."""
    monkeypatch.setattr(lanes, "READ_AHEAD_BYTES", bound)
    let_go, feeds, double = threading.Event(), [BigFeed(10, Memory()), EndlessFeed()], Double(2)
    hanging, live, sinks, taken = Sink(), Sink(), [Sink() for _ in range(3)], list[int]()

    def count(frames: Sequence[Any]) -> None:
        taken.extend(len(frame) for frame in frames if len(frame) == 10 and not let_go.is_set())

    def hang(frame: SourceFrame) -> None:
        assert let_go.wait(60)

    double.on_batch, hanging.on_write = count, hang

    def stop(progress: RunProgress) -> None:
        if all(len(sink.got) == 20 for sink in sinks) and len(live.got) > 20 and taken:
            let_go.set()
            for feed in feeds:
                feed.stopped = True

    jobs = [Job(camera(feeds[0], "a"), [hanging]), Job(camera(feeds[1], "b"), [live])]
    jobs += [Job(Frames(f"f{n}", [(16, 20)] * 20), [sink]) for n, sink in enumerate(sinks)]
    run_pipeline(cast(Segmenter, double), jobs, on_progress=stop)
    assert [sink.numbers for sink in sinks] == [list(range(20))] * 3
    assert 1 <= len(taken) <= (1 if bound == 1 else 3)


def test_a_pause_and_a_limit_of_time_hold_for_files_too() -> None:
    """A paused run of files that may go on for a moment ends, with what was read until then."""
    controls, sink = Adjustable(), Sink()
    controls.change(paused=True)
    run_pipeline(segmenter(), [Job(Frames("f", [(8, 8)] * 100), [sink])], controls=controls, limits=Limits(seconds=0.1))
    assert sink.numbers == list(range(len(sink.numbers)))
    assert 0 < len(sink.numbers) < 100


def test_after_a_video_failed_its_other_frames_are_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of it stays in memory, or in the way of the next file."""
    memory, failing, good = Memory(), Sink(failing_at=0), Sink()
    source = Frames("a", [(64, 64)] * 1000, memory=memory)
    run_pipeline(segmenter(memory=memory), [Job(source, [failing]), Job(Frames("b", [(8, 8)] * 9), [good])])
    assert good.numbers == list(range(9))
    assert memory.now == 0
    assert failing.numbers == []
