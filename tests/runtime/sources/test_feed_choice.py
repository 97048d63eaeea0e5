"""Of several ways to read a stream the first that opens is taken, and kept."""

from __future__ import annotations

import pytest
from scripted_feeds import END, ScriptedFeed

from espmedsam_edge.errors import UserError
from espmedsam_edge.runtime.sources.live import BackOff, Disconnected, FirstThatOpens, LiveSource


def refusal(text: str) -> UserError:
    return UserError(text, "Check the camera.", exit_code=1)


def test_the_first_that_opens_is_kept_when_it_drops_out(said: list[str]) -> None:
    first = ScriptedFeed(opening=(refusal("not in hardware."),))
    second = ScriptedFeed(1, Disconnected("gone"), 2, END, opening=(None, refusal("not yet.")))
    third = ScriptedFeed()
    feed = FirstThatOpens([first, second, third], "rtsp://a is decoded in software")
    with LiveSource(feed, "rtsp://a", "a", BackOff(0.001, 0.002)) as source:
        frames = iter(source)
        while source.reconnects == 0:
            next(frames)
    assert (first.opened, second.opened, third.opened) == (1, 3, 0)
    assert first.closed > 0
    assert said == ["rtsp://a dropped out (gone); trying again.", said[-1]]  # the note is for the last one only


def test_the_last_resort_is_named_with_the_reason(said: list[str]) -> None:
    feeds = [ScriptedFeed(opening=(refusal("cannot open it: no frame in 10 s."),)), ScriptedFeed(7)]
    feed = FirstThatOpens(feeds, "rtsp://a is decoded in software")
    feed.open()
    image = feed.read()
    assert image is not None
    assert (image == 7).all()
    assert feed.fps == feeds[1].fps
    assert said == ["rtsp://a is decoded in software (cannot open it: no frame in 10 s)."]


def test_if_none_opens_the_last_one_says_why() -> None:
    feeds = [ScriptedFeed(opening=(refusal(text),)) for text in ("first.", "last.")]
    with pytest.raises(UserError, match=r"^last\."):
        FirstThatOpens(feeds).open()
    assert all(feed.closed for feed in feeds)
