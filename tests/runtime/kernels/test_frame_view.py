"""Frames described by format, address and rows: what is accepted, what is refused and how it is said."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from espmedsam_edge.errors import UserError
from espmedsam_edge.runtime.kernels.frame_view import (
    BT601,
    BT601_FULL,
    BT709,
    BT709_FULL,
    FrameView,
    PixelFormat,
    YuvMatrix,
    view_of_array,
)


@pytest.mark.parametrize(
    ("pixels", "shape", "dtype"),
    [
        (PixelFormat.BGR8, (48, 64, 3), "uint8"),
        (PixelFormat.RGB8, (48, 64, 3), "uint8"),
        (PixelFormat.GRAY8, (48, 64), "uint8"),
        (PixelFormat.GRAY16, (48, 64), "uint16"),
        (PixelFormat.NV12, (72, 64), "uint8"),
    ],
)
def test_an_array_of_every_format(pixels: PixelFormat, shape: tuple[int, ...], dtype: str) -> None:
    assert pixels.shape(64, 48) == shape
    view = view_of_array(pixels, 4096, shape, None, dtype)
    assert view.size == (48, 64)
    assert view.pitch == 64 * pixels.bytes_per_pixel
    assert view.chroma == (4096 + 48 * 64 if pixels is PixelFormat.NV12 else 0)
    array = np.zeros(shape, dtype)
    assert view_of_array(pixels, 4096, shape, array.strides, dtype) == view


def test_formats_are_told_by_shape_and_type() -> None:
    assert view_of_array(None, 0, (2, 2, 3), None, "uint8").format is PixelFormat.BGR8
    assert view_of_array(None, 0, (2, 2), None, "uint8").format is PixelFormat.GRAY8
    assert view_of_array(None, 0, (2, 2), None, "uint16").format is PixelFormat.GRAY16


def test_rows_may_be_any_distance_apart() -> None:
    array = np.zeros((48, 100, 3), np.uint8)[:, 10:74]
    assert view_of_array(None, 0, array.shape, array.strides, "uint8").pitch == 300
    one = np.zeros((5, 3), np.uint8)[:1, :1]  # strides of single rows and columns mean nothing
    assert view_of_array(None, 0, one.shape, (1, 77), "uint8").pitch == 1


@pytest.mark.parametrize(
    ("shape", "strides", "dtype", "words"),
    [
        ((3, 48, 64), None, "uint8", r"a uint8 array of shape \(height, width, 3\); got uint8 \(3, 48, 64\)"),
        ((48, 64, 4), None, "uint8", "got uint8"),
        ((48,), None, "uint8", "got uint8"),
        ((48, 64, 3), None, "float32", "got float32"),
        ((48, 64, 3), (192, -3, 1), "uint8", "not neighbours. Give rows from left to right"),
        ((48, 64, 3), (-192, 3, 1), "uint8", "not neighbours"),
        ((48, 64), (1, 48), "uint8", "not neighbours"),
        (
            (40000, 2),
            None,
            "uint8",
            "a frame of 2x40000 pixels is too large for the GPU. There sides are 1 to 32000 pixels",
        ),
        ((0, 64, 3), None, "uint8", "a frame of 64x0 pixels"),
    ],
)
def test_other_arrays_are_refused(
    shape: tuple[int, ...], strides: tuple[int, ...] | None, dtype: str, words: str
) -> None:
    with pytest.raises(UserError, match=words):
        view_of_array(None, 4096, shape, strides, dtype)


@pytest.mark.parametrize(("width", "height"), [(641, 480), (640, 481)])
def test_nv12_of_odd_sides_is_refused_with_the_remedy(width: int, height: int) -> None:
    with pytest.raises(UserError, match=rf"an NV12 frame of {width}x{height} pixels: .* Crop or pad it to an even"):
        FrameView(PixelFormat.NV12, width, height, 0, 704, 0, 704)


def test_nv12_rows_that_are_no_multiple_of_three_halves() -> None:
    with pytest.raises(UserError, match=r"of shape \(height \* 3 / 2, width\); got uint8 \(71, 64\)"):
        view_of_array(PixelFormat.NV12, 0, (71, 64), None, "uint8")


@pytest.mark.parametrize(
    ("view", "words"),
    [
        ({"format": PixelFormat.BGR8, "pitch": 191}, "has rows of 192 bytes, not 191"),
        ({"format": PixelFormat.NV12, "pitch": 64, "chroma_pitch": 32}, "has rows of 64 bytes, not 32"),
        ({"format": PixelFormat.GRAY16, "pitch": 129}, "odd address or has an odd pitch"),
        ({"format": PixelFormat.GRAY16, "pitch": 128, "window": (5.0, 5.0)}, r"window \(5.0, 5.0\) of a GRAY16 frame"),
    ],
)
def test_rows_and_windows_that_cannot_be(view: dict[str, object], words: str) -> None:
    with pytest.raises(UserError, match=words):
        FrameView(width=64, height=48, pixels=0, **view)  # type: ignore[arg-type]


def test_a_window_becomes_gain_and_bias() -> None:
    frame = FrameView(PixelFormat.GRAY16, 4, 4, 0, 8, window=(1000.0, 3000.0)).parameters()
    assert 1000 * frame.gain + frame.bias == pytest.approx(0, abs=1e-4)
    assert 3000 * frame.gain + frame.bias == pytest.approx(255)


def _convert(matrix: YuvMatrix, y: int, u: int, v: int) -> tuple[int, int, int]:
    luma = max(y - matrix.luma_offset, 0) * matrix.luma_gain
    u, v = u - 128, v - 128
    parts = (matrix.blue_u * u, matrix.green_u * u + matrix.green_v * v, matrix.red_v * v)
    blue, green, red = (min(max((luma + part + (1 << 19)) >> 20, 0), 255) for part in parts)
    return blue, green, red


def test_bt601_is_opencvs_conversion_to_the_bit() -> None:
    nv12 = np.random.default_rng(0).integers(0, 256, (3, 2), np.uint8)
    expected = cv2.cvtColor(nv12, cv2.COLOR_YUV2BGR_NV12)
    u, v = (int(value) for value in nv12[2])
    for row in range(2):
        for column in range(2):
            assert _convert(BT601, int(nv12[row, column]), u, v) == tuple(expected[row, column])


@pytest.mark.parametrize(
    ("matrix", "red", "green", "blue", "black", "white"),
    [  # Kr, Kg, Kb of the standards
        (BT601_FULL, 0.299, 0.587, 0.114, 0, 255),
        (BT709, 0.2126, 0.7152, 0.0722, 16, 235),
        (BT709_FULL, 0.2126, 0.7152, 0.0722, 0, 255),
    ],
)
def test_the_standards_matrices_undo_their_encoding(
    matrix: YuvMatrix, red: float, green: float, blue: float, black: int, white: int
) -> None:
    swing = 224 / 255 if black else 1.0
    for r, g, b in [(255, 255, 255), (0, 0, 0), (200, 30, 60), (10, 180, 90), (25, 60, 220)]:
        luma = red * r + green * g + blue * b
        y = round(black + luma * (white - black) / 255)
        u = round(128 + (b - luma) / (2 * (1 - blue)) * swing)
        v = round(128 + (r - luma) / (2 * (1 - red)) * swing)
        # Y, U and V are rounded to 8 bits: half a step of each, times the largest factors of the matrix
        np.testing.assert_allclose(_convert(matrix, y, u, v), (b, g, r), atol=2.5)
