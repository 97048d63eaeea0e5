"""Frame to network input and network output to mask, in NumPy and OpenCV.

One definition for training, calibration, evaluation and the runtime; the CUDA kernels are tested against it.
Frames are (H, W, 3) uint8 BGR, OpenCV's order.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from espmedsam_edge.bundle import Normalization

Frame = NDArray[np.uint8]  # (H, W, 3), BGR
Tensor = NDArray[np.float32]

_BAND = 1 << 24  # pixels of a mask that are made at once


def preprocess(frame: Frame, image_size: int, normalization: Normalization, out: Tensor | None = None) -> Tensor:
    """Stretch a frame to a square, scale to 0..1, normalise, and lay it out as the network's input.

    Bilinear with half-pixel centres and no antialiasing (``cv2.INTER_LINEAR``), rounded to 8 bits before
    normalisation, as the published code does.

    Args:
        frame: (H, W, 3) uint8 BGR.
        image_size: S.
        normalization: RGB mean and std for 0..1 values.
        out: a (1, 3, S, S) float32 array to fill instead of a new one.

    Returns:
        (1, 3, S, S) float32, RGB planes.
    """
    frame = stretch(frame, image_size)
    if out is None:
        out = np.empty((1, 3, image_size, image_size), np.float32)
    blue_green_red = cv2.split(frame)  # contiguous planes: twice as fast as arithmetic on strided ones
    for channel, (mean, std) in enumerate(zip(normalization.mean, normalization.std, strict=True)):
        plane = out[0, channel]
        np.multiply(blue_green_red[2 - channel], np.float32(1 / (255 * std)), out=plane, dtype=np.float32)
        plane -= np.float32(mean / std)
    return out


def stretch(frame: Frame, image_size: int) -> Frame:
    """Resize a frame to the network's square, (S, S, 3) uint8, without keeping its proportions; see ``preprocess``."""
    if frame.shape[:2] == (image_size, image_size):
        return frame
    return _u8(cv2.resize(frame, (image_size, image_size), interpolation=cv2.INTER_LINEAR))


def upsample_logits(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear resize of (h, w) float32 logits to ``size`` = (H, W), half-pixel centres, no antialiasing."""
    height, width = size
    resized: Any = cv2.resize(logits, (width, height), interpolation=cv2.INTER_LINEAR)
    return np.asarray(resized, np.float32)


def mask_from_logits(logits: Tensor, size: tuple[int, int], threshold: float = 0.5) -> NDArray[np.uint8]:
    """The mask at frame size: 255 where sigmoid(logit) ≥ ``threshold`` (a probability in 0..1), else 0.

    Args:
        logits: (h, w) float32.
        size: (H, W) of the frame.
    """
    least = np.float32(logit(threshold))
    if size[0] * size[1] <= _BAND:
        return _u8((upsample_logits(logits, size) >= least).view(np.uint8) * np.uint8(255))
    mask = np.empty(size, np.uint8)
    for start, band in _upsampled_bands(logits, size):
        np.multiply(band >= least, np.uint8(255), out=mask[start : start + len(band)], dtype=np.uint8)
    return mask


def _upsampled_bands(logits: Tensor, size: tuple[int, int]) -> Iterator[tuple[int, Tensor]]:
    """What ``upsample_logits`` gives, in bands of rows: the first row's number and (rows, W) float32.

    A large picture's logits would be four times its mask; rows are interpolated as bilinear resizing does, one side
    after the other.
    """
    height, width = size
    rows = max(1, _BAND // width)
    for start in range(0, height, rows):
        centres = (np.arange(start, min(height, start + rows)) + 0.5) * (len(logits) / height) - 0.5
        centres = np.clip(centres, 0, len(logits) - 1)
        above = np.floor(centres).astype(int)
        first, last = int(above[0]), min(len(logits), int(above[-1]) + 2)
        wide = upsample_logits(logits[first:last], (last - first, width))
        below = np.minimum(above + 1, len(logits) - 1)
        share = np.asarray(centres - above, np.float32)[:, None]
        yield start, wide[above - first] * (1 - share) + wide[below - first] * share


def probability_from_logits(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """Foreground probability at frame size, (H, W) float32 in 0..1: sigmoid of the resized logits.

    Paper eq. 7 applies the sigmoid before the interpolation; the published code resizes logits, and so do we: the mask
    is then ``upsampled logit ≥ 0`` and no exponential is computed for it.
    """
    upsampled = upsample_logits(logits, size)
    return np.asarray(0.5 * (1 + np.tanh(0.5 * upsampled)), np.float32)


def logit(probability: float) -> float:
    """The inverse of the sigmoid; 0.5 gives exactly 0."""
    return math.log(probability / (1 - probability))


def _u8(array: Any) -> NDArray[np.uint8]:
    return np.asarray(array, np.uint8)
