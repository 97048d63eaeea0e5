"""``test://``: steady, with true masks, and a clock that survives compression."""

from __future__ import annotations

import time

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from espmedsam_edge.errors import UserError
from espmedsam_edge.phantoms import phantom
from espmedsam_edge.runtime.sources.live import LiveOptions, LiveSource
from espmedsam_edge.runtime.sources.opening import open_sources
from espmedsam_edge.runtime.sources.phantom import PhantomClip, PhantomFeed, read_clock, write_clock
from espmedsam_edge.runtime.sources.source import Source


def opened(text: str) -> Source:
    (source,), failures = open_sources([text], LiveOptions())
    assert failures == []
    return source


def test_a_live_phantom_shows_the_scene_and_the_time() -> None:
    source = opened("test://fundus?size=96x64&fps=200&frames=20&seed=3")
    assert isinstance(source, LiveSource)
    assert isinstance(source.feed, PhantomFeed)
    begin = time.monotonic()
    with source:
        frames = list(source)
        assert source.fps == 200
        truths = [source.feed.truth(frame.index) for frame in frames]
    end = time.monotonic()
    assert frames[-1].index == 19
    assert len(frames) + source.skipped == 20
    clocks = [read_clock(frame.image) for frame in frames]
    assert None not in clocks
    assert clocks == sorted(clocks)  # type: ignore[type-var]
    for frame, clock in zip(frames, clocks, strict=True):
        assert clock is not None
        assert frame.captured is not None
        assert begin <= clock <= frame.captured + 1e-6 <= end + 1e-6
    scene, mask = phantom("fundus", 3, (64, 96), 0)
    moved = (np.arange(14) * 0 + [0, 1, 2, 3, 4, 5, 6, 7, 6, 5, 4, 3, 2, 1])[frames[-1].index % 14]
    expected, true = phantom("fundus", 3, (64, 96), int(moved))
    np.testing.assert_array_equal(frames[-1].image[40:], expected[40:])  # below the clock
    np.testing.assert_array_equal(truths[-1], true)
    assert scene.shape == (64, 96, 3)
    assert mask.any()


def test_as_a_recording_no_frame_is_left_out() -> None:
    source = opened("test://colonoscopy?size=64x64&frames=30&live=no&fps=10")
    assert isinstance(source, PhantomClip)
    with source:
        frames = list(source)
    assert [frame.index for frame in frames] == list(range(30))
    assert [frame.time for frame in frames] == pytest.approx([index / 10 for index in range(30)])
    assert len({frame.image.tobytes() for frame in frames}) == 8


def test_the_same_phantom_twice_has_two_names() -> None:
    sources, _ = open_sources(["test://fundus", "test://fundus", "test://xray"], LiveOptions())
    assert [str(source.files[0]) for source in sources] == ["test-fundus", "test-fundus-2", "test-xray"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("test://fundis", "Did you mean 'fundus'"),
        ("test://fundus?size=16x16", "too small"),
        ("test://fundus?size=99999x99999", "too small or too large"),
        ("test://fundus?fps=0", "not a number"),
        ("test://fundus?live=perhaps", "neither yes nor no"),
    ],
)
def test_wrong_options(text: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        opened(text)


@given(
    seconds=st.floats(0, 2e8),
    height=st.integers(32, 700),
    width=st.integers(32, 900),
    quality=st.integers(60, 100),
)
def test_the_clock_survives_jpeg(seconds: float, height: int, width: int, quality: int) -> None:
    image = np.full((height, width, 3), 127, np.uint8)
    write_clock(image, seconds)
    assert read_clock(image) == pytest.approx(seconds, abs=1e-6)
    _, jpeg = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, quality])
    if min(height // 8, width // 16) >= 8:  # squares as large as JPEG's blocks
        assert read_clock(cv2.imdecode(jpeg, cv2.IMREAD_COLOR)) == pytest.approx(seconds, abs=1e-6)


@given(st.integers(0, 2**32))
def test_a_picture_without_a_clock_shows_none(seed: int) -> None:
    noise = np.random.default_rng(seed).integers(0, 256, (64, 256, 3), np.uint8)
    assert read_clock(noise) is None
