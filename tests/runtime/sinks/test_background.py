"""A sink in its own thread: order kept, never waited for, its failures told."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from listening import listening
from sink_material import blob, result_of

from espmedsam_edge.errors import UserError
from espmedsam_edge.runtime.segmentation import Segmentation
from espmedsam_edge.runtime.sinks.background import BackgroundSink, BackgroundSinks
from espmedsam_edge.runtime.sources.source import Failure, SourceFrame

RESULT = result_of(blob((48, 64)))


def frame(number: int) -> SourceFrame:
    return SourceFrame(np.zeros((48, 64, 3), np.uint8), Path("cam"), number)


def waited(done: bool) -> None:
    assert done, "the test never let the sink go on"


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


class Slow:
    """Takes a frame once it is let; remembers what it got, where, and how it ended."""

    def __init__(self, before: Callable[[int], None] = lambda number: None) -> None:
        self.got: list[int] = []
        self.threads: set[str] = set()
        self.ended: list[type[BaseException] | None] = []
        self._before = before

    def __enter__(self) -> Slow:
        self.threads.add(threading.current_thread().name)
        return self

    def write(self, frame: SourceFrame, result: Segmentation) -> None:
        self._before(frame.index)
        self.threads.add(threading.current_thread().name)
        self.got.append(frame.index)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.ended.append(kind)


def test_frames_arrive_in_order_in_another_thread() -> None:
    written = threading.Semaphore(0)
    sink, failures = Slow(lambda number: written.release()), list[Failure]()
    with BackgroundSink(sink, "o.mp4", failures) as behind:
        for number in range(50):
            behind.write(frame(number), RESULT)
            if number >= 8:  # a source that the sink keeps up with
                assert written.acquire(timeout=60)
    assert sink.got == list(range(50))
    assert sink.threads == {"espmedsam-sink"}
    assert (sink.ended, failures) == ([None], [])


def test_a_sink_that_hangs_holds_nothing_up(said: list[str]) -> None:
    """The disk of the sink stands still: writing returns at once all the same, and so does the end."""
    let, failures = threading.Event(), list[Failure]()
    sink = Slow(lambda number: waited(let.wait(600)))
    with BackgroundSink(sink, "o.mp4", failures, patience=0.01) as behind:
        for number in range(200):
            behind.write(frame(number), RESULT)
    assert behind.left_out >= 139  # 60 wait; one more may be in the sink's hands
    assert said == ["warning: o.mp4 cannot keep up: frames are left out of it."]
    assert [line.message.split(":")[0].split(" within")[0] for line in failures] == [
        "o.mp4 did not end",
        f"{behind.left_out} frames were left out of o.mp4",
    ]
    let.set()
    behind._thread.join(60)


def test_a_slow_sink_gets_fewer_frames_evenly_and_all_of_them_once_it_keeps_up() -> None:
    let, failures, now = threading.Semaphore(0), list[Failure](), [0.0]
    sink = Slow(lambda number: waited(let.acquire(timeout=600)))
    with BackgroundSink(sink, "o.mp4", failures, clock=lambda: now[0]) as behind:
        for number in range(60):  # two seconds at 30 frames a second, in which the sink takes nothing
            behind.write(frame(number), RESULT)
            if number == 0:
                until(lambda: not behind._waiting)  # it holds the first one, whenever its thread starts
            now[0] += 1 / 30
        for _ in range(60):
            let.release()
        until(lambda: not behind._waiting and len(sink.got) == 60 - behind.left_out)
        for number in range(60, 240):  # from now on it keeps up
            behind.write(frame(number), RESULT)
            let.release()
            until(lambda: len(sink.got) == number + 1 - behind.left_out)  # noqa: B023 (called before it changes)
            now[0] += 1 / 30
    assert sink.got == sorted(sink.got)
    assert len(sink.got) == 240 - behind.left_out
    early = [number for number in sink.got if number < 60]
    assert 8 <= len(early) <= 12  # of some 20 that waited half
    assert max(np.diff(early)) <= 32
    assert sink.got[-90:] == list(range(150, 240))
    assert len(failures) == 1


def captured(number: int, at: float) -> SourceFrame:
    return SourceFrame(np.zeros((48, 64, 3), np.uint8), Path("cam"), number, captured=at)


def test_ages_are_taken_when_the_frame_is_written_and_old_ones_are_refused() -> None:
    now, held, let = [100.0], threading.Semaphore(0), threading.Semaphore(0)

    def slow(number: int) -> None:
        held.release()
        waited(let.acquire(timeout=600))
        now[0] += 0.25

    sink, failures = Slow(slow), list[Failure]()
    with BackgroundSink(sink, "o.mp4", failures, clock=lambda: now[0], max_latency=0.2) as behind:
        for number in range(3):  # the second and the third wait for the first
            behind.write(captured(number, now[0]), RESULT)
        behind.write(frame(3), RESULT)  # of a file, which is never too old
        let.release()
        until(lambda: behind.refused[Path("cam")] == 2)
        let.release()
        until(lambda: len(sink.got) == 2)
        behind.write(captured(4, now[0] - 0.1), RESULT)
        let.release()
    assert sink.got == [0, 3, 4]
    assert behind.ages(Path("cam")) == pytest.approx([0.25, 0.35])
    assert behind.ages(Path("c.avi")) == []
    assert (behind.left_out, failures) == (0, [])


def test_the_slowest_sink_is_reported() -> None:
    background = BackgroundSinks()
    with (
        background.add("quick.csv", Slow()) as quick,
        background.add("slow.mp4", Slow(lambda _: time.sleep(0.05))) as slow,
    ):
        for sink in (quick, slow):
            sink.write(captured(0, time.monotonic()), RESULT)
    found = background.slowest(Path("cam"))
    assert found is not None
    assert found[0] == "slow.mp4"
    assert found[1].p50 >= 0.05
    assert background.slowest(Path("another")) is None


def test_a_sink_that_fails_is_told_once_and_left_behind() -> None:
    told = threading.Event()

    def full(number: int) -> None:
        if number == 3:
            raise UserError("no space left to write o.mp4.", "Free some space.", exit_code=1)

    failures, sink, said = list[Failure](), Slow(full), list[str]()

    def tell(line: str) -> None:
        said.append(line)
        told.set()

    with listening(tell), BackgroundSink(sink, "o.mp4", failures) as behind:
        for number in range(4):
            behind.write(frame(number), RESULT)
        assert told.wait(60)
        for number in range(4, 300):
            behind.write(frame(number), RESULT)
    assert sink.got == [0, 1, 2]
    assert sink.ended == [UserError]
    assert said == ["warning: no space left to write o.mp4. Free some space. The rest goes on without it."]
    assert [failure.message for failure in failures] == ["no space left to write o.mp4. Free some space."]
    assert behind.left_out == 0


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_the_sink_learns_how_the_run_ended(error: type[BaseException]) -> None:
    sink = Slow()

    def interrupted() -> None:
        with BackgroundSink(sink, "o.mp4", []) as behind:
            behind.write(frame(0), RESULT)
            raise error

    with pytest.raises(error):
        interrupted()
    assert (sink.got, sink.ended) == ([0], [error])


def test_a_bug_in_a_sink_is_not_hidden() -> None:
    def broken(number: int) -> None:
        raise ZeroDivisionError

    def run() -> None:
        with BackgroundSink(Slow(broken), "o.mp4", []) as behind:
            behind.write(frame(0), RESULT)

    with pytest.raises(ZeroDivisionError):
        run()
