"""The newest frame, counted skips, reconnection: a live source on a feed whose every step is scripted."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
from scripted_feeds import END, EndlessFeed, ScriptedFeed

from espmedsam_edge.errors import UserError
from espmedsam_edge.runtime.sources.live import BackOff, Disconnected, LiveSource
from espmedsam_edge.runtime.sources.source import SourceFrame

QUICK = BackOff(first=0.001, longest=0.002)
NAME = "rtsp://camera/1"


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    yield
    assert [thread.name for thread in threading.enumerate() if thread.name.startswith("espmedsam-")] == []


def value(frame: SourceFrame | None) -> int:
    assert frame is not None
    return int(frame.image[0, 0, 0])


def test_only_the_newest_frame_is_kept_and_the_rest_counted() -> None:
    feed = ScriptedFeed()
    with LiveSource(feed, NAME, "camera") as source:
        assert source.poll() is None
        seen = threading.Semaphore(0)
        source.listen(seen.release)
        for number in (10, 20, 30):
            feed.put(number)
            assert seen.acquire(timeout=10)
        assert source.waiting
        frame = source.poll()
        assert value(frame) == 30
        assert frame is not None
        assert (frame.index, frame.skipped, frame.address, str(frame.path)) == (2, 2, NAME, "camera")
        assert frame.captured is not None
        assert frame.source == NAME
        assert not source.waiting
        assert source.poll() is None
        feed.put(40)
        assert seen.acquire(timeout=10)
        frame = source.poll()
        assert value(frame) == 40
        assert frame is not None
        assert (frame.index, frame.skipped) == (3, 2)
    assert feed.closed == 1


def test_iterating_waits_for_frames_and_ends_with_the_feed() -> None:
    feed = ScriptedFeed(1)
    got = []
    with LiveSource(feed, NAME, "camera") as source:
        for frame in source:
            got.append(value(frame))
            feed.put(2 if len(got) == 1 else END)
        assert source.finished
    assert got == [1, 2]
    assert source.failures == []


def test_times_start_at_the_first_frame() -> None:
    feed = ScriptedFeed(1)
    with LiveSource(feed, NAME, "camera") as source:
        frames = iter(source)
        first = next(frames)
        feed.put(2)
        second = next(frames)
    assert first.time == 0
    assert first.captured is not None
    assert second.captured is not None
    assert second.time == pytest.approx(second.captured - first.captured)


def test_a_feed_that_drops_out_is_opened_again(said: list[str]) -> None:
    refused = UserError("no answer.", exit_code=1)
    feed = ScriptedFeed(1, opening=(None, refused, refused, None))
    got = []
    with LiveSource(feed, NAME, "camera", QUICK) as source:
        for frame in source:
            got.append(value(frame))
            feed.put(*{1: (Disconnected("the cable is out"), 2), 2: (Disconnected("again"), 3), 3: (END,)}[got[-1]])
    assert got == [1, 2, 3]
    assert source.reconnects == 2
    assert feed.opened == 5
    assert feed.closed == 5
    assert [line.partition(" is back after")[0] for line in said] == [
        f"{NAME} dropped out (the cable is out); trying again.",
        NAME,
        f"{NAME} dropped out (again); trying again.",
        NAME,
    ]


def test_numbers_go_on_after_a_drop_out() -> None:
    feed = ScriptedFeed(1)
    numbers = []
    with LiveSource(feed, NAME, "camera", QUICK) as source:
        for frame in source:
            numbers.append(frame.index)
            feed.put(*((Disconnected("gone"), 2) if frame.index == 0 else (END,)))
    assert numbers == [0, 1]


def test_one_that_cannot_be_opened_says_so_at_once() -> None:
    feed = ScriptedFeed(opening=(UserError("no camera.", "Plug it in.", exit_code=1),))
    with pytest.raises(UserError, match=r"no camera\. Plug it in\."), LiveSource(feed, NAME, "camera", QUICK):
        pass
    assert feed.opened == 1


def test_patience_ends() -> None:
    refused = UserError("no answer.", exit_code=1)
    feed = ScriptedFeed(1, Disconnected("gone"), opening=(None, *[refused] * 1000))
    with LiveSource(feed, NAME, "camera", BackOff(0.001, 0.002, give_up=0.02)) as source:
        assert [value(frame) for frame in source] == [1]
    assert "did not come back in 0.02 s (no answer)" in source.failures[0].message


def test_what_makes_a_feed_unusable_later_is_tried_again_too() -> None:
    feed = ScriptedFeed(1, UserError("too many pixels."), 2, END)
    with LiveSource(feed, NAME, "camera", QUICK) as source:
        assert value(list(source)[-1]) == 2
    assert source.reconnects == 1


class Bug(Exception):
    pass


def test_a_bug_in_a_feed_comes_out() -> None:
    feed = ScriptedFeed()
    with LiveSource(feed, NAME, "camera", QUICK) as source:
        feed.put(Bug())
        with pytest.raises(Bug):
            list(source)


def test_leaving_ends_a_read_that_waits() -> None:
    with LiveSource(ScriptedFeed(), NAME, "camera"):
        pass
    with LiveSource(EndlessFeed(), NAME, "camera"):
        pass


def test_leaving_ends_a_pause_between_attempts() -> None:
    feed = ScriptedFeed(1, Disconnected("gone"))
    with LiveSource(feed, NAME, "camera", BackOff(first=1000)) as source:
        assert value(next(iter(source))) == 1


def test_it_must_be_entered() -> None:
    with pytest.raises(RuntimeError, match="enter the source"):
        next(iter(LiveSource(EndlessFeed(), NAME, "camera")))
