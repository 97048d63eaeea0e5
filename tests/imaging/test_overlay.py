"""Overlay drawing against its formula in plain NumPy and SciPy."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from espmedsam_edge.imaging.overlay import OverlayStyle, color_of, draw_overlay, outline_width
from espmedsam_edge.modalities import PAPER_MODALITIES


def plain_overlay(frame: np.ndarray, mask: np.ndarray, style: OverlayStyle, width: int) -> np.ndarray:
    inside = mask > 0
    drawn = frame.astype(float)
    drawn[inside] = drawn[inside] * (1 - style.opacity) + np.array(style.color) * style.opacity
    if style.outline:
        square = np.ones((2 * width + 1,) * 2, bool)
        drawn[inside & ~ndimage.binary_erosion(inside, square, border_value=1)] = style.color
    return drawn


@settings(max_examples=60, deadline=None)
@given(
    height=st.integers(1, 90),
    width=st.integers(1, 90),
    density=st.sampled_from([0.0, 0.01, 0.5, 0.97, 1.0]),
    opacity=st.floats(0, 1),
    outline=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_overlay_is_the_formula(
    height: int, width: int, density: float, opacity: float, outline: bool, seed: int
) -> None:
    random = np.random.default_rng(seed)
    frame = random.integers(0, 256, (height, width, 3), np.uint8)
    mask = (random.random((height, width)) < density).astype(np.uint8) * 255
    style = OverlayStyle((10, 200, 250), opacity, outline)
    before = frame.copy()
    drawn = draw_overlay(frame, mask, style)
    assert drawn.dtype == np.uint8
    assert np.abs(drawn - plain_overlay(frame, mask, style, 1)).max() <= 0.51  # rounded to the nearest
    assert np.array_equal(frame, before)


def test_the_outline_grows_with_the_frame() -> None:
    assert [outline_width(size) for size in ((64, 64), (599, 900), (1080, 1920), (4320, 7680))] == [1, 1, 2, 8]
    frame = np.random.default_rng(0).integers(0, 256, (700, 700, 3), np.uint8)
    mask = np.zeros((700, 700), np.uint8)
    mask[100:300, 50:400] = 255
    style = OverlayStyle((0, 255, 255), 0.4)
    assert np.abs(draw_overlay(frame, mask, style) - plain_overlay(frame, mask, style, 2)).max() <= 0.51


def test_views_and_mirrored_frames_are_drawn_too() -> None:
    frame = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
    mask = np.zeros((40, 60), np.uint8)
    mask[5:20, 30:] = 255
    style = OverlayStyle((0, 255, 255))
    mirrored = draw_overlay(frame[:, ::-1], mask, style)
    assert np.array_equal(mirrored, draw_overlay(np.ascontiguousarray(frame[:, ::-1]), mask, style))


@pytest.mark.parametrize("size", [(96, 128), (270, 270), (1080, 1920)])
def test_the_notice_stays_in_the_upper_part(size: tuple[int, int]) -> None:
    frame = np.full((*size, 3), 120, np.uint8)
    drawn = draw_overlay(frame, np.zeros(size, np.uint8), OverlayStyle((0, 0, 0), notice="untrained weights"))
    changed = np.argwhere((drawn != frame).any(axis=2))
    assert len(changed)
    assert changed[:, 0].max() <= max(0.15 * size[0], 20)
    assert not (drawn != frame)[:, -1].any()  # no letter is cut at the right


def test_a_notice_does_not_fail_on_tiny_frames() -> None:
    style = OverlayStyle((0, 0, 0), notice="untrained weights")
    for size in ((1, 1), (8, 8), (20, 64)):
        assert draw_overlay(np.zeros((*size, 3), np.uint8), np.zeros(size, np.uint8), style).shape == (*size, 3)


def test_every_modality_has_a_steady_colour() -> None:
    assert all(len(color_of(name)) == 3 for name in PAPER_MODALITIES)
    assert color_of("histopathology") == color_of("histopathology")
