"""Live runs: newest frames, files untouched, slow sinks, several sources, limits, Ctrl-C."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scripted_feeds import END, EndlessFeed, ScriptedFeed
from toy_bundles import save_toy_bundle

from espmedsam_edge.bundle import Bundle
from espmedsam_edge.errors import UserError
from espmedsam_edge.runtime.backends.backend import BackendAway
from espmedsam_edge.runtime.run.controls import Adjustable
from espmedsam_edge.runtime.run.jobs import Job, Limits, RunProgress
from espmedsam_edge.runtime.run.pipeline import run_pipeline
from espmedsam_edge.runtime.segmentation import Segmentation
from espmedsam_edge.runtime.segmenter import Segmenter
from espmedsam_edge.runtime.sinks import sink as sinks
from espmedsam_edge.runtime.sinks.background import BackgroundSinks
from espmedsam_edge.runtime.sources.live import BackOff, Disconnected, Feed, LiveSource
from espmedsam_edge.runtime.sources.source import Failure, SourceFrame

QUICK = BackOff(first=0.001, longest=0.002)


class Sink:
    """Remembers frames; ``on_write`` is called with each."""

    def __init__(self, on_write: Callable[[SourceFrame], None] = lambda frame: None) -> None:
        self.frames: list[SourceFrame] = []
        self.on_write = on_write
        self.ended: type[BaseException] | str | None = "never"

    def __enter__(self) -> Sink:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.ended = kind

    def write(self, frame: SourceFrame, result: Segmentation) -> None:
        self.frames.append(frame)
        self.on_write(frame)

    @property
    def numbers(self) -> list[int]:
        return [frame.index for frame in self.frames]


class Clip:
    """A file of numbered frames."""

    kind, live = "video", False
    fps, length = Fraction(10), None

    def __init__(self, count: int, name: str = "clip") -> None:
        self.name, self.count = name, count
        self.files = [Path(name)]
        self.failures: list[Failure] = []

    def __enter__(self) -> Clip:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def __iter__(self) -> Iterator[SourceFrame]:
        for index in range(self.count):
            yield SourceFrame(np.full((16, 20, 3), index % 256, np.uint8), self.files[0], index, index / 10)


def live(feed: Feed, name: str = "test://fundus") -> LiveSource:
    return LiveSource(feed, name, name.replace("://", "-"), QUICK)


@pytest.fixture
def segmenter(toy_bundle: Bundle) -> Iterator[Segmenter]:
    with Segmenter.load(toy_bundle, threads=1) as loaded:
        yield loaded


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    yield
    assert [thread.name for thread in threading.enumerate() if thread.name.startswith("espmedsam-")] == []


class Gate:
    """Holds the segmenter at each frame until it is let through."""

    def __init__(self, segmenter: Segmenter) -> None:
        self.entered, self.passes = threading.Semaphore(0), threading.Semaphore(0)
        original = segmenter.segment_batch

        def gated(frames: Any, *rest: Any) -> list[Segmentation]:
            self.entered.release()
            assert self.passes.acquire(timeout=30)
            return original(frames, *rest)

        segmenter.segment_batch = gated  # type: ignore[method-assign]


def in_background(call: Callable[[], Any]) -> Callable[[], Any]:
    """Run a pipeline beside the test; calling the result waits for its report."""
    outcome: list[Any] = []
    thread = threading.Thread(target=lambda: outcome.append(call()))
    thread.start()

    def wait() -> Any:
        thread.join(60)
        assert not thread.is_alive()
        return outcome[0]

    return wait


def test_the_newest_frame_is_segmented_and_the_others_are_counted(segmenter: Segmenter) -> None:
    gate, feed, sink = Gate(segmenter), ScriptedFeed(0), Sink()
    report = in_background(lambda: run_pipeline(segmenter, [Job(live(feed), [sink])]))
    assert gate.entered.acquire(timeout=30)  # the first frame is being segmented
    feed.put(*range(1, 8))
    feed.drained()
    feed.put(END)
    gate.passes.release(2)
    told = report()
    assert sink.numbers == [0, 7]
    assert [frame.skipped for frame in sink.frames] == [0, 6]
    (about,) = told.live
    assert (about.frames, about.skipped, about.refused, about.reconnects) == (2, 6, 0, 0)
    assert about.latency is not None
    assert about.latency.samples == 2
    assert told.frames == 2
    assert not told.interrupted


def test_a_sink_that_hangs_does_not_hold_up_capture_or_others(segmenter: Segmenter) -> None:
    let_go = threading.Event()
    hanging = Sink(lambda frame: (let_go.wait(30) and None) or None)
    stuck, free = EndlessFeed(), EndlessFeed()

    def enough(frame: SourceFrame) -> None:
        if len(other.frames) == 30:
            let_go.set()

    other = Sink(enough)
    run_pipeline(
        segmenter,
        [Job(live(stuck, "test://a"), [hanging]), Job(live(free, "test://b"), [other])],
        limits=Limits(frames=30),
    )
    assert let_go.is_set()
    assert len(hanging.frames) == 30
    assert len(other.frames) == 30
    held, next_one = hanging.numbers[0], hanging.numbers[4]
    assert next_one - held > 4  # it went on from the newest


def test_order_is_kept_for_each_of_several_sources(segmenter: Segmenter) -> None:
    sinks = [Sink() for _ in range(3)]
    shared = Sink()
    jobs = [Job(live(EndlessFeed(), f"test://{n}"), [sink]) for n, sink in enumerate(sinks)]
    report = run_pipeline(segmenter, jobs, [shared], limits=Limits(frames=25))
    assert report.frames == 75
    for number, sink in enumerate(sinks):
        assert len(sink.frames) == 25
        assert sink.numbers == sorted(set(sink.numbers))
        assert sink.numbers == [frame.index for frame in shared.frames if frame.address == f"test://{number}"]
        assert sink.ended is None


def test_a_batch_takes_frames_of_several_sources(tmp_path: Path) -> None:
    groups: list[int] = []
    with Segmenter.load(save_toy_bundle(tmp_path / "b", batch=4), threads=1) as segmenter:
        gate, feeds = Gate(segmenter), [ScriptedFeed(1), ScriptedFeed(1), ScriptedFeed(1)]
        gated = segmenter.segment_batch

        def counted(frames: Any, *rest: Any) -> list[Segmentation]:
            groups.append(len(frames))
            return gated(frames, *rest)

        segmenter.segment_batch = counted  # type: ignore[method-assign]
        sinks = [Sink() for _ in feeds]
        jobs = [Job(live(feed, f"test://{n}"), [sinks[n]]) for n, feed in enumerate(feeds)]
        report = in_background(lambda: run_pipeline(segmenter, jobs))
        assert gate.entered.acquire(timeout=30)
        for feed in feeds:  # a second frame of each waits when the first group comes back
            feed.put(2, 3)
            feed.drained()
            feed.put(END)
        gate.passes.release(10)
        report()
    assert groups[-1] == 3
    assert [sink.numbers[-1] for sink in sinks] == [2, 2, 2]


def test_a_file_beside_a_live_source_loses_no_frame(segmenter: Segmenter) -> None:
    clips, sinks, beside = [Clip(40, "a"), Clip(0, "b"), Clip(25, "c")], [Sink(), Sink(), Sink()], Sink()
    feed = EndlessFeed()

    def stop(progress: RunProgress) -> None:  # whichever comes last on a busy machine
        if len(sinks[2].frames) == 25 and beside.frames:
            feed.stopped = True

    jobs = [Job(live(feed), [beside]), *[Job(clip, [sink]) for clip, sink in zip(clips, sinks, strict=True)]]
    report = run_pipeline(segmenter, jobs, on_progress=stop)
    assert [sink.numbers for sink in sinks] == [list(range(40)), [], list(range(25))]
    assert len(beside.frames) > 0
    assert report.frames == 65 + len(beside.frames)
    assert report.failures == []


def test_a_file_at_its_own_speed_holds_no_live_source_up(segmenter: Segmenter, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file waits for its turn until the view, which both share, has got thirty live frames."""
    feed, let_go = EndlessFeed(), threading.Event()

    def wait(seconds: float) -> None:
        if seconds:
            assert let_go.wait(30)

    def enough(frame: SourceFrame) -> None:
        if sum(one.captured is not None for one in view.frames) == 30:
            feed.stopped = True
            let_go.set()

    monkeypatch.setattr(sinks.time, "sleep", wait)
    view = Sink(enough)
    report = run_pipeline(segmenter, [Job(live(feed), []), Job(Clip(2), [sinks.Paced()])], [view])
    assert report.frames == len(view.frames) >= 32


class Ageing(LiveSource):
    """Every second frame was captured long ago."""

    def poll(self) -> SourceFrame | None:
        frame = super().poll()
        if frame is None or frame.captured is None or frame.index % 2 == 0:
            return frame
        return replace(frame, captured=frame.captured - 1000)


def test_frames_that_are_too_old_are_refused(segmenter: Segmenter) -> None:
    feed, sink = ScriptedFeed(0), Sink()
    source = Ageing(feed, "test://a", "a")
    sink.on_write = lambda frame: feed.put(1, 2) if frame.index < 20 else feed.put(END)
    report = run_pipeline(segmenter, [Job(source, [sink])], limits=Limits(max_latency=100))
    assert all(number % 2 == 0 for number in sink.numbers)
    (told,) = report.live
    assert told.refused + told.skipped + told.frames == max(sink.numbers) + 1


def test_a_result_that_waited_too_long_is_refused(segmenter: Segmenter) -> None:
    gate, feed, sink = Gate(segmenter), ScriptedFeed(0, 1), Sink()
    limits = Limits(max_latency=0.05)
    report = in_background(lambda: run_pipeline(segmenter, [Job(live(feed), [sink])], limits=limits))
    assert gate.entered.acquire(timeout=30)
    begin = time.monotonic()
    while time.monotonic() - begin <= 0.06:  # nothing but time makes a frame old
        time.sleep(0.01)
    feed.put(END)
    gate.passes.release(10)
    told = report()
    assert sink.frames == []
    assert told.live[0].refused >= 1


def test_a_run_ends_by_itself(segmenter: Segmenter) -> None:
    sink, files = Sink(), Sink()
    feed = EndlessFeed()
    jobs = [Job(live(feed), [sink]), Job(Clip(10**9), [files])]
    report = run_pipeline(segmenter, jobs, limits=Limits(seconds=0.2))
    assert feed.stopped
    assert sink.ended is None
    assert files.ended is None
    assert files.numbers == list(range(len(files.numbers)))
    assert report.frames == len(sink.frames) + len(files.frames)


def test_limits_hold_for_files_alone(segmenter: Segmenter) -> None:
    sinks = [Sink(), Sink()]
    jobs = [Job(Clip(30, name), [sink]) for name, sink in zip("ab", sinks, strict=True)]
    run_pipeline(segmenter, jobs, limits=Limits(frames=7))
    assert [sink.numbers for sink in sinks] == [list(range(7)), list(range(7))]
    endless = Sink()
    run_pipeline(segmenter, [Job(Clip(10**9), [endless])], limits=Limits(seconds=0.1))
    assert endless.ended is None


def test_frame_limits_beside_a_live_source(segmenter: Segmenter) -> None:
    sink, files = Sink(), Sink()
    run_pipeline(segmenter, [Job(live(EndlessFeed()), [sink]), Job(Clip(30), [files])], limits=Limits(frames=6))
    assert files.numbers == list(range(6))
    assert len(sink.frames) == 6


@pytest.mark.parametrize("from_a_thread", [False, True])
def test_ctrl_c_finishes_what_live_sources_gave_and_drops_unfinished_files(
    segmenter: Segmenter, from_a_thread: bool
) -> None:
    stop = threading.Event()

    def press(count: int) -> None:
        if count == 50:
            stop.set() if from_a_thread else os.kill(os.getpid(), signal.SIGINT)

    feed, sink, files = EndlessFeed(press), Sink(), Sink(lambda frame: time.sleep(0.001))
    report = run_pipeline(segmenter, [Job(live(feed), [sink]), Job(Clip(10**9), [files])], stop=stop)
    assert report.interrupted
    assert feed.stopped
    assert sink.ended is None
    assert files.ended not in (None, "never")


def test_a_second_ctrl_c_drops_all(segmenter: Segmenter) -> None:
    feed = EndlessFeed()
    interrupted = threading.Event()
    interrupt = feed.interrupt
    feed.interrupt = lambda: (interrupt(), interrupted.set())  # type: ignore[assignment]

    def press_twice(frame: SourceFrame) -> None:
        if frame.index == sink.numbers[0]:
            os.kill(os.getpid(), signal.SIGINT)
            assert interrupted.wait(30)  # the first one ended the reading
            os.kill(os.getpid(), signal.SIGINT)

    sink, waiting = Sink(press_twice), Sink(lambda frame: time.sleep(0.01))
    with pytest.raises(KeyboardInterrupt):
        run_pipeline(segmenter, [Job(live(feed), [sink, waiting])])
    assert sink.ended != "never"


def test_a_source_that_drops_out_goes_on(segmenter: Segmenter) -> None:
    feed, sink = ScriptedFeed(0), Sink()
    steps = iter([(Disconnected("gone"), 1), (Disconnected("gone"), 2), (END,)])
    sink.on_write = lambda frame: feed.put(*next(steps))
    report = run_pipeline(segmenter, [Job(live(feed), [sink])])
    assert sink.numbers == [0, 1, 2]
    assert report.live[0].reconnects == 2
    assert report.failures == []


def test_one_source_that_cannot_open_does_not_stop_the_others(segmenter: Segmenter) -> None:
    shut = ScriptedFeed(opening=(UserError("no camera.", exit_code=1),))
    sink = Sink()
    jobs = [Job(live(shut, "csi://0"), [Sink()]), Job(live(EndlessFeed()), [sink])]
    report = run_pipeline(segmenter, jobs, limits=Limits(frames=5))
    assert [(failure.name, failure.message) for failure in report.failures] == [("csi://0", "no camera.")]
    assert len(sink.frames) == 5


def test_a_failing_sink_ends_its_source_only(segmenter: Segmenter) -> None:
    def fail(frame: SourceFrame) -> None:
        raise UserError("no space left.")

    failing, good, feed = Sink(fail), Sink(), EndlessFeed()
    jobs = [Job(live(feed, "test://a"), [failing]), Job(live(EndlessFeed(), "test://b"), [good])]
    report = run_pipeline(segmenter, jobs, limits=Limits(frames=20))
    assert failing.ended is UserError
    assert feed.stopped
    assert len(good.frames) == 20
    assert [failure.message for failure in report.failures] == ["no space left."]


def test_a_source_whose_results_all_failed_ends_and_others_go_on(segmenter: Segmenter, said: list[str]) -> None:
    def fail(frame: SourceFrame) -> None:
        raise UserError("no space left.")

    background = BackgroundSinks()
    feed, good = EndlessFeed(), Sink()
    jobs = [Job(live(feed, "test://a"), [background.add("a.mkv", Sink(fail)), background.add("a.mp4", Sink(fail))])]
    jobs += [Job(live(EndlessFeed(), "test://b"), [background.add("b.mkv", good)])]
    run_pipeline(segmenter, jobs, limits=Limits(frames=20))
    assert feed.stopped
    assert len(good.frames) + background.sinks[2].left_out == 20
    assert said == ["warning: no space left. The rest goes on without it."] * 2


def test_a_run_whose_results_all_failed_ends(segmenter: Segmenter, said: list[str]) -> None:
    def fail(frame: SourceFrame) -> None:
        raise UserError("no space left.")

    background = BackgroundSinks()
    with background.add("r.jsonl", Sink(fail)) as shared:
        run_pipeline(segmenter, [Job(live(EndlessFeed()), [background.add("a.mkv", Sink(fail))])], [shared])
    assert [failure.name for failure in background.failures] in (["a.mkv", "r.jsonl"], ["r.jsonl", "a.mkv"])
    assert len(said) <= 1  # of the first; the last one ends the run, which tells it


def test_a_failing_shared_sink_ends_the_run(segmenter: Segmenter) -> None:
    def fail(frame: SourceFrame) -> None:
        raise UserError("no space left.")

    with pytest.raises(UserError, match="no space left"):
        run_pipeline(segmenter, [Job(live(EndlessFeed()), [])], [Sink(fail)])


class Bug(Exception):
    pass


@pytest.mark.parametrize("stage", ["feed", "segmenter", "sink", "progress"])
def test_a_bug_anywhere_stops_all_and_comes_out(segmenter: Segmenter, stage: str) -> None:
    def fail(*_: Any) -> Any:
        raise Bug

    feed = EndlessFeed(fail if stage == "feed" else None)
    if stage == "segmenter":
        segmenter.segment_batch = fail  # type: ignore[method-assign]
    beside = EndlessFeed()
    jobs = [Job(live(feed, "test://a"), [Sink(fail)] if stage == "sink" else []), Job(live(beside, "test://b"), [])]
    with pytest.raises(Bug):
        run_pipeline(segmenter, jobs, on_progress=fail if stage == "progress" else None)
    assert beside.stopped


def test_a_pause_skips_and_goes_on_with_the_newest(segmenter: Segmenter) -> None:
    controls, feed, sink = Adjustable(), ScriptedFeed(0), Sink()

    def pause(frame: SourceFrame) -> None:
        if frame.index == 0:
            controls.change(paused=True)
            feed.put(*range(1, 6))
            feed.drained()
            feed.put(END)
            controls.change(paused=False)

    sink.on_write = pause
    run_pipeline(segmenter, [Job(live(feed), [sink])], controls=controls)
    assert sink.numbers[0] == 0
    assert sink.numbers[-1] == 5


def test_a_paused_run_can_be_ended(segmenter: Segmenter) -> None:
    controls = Adjustable()
    controls.change(paused=True)
    sink = Sink()
    run_pipeline(segmenter, [Job(live(EndlessFeed()), [sink])], controls=controls, limits=Limits(seconds=0.1))
    assert sink.frames == []
    assert sink.ended is None


@pytest.mark.parametrize("batch", [1, 2])
def test_a_network_elsewhere_that_is_away_costs_live_frames_and_no_file(
    tmp_path: Path, batch: int, said: list[str]
) -> None:
    feed, sink, written = EndlessFeed(), Sink(), Sink()
    away = threading.Event()
    with Segmenter.load(save_toy_bundle(tmp_path / "toy.bundle", batch=batch), threads=1) as segmenter:
        original, stop = segmenter.segment_batch, threading.Event()
        asked = 0

        def elsewhere(frames: Any, *rest: Any) -> list[Segmentation]:
            nonlocal asked
            if away.is_set():
                asked += 1
                if asked == 5:  # more than what ends a run that fails
                    away.clear()
                raise BackendAway("no answer of the server.", "Is it running?")
            return original(frames, *rest)

        segmenter.segment_batch = elsewhere  # type: ignore[method-assign]

        def seen(frame: SourceFrame) -> None:
            if len(sink.frames) == 3:
                away.set()
            if len(sink.frames) > 10 and asked == 5:
                stop.set()

        sink.on_write = seen
        report = run_pipeline(segmenter, [Job(live(feed), [sink]), Job(Clip(400), [written])], stop=stop)
    assert (report.failures, asked) == ([], 5)
    assert written.numbers == list(range(len(written.numbers)))  # none of the file is missing
    told = [line for line in said if "left out until" in line or "is back after" in line]
    assert len(told) == 2
    assert told[0].startswith("no answer of the server.")


def test_files_alone_do_not_wait_for_a_network_elsewhere(segmenter: Segmenter) -> None:
    def elsewhere(frames: Any, *rest: Any) -> list[Segmentation]:
        raise BackendAway("no answer of the server.")

    segmenter.segment_batch = elsewhere  # type: ignore[method-assign]
    with pytest.raises(UserError, match="no answer"):  # each file ends with its first frame, or later
        run_pipeline(segmenter, [Job(Clip(9), [Sink()]) for _ in range(3)])


def test_a_run_whose_network_stays_away_can_be_ended(segmenter: Segmenter) -> None:
    stop = threading.Event()

    def elsewhere(frames: Any, *rest: Any) -> list[Segmentation]:
        stop.set()
        raise BackendAway("no answer of the server.")

    segmenter.segment_batch = elsewhere  # type: ignore[method-assign]
    report = run_pipeline(segmenter, [Job(live(EndlessFeed()), [Sink()])], stop=stop)
    assert (report.frames, report.interrupted) == (0, True)
