"""What is measured on a mask, against SciPy and plain NumPy."""

from __future__ import annotations

import json
from dataclasses import replace

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from espmedsam_edge.imaging.crop import Crop
from espmedsam_edge.imaging.geometry import upsample_logits
from espmedsam_edge.imaging.overlay import OverlayStyle, draw_overlay
from espmedsam_edge.runtime.segmentation import Drawn, Measured, Segmentation, Timings


def segmentation(mask: np.ndarray) -> Segmentation:
    logits = np.random.default_rng(0).standard_normal((16, 16)).astype(np.float32)
    return Segmentation(mask, "fundus", logits, 0.5, Timings(0.001, 0.4, 0.002))


@settings(max_examples=80, deadline=None)
@given(
    height=st.integers(1, 70),
    width=st.integers(1, 70),
    density=st.sampled_from([0.0, 0.02, 0.5, 1.0]),
    seed=st.integers(0, 99),
)
def test_area_box_and_centroid(height: int, width: int, density: float, seed: int) -> None:
    inside = np.random.default_rng(seed).random((height, width)) < density
    result = segmentation(inside.astype(np.uint8) * 255)
    assert result.size == (height, width)
    assert result.area == inside.sum()
    if not inside.any():
        assert result.bounding_box is None
        assert result.centroid is None
        return
    rows, columns = ndimage.find_objects(inside.astype(int))[0]
    box = (columns.start, rows.start, columns.stop - columns.start, rows.stop - rows.start)
    assert result.bounding_box == box
    y, x = ndimage.center_of_mass(inside)
    assert result.centroid == pytest.approx((x, y), abs=1e-6)


def test_contours_enclose_the_parts() -> None:
    mask = np.zeros((60, 80), np.uint8)
    cv2.circle(mask, (20, 20), 10, 255, -1)
    cv2.circle(mask, (60, 40), 12, 255, -1)
    cv2.circle(mask, (60, 40), 4, 0, -1)  # a hole
    contours = segmentation(mask).contours()
    assert len(contours) == 2
    assert all(contour.dtype == np.int32 and contour.shape[1] == 2 for contour in contours)
    filled = np.zeros_like(mask)
    cv2.drawContours(filled, contours, -1, 255, cv2.FILLED)
    np.testing.assert_array_equal(filled > 0, ndimage.binary_fill_holes(mask > 0))
    assert segmentation(np.zeros((9, 9), np.uint8)).contours() == []


def test_probability_agrees_with_the_mask() -> None:
    logits = (np.random.default_rng(1).standard_normal((16, 16)) * 4).astype(np.float32)
    mask = np.where(upsample_logits(logits, (50, 70)) >= 0, 255, 0).astype(np.uint8)
    probability = Segmentation(mask, "fundus", logits, 0.5, Timings(0, 0, 0)).probability()
    assert probability.shape == (50, 70)
    np.testing.assert_array_equal(probability >= 0.5, mask == 255)


def test_the_dictionary_is_plain_json() -> None:
    mask = np.zeros((10, 20), np.uint8)
    mask[2:4, 5:8] = 255
    line = json.loads(json.dumps(segmentation(mask).to_dict(), allow_nan=False))
    assert line == {
        "modality": "fundus",
        "width": 20,
        "height": 10,
        "threshold": 0.5,
        "area": 6,
        "area_fraction": 0.03,
        "bounding_box": [5, 2, 3, 2],
        "centroid": [6.0, 2.5],
        "milliseconds": {"preprocess": 1.0, "inference": 400.0, "postprocess": 2.0},
    }
    empty = segmentation(np.zeros((10, 20), np.uint8)).to_dict()
    assert empty["area"] == 0
    assert empty["bounding_box"] is None
    assert empty["centroid"] is None


def test_the_total_is_the_sum_of_the_stages() -> None:
    assert Timings(0.25, 0.5, 0.125).total == 0.875


@pytest.mark.parametrize("empty", [False, True])
def test_what_a_gpu_measured_of_a_part_is_placed_and_drawn_anew(empty: bool) -> None:
    rng = np.random.default_rng(4)
    frame, crop = rng.integers(0, 256, (50, 70, 3), np.uint8), Crop(20, 5, 40, 30)
    mask = np.zeros((30, 40), np.uint8)
    if not empty:
        mask[6:20, 11:] = 255  # up to the crop's edge, which is none of the frame
    style = OverlayStyle((0, 200, 0), 0.4)
    logits = rng.normal(size=(8, 8)).astype(np.float32)
    alone = Segmentation(mask, "fundus", logits, 0.5, Timings(0, 0, 0))
    measured = Measured(alone.area, alone.bounding_box, alone.centroid)
    of_gpu = replace(alone, measured=measured, drawn=Drawn(draw_overlay(crop.of(frame), mask, style), style))
    placed, plain = of_gpu.placed(crop, (50, 70)), alone.placed(crop, (50, 70))
    assert placed.size == (50, 70)
    assert (placed.area, placed.bounding_box) == (plain.area, plain.bounding_box)
    assert placed.centroid == (None if empty else pytest.approx(plain.centroid))
    assert placed.area == np.count_nonzero(placed.mask)
    np.testing.assert_array_equal(placed.overlay(frame, style), draw_overlay(frame, placed.mask, style))
    assert placed.at(0.2).measured is None
    np.testing.assert_array_equal(placed.at(0.2).mask, alone.at(0.2).placed(crop, (50, 70)).mask)
