"""Metrics against MONAI, on shapes that break shortcuts: borders, single pixels, holes, thin lines, empty masks."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from espmedsam_edge.errors import UserError
from espmedsam_edge.metrics import Scores, dice, scores

torch = pytest.importorskip("torch", reason="MONAI, the reference, needs torch (extra train)")
monai_metrics = pytest.importorskip("monai.metrics", reason="MONAI is the reference (extra train)")

# MONAI computes in float32, and interpolates between ranks there: its 95th percentile of distances that are all 1.5
# came out as 1.4999984, which is 13 rounding steps.
RELATIVE = 2e-6


def _monai(prediction: np.ndarray, truth: np.ndarray) -> Scores:
    a, b = (torch.from_numpy(np.ascontiguousarray(m != 0)).float()[None, None] for m in (prediction, truth))
    values = [
        monai_metrics.DiceMetric(include_background=True)(a, b),
        monai_metrics.MeanIoU(include_background=True)(a, b),
        monai_metrics.HausdorffDistanceMetric(include_background=True)(a, b),
        monai_metrics.HausdorffDistanceMetric(include_background=True, percentile=95)(a, b),
    ]
    return Scores(*(float(value) for value in values))


def _assert_as_monai(prediction: np.ndarray, truth: np.ndarray) -> None:
    ours, theirs = scores(prediction, truth), _monai(prediction, truth)
    assert ours.to_dict() == pytest.approx(theirs.to_dict(), rel=RELATIVE, abs=1e-6)


def _disc(size: tuple[int, int], center: tuple[float, float], radius: float) -> np.ndarray:
    y, x = np.mgrid[: size[0], : size[1]]
    return (((y - center[0]) ** 2 + (x - center[1]) ** 2 <= radius**2) * 255).astype(np.uint8)


@pytest.mark.parametrize(
    ("size", "first", "second"),
    [
        ((64, 64), ((30, 30), 12), ((34, 28), 14)),
        ((40, 150), ((20, 20), 9), ((22, 130), 5)),  # far apart, wide image
        ((150, 40), ((0, 0), 20), ((149, 39), 20)),  # cut by opposite corners
        ((33, 77), ((16, 38), 100), ((16, 38), 6)),  # one is the whole image
    ],
)
def test_discs_score_as_in_monai(size: tuple[int, int], first: tuple, second: tuple) -> None:
    _assert_as_monai(_disc(size, *first), _disc(size, *second))


def test_identical_masks_are_perfect() -> None:
    mask = _disc((50, 60), (20, 30), 10)
    assert scores(mask, mask) == Scores(1.0, 1.0, 0.0, 0.0)


def test_single_pixels_are_apart_by_their_distance() -> None:
    first, second = np.zeros((2, 20, 30), np.uint8)
    first[0, 0], second[12, 5] = 255, 255
    assert scores(first, second) == Scores(0.0, 0.0, 13.0, 13.0)
    _assert_as_monai(first, second)


def test_holes_have_edges_too() -> None:
    ring = _disc((80, 80), (40, 40), 30) - _disc((80, 80), (40, 40), 15)
    _assert_as_monai(ring, _disc((80, 80), (40, 40), 30))


def test_noisy_masks_at_full_size_score_as_in_monai() -> None:
    rng = np.random.default_rng(3)
    truth = _disc((512, 640), (250, 300), 150)
    noisy = truth.copy()
    noisy[rng.random(truth.shape) < 0.002] ^= 255
    _assert_as_monai(noisy, truth)
    _assert_as_monai(truth, noisy)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_masks_with_foreground_score_as_in_monai(data: st.DataObject) -> None:
    shape = data.draw(st.tuples(st.integers(2, 16), st.integers(2, 16)))
    first, second = (data.draw(arrays(np.bool_, shape)) for _ in range(2))
    if first.any() and second.any():
        _assert_as_monai(first, second)
    assert scores(first, second) == scores(second, first)


@pytest.mark.parametrize("dtype", [bool, np.uint8, np.int64])
def test_any_nonzero_value_is_foreground(dtype: type) -> None:
    first, second = _disc((30, 30), (15, 15), 8), _disc((30, 30), (12, 15), 9)
    expected = scores(first, second)
    assert scores((first != 0).astype(dtype), (second != 0).astype(dtype)) == expected
    assert dice(first, second) == expected.dice


def test_two_empty_masks_agree() -> None:
    empty = np.zeros((9, 12), np.uint8)
    assert scores(empty, empty) == Scores(1.0, 1.0, 0.0, 0.0)


def test_an_empty_mask_against_a_full_one_costs_the_diagonal() -> None:
    empty, full = np.zeros((10, 14), np.uint8), np.full((10, 14), 255, np.uint8)
    expected = Scores(0.0, 0.0, math.hypot(9, 13), math.hypot(9, 13))
    assert scores(empty, full) == scores(full, empty) == expected


@pytest.mark.parametrize("shapes", [((4, 4), (4, 5)), ((4, 4, 1), (4, 4, 1)), ((0, 4), (0, 4))])
def test_masks_that_cannot_be_compared_are_refused(shapes: tuple) -> None:
    with pytest.raises(UserError, match="cannot compare masks"):
        scores(np.zeros(shapes[0], np.uint8), np.zeros(shapes[1], np.uint8))


def test_scores_take_integer_views_of_any_layout() -> None:
    first = _disc((40, 50), (18, 22), 9)
    second = _disc((40, 50), (20, 25), 10)
    transposed, straight = scores(first.T, second.T), scores(first, second)
    assert transposed.to_dict() == pytest.approx(straight.to_dict(), rel=RELATIVE)
