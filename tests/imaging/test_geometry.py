"""Frame to tensor and logits to mask, against torch's interpolation and plain arithmetic."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from espmedsam_edge.bundle import Normalization
from espmedsam_edge.imaging.geometry import (
    logit,
    mask_from_logits,
    preprocess,
    probability_from_logits,
    upsample_logits,
)

torch = pytest.importorskip("torch", reason="torch's interpolation is the independent reference")

SIDES = st.integers(1, 200)


def torch_resize(array: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Bilinear, half-pixel centres, no antialiasing, in float64. (H, W, C) or (H, W)."""
    planes = array[..., None] if array.ndim == 2 else array
    tensor = torch.from_numpy(planes.astype(np.float64)).permute(2, 0, 1)[None]
    resized = torch.nn.functional.interpolate(tensor, size, mode="bilinear", align_corners=False)
    return np.asarray(resized[0].permute(1, 2, 0).numpy().reshape(*size, *array.shape[2:]))


@settings(max_examples=60, deadline=None)
@given(height=SIDES, width=SIDES, image_size=st.sampled_from([64, 128, 192]), seed=st.integers(0, 99))
def test_preprocess_is_torchs_resize_then_normalisation(height: int, width: int, image_size: int, seed: int) -> None:
    frame = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    normalization = Normalization(mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3))
    tensor = preprocess(frame, image_size, normalization)
    assert tensor.shape == (1, 3, image_size, image_size)
    assert tensor.dtype == np.float32
    values = tensor[0].transpose(1, 2, 0) * np.array([0.2, 0.25, 0.3]) + np.array([0.4, 0.5, 0.6])
    expected = torch_resize(frame[..., ::-1], (image_size, image_size)) / 255
    # OpenCV weighs with 11 bits and rounds to 8: half a level, and another for the weights.
    assert np.abs(values - expected).max() <= 1.0 / 255


def test_preprocess_of_a_frame_of_the_right_size_is_exact() -> None:
    frame = np.random.default_rng(1).integers(0, 256, (64, 64, 3), np.uint8)
    normalization = Normalization()
    expected = (frame[..., ::-1] / 255 - np.array(normalization.mean)) / np.array(normalization.std)
    # Two float32 roundings of values up to 2.7.
    np.testing.assert_allclose(preprocess(frame, 64, normalization)[0].transpose(1, 2, 0), expected, atol=1e-6)


def test_preprocess_fills_the_array_it_is_given() -> None:
    frame = np.random.default_rng(2).integers(0, 256, (30, 50, 3), np.uint8)
    batch = np.full((2, 3, 64, 64), 7, np.float32)
    result = preprocess(frame, 64, Normalization(), out=batch[1:2])
    assert np.shares_memory(result, batch)
    assert (batch[0] == 7).all()
    np.testing.assert_array_equal(batch[1:2], preprocess(frame, 64, Normalization()))


def test_preprocess_takes_views() -> None:
    frame = np.random.default_rng(3).integers(0, 256, (64, 128, 3), np.uint8)
    for view in (frame[:, ::-1], frame[::-1, :, ::-1], frame[:, 10:74], frame[:, ::2]):
        copied = preprocess(np.ascontiguousarray(view), 64, Normalization())
        np.testing.assert_array_equal(preprocess(view, 64, Normalization()), copied)


@settings(max_examples=60, deadline=None)
@given(height=SIDES, width=SIDES, side=st.sampled_from([16, 32, 64]), seed=st.integers(0, 99))
def test_logits_are_resized_as_torch_does(height: int, width: int, side: int, seed: int) -> None:
    logits = (np.random.default_rng(seed).standard_normal((side, side)) * 8).astype(np.float32)
    expected = torch_resize(logits, (height, width))
    # float32 weights on values up to about 35.
    np.testing.assert_allclose(upsample_logits(logits, (height, width)), expected, atol=2e-4)


@settings(max_examples=60, deadline=None)
@given(height=SIDES, width=SIDES, threshold=st.floats(0.01, 0.99), seed=st.integers(0, 99))
def test_the_mask_is_where_the_probability_reaches_the_threshold(
    height: int, width: int, threshold: float, seed: int
) -> None:
    logits = (np.random.default_rng(seed).standard_normal((16, 16)) * 5).astype(np.float32)
    mask = mask_from_logits(logits, (height, width), threshold)
    assert mask.shape == (height, width)
    assert mask.dtype == np.uint8
    probability = 1 / (1 + np.exp(-torch_resize(logits, (height, width))))
    clear = np.abs(probability - threshold) > 1e-4  # where float32 cannot decide otherwise
    np.testing.assert_array_equal(mask[clear], np.where(probability >= threshold, 255, 0)[clear])


def test_a_logit_of_zero_is_foreground_at_one_half() -> None:
    assert (mask_from_logits(np.zeros((16, 16), np.float32), (16, 16)) == 255).all()
    assert (mask_from_logits(np.full((16, 16), -1e-7, np.float32), (16, 16)) == 0).all()


def test_a_logit_that_is_no_number_is_background() -> None:
    assert (mask_from_logits(np.full((16, 16), np.nan, np.float32), (20, 20)) == 0).all()


def test_probability_is_the_sigmoid_without_overflow() -> None:
    logits = np.array([[-1e4, -3, 0, 3, 1e4]] * 5, np.float32)
    with np.errstate(all="raise", under="ignore"):
        probability = probability_from_logits(logits, (5, 5))
    np.testing.assert_allclose(probability[0], [0, 0.04742587, 0.5, 0.95257413, 1], atol=1e-6)


@given(st.floats(1e-6, 1 - 1e-6))
def test_logit_inverts_the_sigmoid(probability: float) -> None:
    assert 1 / (1 + np.exp(-logit(probability))) == pytest.approx(probability, rel=1e-9)
    assert logit(0.5) == 0.0
