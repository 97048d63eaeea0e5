"""Order, completeness, clean ends: the pipeline with sources and sinks that misbehave in every way."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from toy_bundles import save_toy_bundle

from espmedsam_edge.bundle import Bundle
from espmedsam_edge.errors import UserError
from espmedsam_edge.runtime.run.controls import Adjustable, RunSettings
from espmedsam_edge.runtime.run.jobs import STAGES, Job, RunProgress
from espmedsam_edge.runtime.run.pipeline import run_pipeline
from espmedsam_edge.runtime.segmentation import Segmentation
from espmedsam_edge.runtime.segmenter import Segmenter
from espmedsam_edge.runtime.sources.source import Failure, SourceFrame


class Scripted:
    """A source of frames whose first pixel is their number; ``failing_at`` raises there."""

    live = False

    def __init__(
        self,
        name: str,
        count: int,
        kind: Literal["images", "video"] = "video",
        failing_at: int | None = None,
        error: BaseException | None = None,
    ) -> None:
        self.name, self.count, self.kind = name, count, kind
        self.files = [Path(name)]
        self.fps = Fraction(10) if kind == "video" else None
        self.length: int | None = count
        self.failures: list[Failure] = []
        self.failing_at, self.error = failing_at, error
        self.given = 0
        self.closed = False

    def __enter__(self) -> Scripted:
        return self

    def __exit__(self, *_: object) -> None:
        self.closed = True

    def __iter__(self) -> Iterator[SourceFrame]:
        for index in range(self.count):
            if index == self.failing_at and self.error is not None:
                raise self.error
            image = np.full((8, 12, 3), index % 256, np.uint8)
            self.given += 1
            yield SourceFrame(image, Path(self.name), index, index / 10)


class Recording:
    """A sink that remembers what it got and how it ended."""

    def __init__(self, failing_at: int | None = None, error: BaseException | None = None, seconds: float = 0) -> None:
        self.got: list[tuple[str, int, int]] = []
        self.failing_at, self.error, self.seconds = failing_at, error, seconds
        self.ended: type[BaseException] | Literal["never"] | None = "never"

    def __enter__(self) -> Recording:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.ended = kind

    def write(self, frame: SourceFrame, result: Segmentation) -> None:
        if frame.index == self.failing_at and self.error is not None:
            raise self.error
        time.sleep(self.seconds)
        assert result.mask.shape == frame.image.shape[:2]
        self.got.append((str(frame.path), frame.index, int(frame.image[0, 0, 0])))


@pytest.fixture
def segmenter(toy_bundle: Bundle) -> Iterator[Segmenter]:
    with Segmenter.load(toy_bundle, threads=1) as loaded:
        yield loaded


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    yield
    assert [thread.name for thread in threading.enumerate() if thread.name.startswith("espmedsam-")] == []


def expected(name: str, count: int) -> list[tuple[str, int, int]]:
    return [(name, index, index % 256) for index in range(count)]


def test_every_frame_arrives_once_and_in_order(segmenter: Segmenter) -> None:
    sinks = [Recording(), Recording(), Recording()]
    shared = Recording()
    counts = (30, 0, 7)
    jobs = [Job(Scripted(f"s{n}", count), [sink]) for n, (count, sink) in enumerate(zip(counts, sinks, strict=True))]
    progress: list[RunProgress] = []
    report = run_pipeline(segmenter, jobs, [shared], progress.append)
    assert report.frames == 37
    assert report.failures == []
    for number, (sink, count) in enumerate(zip(sinks, counts, strict=True)):
        assert sink.got == expected(f"s{number}", count)
        assert sink.ended is None
    assert shared.got == expected("s0", 30) + expected("s2", 7)
    assert shared.ended == "never"  # its owner ends it
    assert [(step.job, step.done) for step in progress] == [(0, n + 1) for n in range(30)] + [
        (2, n + 1) for n in range(7)
    ]
    assert progress[0].expected == 30
    assert set(report.stage_seconds) == set(STAGES)
    assert 0 < report.stage_seconds["inference"] < report.seconds


@pytest.mark.parametrize("slow", ["sink", "source", "neither"])
def test_a_slow_stage_drops_nothing(segmenter: Segmenter, slow: str) -> None:
    class Slow(Scripted):
        def __iter__(self) -> Iterator[SourceFrame]:
            for frame in super().__iter__():
                time.sleep(0.004 if slow == "source" else 0)
                yield frame

    sink = Recording(seconds=0.004 if slow == "sink" else 0)
    report = run_pipeline(segmenter, [Job(Slow("s", 40), [sink])])
    assert sink.got == expected("s", 40)
    assert report.frames == 40


def test_capture_never_runs_far_ahead(segmenter: Segmenter) -> None:
    source = Scripted("s", 200)
    ahead: list[int] = []

    class Watching(Recording):
        def write(self, frame: SourceFrame, result: Segmentation) -> None:
            super().write(frame, result)
            time.sleep(0.002)
            ahead.append(source.given - frame.index)

    run_pipeline(segmenter, [Job(source, [Watching()])])
    assert max(ahead) <= 4 + 4 + 4  # two queues and what each stage holds


def test_batches_are_filled_and_never_span_jobs(tmp_path: Path) -> None:
    sinks = [Recording(), Recording()]
    with Segmenter.load(save_toy_bundle(tmp_path / "b", batch=4), threads=1) as segmenter:
        groups: list[int] = []
        original = segmenter.segment_batch

        def counted(frames: Any) -> list[Segmentation]:
            groups.append(len(frames))
            return original(frames)

        segmenter.segment_batch = counted  # type: ignore[method-assign]
        run_pipeline(segmenter, [Job(Scripted(f"s{n}", 10), [sink]) for n, sink in enumerate(sinks)])
    assert groups == [4, 4, 2, 4, 4, 2]
    assert [sink.got for sink in sinks] == [expected("s0", 10), expected("s1", 10)]


def test_a_source_that_breaks_off_keeps_its_frames_and_the_next_is_done(segmenter: Segmenter) -> None:
    broken = Scripted("broken", 20, failing_at=5, error=UserError("the cable is out.", "Plug it in."))
    sinks = [Recording(), Recording()]
    report = run_pipeline(segmenter, [Job(broken, [sinks[0]]), Job(Scripted("good", 3), [sinks[1]])])
    assert sinks[0].got == expected("broken", 5)
    assert sinks[0].ended is None  # what there is, is finished
    assert sinks[1].got == expected("good", 3)
    assert [(failure.name, failure.message) for failure in report.failures] == [
        ("broken", "the cable is out. Plug it in.")
    ]


def test_a_source_that_cannot_open_is_a_failure(segmenter: Segmenter) -> None:
    class Shut(Scripted):
        def __enter__(self) -> Shut:
            raise UserError("cannot open.")

    sink = Recording()
    report = run_pipeline(segmenter, [Job(Shut("shut", 5), []), Job(Scripted("good", 3), [sink])])
    assert [failure.name for failure in report.failures] == ["shut"]
    assert report.frames == 3


def test_a_videos_failing_sink_ends_that_job_only(segmenter: Segmenter) -> None:
    failing = Recording(failing_at=3, error=UserError("no space left."))
    source = Scripted("long", 5000)
    good = Recording()
    report = run_pipeline(segmenter, [Job(source, [failing]), Job(Scripted("good", 4), [good])])
    assert failing.ended is UserError  # told, so that it removes what it began
    assert source.given < 100  # the rest was not decoded for nothing
    assert source.closed
    assert good.got == expected("good", 4)
    assert [failure.message for failure in report.failures] == ["no space left."]


def test_one_image_that_cannot_be_written_does_not_stop_the_others(segmenter: Segmenter) -> None:
    failing = Recording(failing_at=3, error=UserError("may not write."))
    report = run_pipeline(segmenter, [Job(Scripted("folder", 6, kind="images"), [failing])])
    assert [index for _, index, _ in failing.got] == [0, 1, 2, 4, 5]
    assert report.frames == 5
    assert len(report.failures) == 1


def test_a_sink_that_cannot_finish_is_a_failure(segmenter: Segmenter) -> None:
    class Unfinished(Recording):
        def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
            raise UserError("came out incomplete.")

    good = Recording()
    report = run_pipeline(segmenter, [Job(Scripted("a", 3), [Unfinished()]), Job(Scripted("b", 3), [good])])
    assert [failure.message for failure in report.failures] == ["came out incomplete."]
    assert good.got == expected("b", 3)


def test_a_failing_shared_sink_ends_the_run(segmenter: Segmenter) -> None:
    sink = Recording()
    shared = Recording(failing_at=3, error=UserError("no space left."))
    with pytest.raises(UserError, match="no space left"):
        run_pipeline(segmenter, [Job(Scripted("s", 5000), [sink])], [shared])
    assert sink.ended is not None
    assert sink.ended != "never"


class Bug(Exception):
    pass


@pytest.mark.parametrize("stage", ["capture", "infer", "write", "progress"])
@pytest.mark.parametrize("at", [0, 3, 30])
def test_a_bug_in_any_stage_stops_all_and_comes_out(
    segmenter: Segmenter, monkeypatch: pytest.MonkeyPatch, stage: str, at: int
) -> None:
    source = Scripted("s", 5000, failing_at=at if stage == "capture" else None, error=Bug())
    sink = Recording(failing_at=at if stage == "write" else None, error=Bug())
    if stage == "infer":
        original, calls = segmenter.segment_batch, iter(range(5000))

        def failing(frames: Any) -> list[Segmentation]:
            if next(calls) == at:
                raise Bug
            return original(frames)

        monkeypatch.setattr(segmenter, "segment_batch", failing)

    def on_progress(progress: RunProgress) -> None:
        if stage == "progress" and progress.done > at:
            raise Bug

    with pytest.raises(Bug):
        run_pipeline(segmenter, [Job(source, [sink])], on_progress=on_progress)
    assert source.closed
    assert sink.ended is not None  # told of the error, or never begun
    assert source.given < at + 100


@pytest.mark.parametrize("at", [0, 5, 60])
@pytest.mark.parametrize("stage", ["capture", "write"])
def test_ctrl_c_stops_all_stages(segmenter: Segmenter, stage: str, at: int) -> None:
    """The signal comes while the stages are busy; Python delivers it to the waiting main thread."""

    class Interrupting(Scripted):
        def __iter__(self) -> Iterator[SourceFrame]:
            for frame in super().__iter__():
                if stage == "capture" and frame.index == at:
                    os.kill(os.getpid(), signal.SIGINT)
                yield frame

    class InterruptingSink(Recording):
        def write(self, frame: SourceFrame, result: Segmentation) -> None:
            if stage == "write" and frame.index == at:
                os.kill(os.getpid(), signal.SIGINT)
            super().write(frame, result)

    source, sink = Interrupting("s", 10**9), InterruptingSink(seconds=0.001)
    with pytest.raises(KeyboardInterrupt):
        run_pipeline(segmenter, [Job(source, [sink])])
    assert source.closed
    assert sink.ended is not None
    assert source.given < at + 1000


def test_a_run_in_any_thread_is_stopped_as_by_ctrl_c(segmenter: Segmenter) -> None:
    stop = threading.Event()

    class Stopping(Recording):
        def write(self, frame: SourceFrame, result: Segmentation) -> None:
            if frame.index == 5:
                stop.set()
            super().write(frame, result)

    source, sink, ended = Scripted("s", 10**9), Stopping(seconds=0.001), list[BaseException]()

    def run() -> None:
        try:
            run_pipeline(segmenter, [Job(source, [sink])], stop=stop)
        except KeyboardInterrupt as error:
            ended.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(60)
    assert len(ended) == 1
    assert source.closed
    assert sink.ended is not None


def test_a_source_that_is_busy_for_long_is_not_waited_for(segmenter: Segmenter) -> None:
    stop, done = threading.Event(), threading.Event()

    class Busy(Scripted):
        def __iter__(self) -> Iterator[SourceFrame]:
            stop.set()
            done.wait(60)  # as a decoder in one call
            yield from super().__iter__()

    source, sink = Busy("s", 3), Recording()
    with pytest.raises(KeyboardInterrupt):
        run_pipeline(segmenter, [Job(source, [sink])], stop=stop)
    assert not done.is_set()
    assert sink.ended is not None
    done.set()
    for thread in threading.enumerate():
        if thread.name.startswith("espmedsam-"):
            thread.join(30)  # it ends by itself
    assert source.closed


def test_controls_change_a_run_under_way(segmenter: Segmenter, toy_bundle_of_two: Bundle) -> None:
    controls = Adjustable()
    got: list[tuple[str, float]] = []
    with Segmenter.load(toy_bundle_of_two, "colonoscopy", threads=1) as other:

        class Turning(Recording):
            def write(self, frame: SourceFrame, result: Segmentation) -> None:
                got.append((result.modality, result.threshold))
                if frame.index == 2:
                    controls.change(segmenter=other, threshold=0.25)

        run_pipeline(segmenter, [Job(Scripted("s", 60), [Turning()])], controls=controls)
    assert len(got) == 60
    assert got[0] == ("fundus", 0.5)
    assert got[-1] == ("colonoscopy", 0.25)
    assert got.index(("colonoscopy", 0.25)) < 2 + 4 + 4 + 3  # what the queues held when it changed


def test_a_paused_run_waits_and_goes_on(segmenter: Segmenter) -> None:
    controls = Adjustable(RunSettings(paused=True))
    source, sink = Scripted("s", 30), Recording()
    asked = threading.Event()

    class Asked(Adjustable):
        def wait_for_change(self, seen: RunSettings, seconds: float) -> None:
            asked.set()
            controls.wait_for_change(seen, seconds)

        def current(self) -> RunSettings:
            return controls.current()

    def go_on() -> None:
        assert asked.wait(10)
        assert sink.got == []
        controls.change(paused=False)

    other = threading.Thread(target=go_on)
    other.start()
    run_pipeline(segmenter, [Job(source, [sink])], controls=Asked())
    other.join()
    assert sink.got == expected("s", 30)


@pytest.mark.parametrize("changes", [{"threshold": 0.0}, {"threshold": 1.0}, {"opacity": -0.1}, {"opacity": 1.5}])
def test_settings_out_of_range_are_refused_and_change_nothing(changes: dict[str, float]) -> None:
    controls = Adjustable()
    with pytest.raises(UserError, match="is not"):
        controls.change(**changes)
    assert controls.current() == RunSettings()
