"""Mask files to binary masks, and masks to another size, by one rule for training and evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from espmedsam_edge.imaging.decode import read_image

Mask = NDArray[np.uint8]  # (H, W), 0 or 255


class MaskFile(NamedTuple):
    """A mask as read.

    Attributes:
        mask: (H, W) uint8, 0 or 255.
        grey: how many pixels were neither background nor foreground in the file and were cut at half.
    """

    mask: Mask
    grey: int


def read_mask(path: str | Path) -> MaskFile:
    """Read a mask file of any depth or colour model.

    A file of zeros and ones means what it says; in any other, values from 128 (of 255) up are foreground, so a mask
    that went through JPEG and came out with 253s and 4s is read as it was meant. In a coloured mask the brightest
    channel counts.

    Raises:
        UserError: as ``decode.read_image``.
    """
    return binary(read_image(path).max(axis=2))


def binary(values: NDArray[np.uint8]) -> MaskFile:
    """Cut (H, W) uint8 values into a mask; the rule is ``read_mask``'s."""
    if values.max(initial=0) <= 1:
        return MaskFile(values * np.uint8(255), 0)
    grey = values.size - int(np.count_nonzero(values == 0)) - int(np.count_nonzero(values == 255))
    return MaskFile(_cut(values), grey)


def resize_mask(mask: Mask, size: tuple[int, int]) -> Mask:
    """Resize a mask to ``size`` = (H, W): a pixel is foreground where at least half of it is.

    Shrinking averages the area, enlarging interpolates linearly, both with half-pixel centres, so a mask stays in
    register with its image and with upsampled logits. Nearest neighbour would break thin vessels when shrinking and
    leave steps as large as the old pixels when enlarging.
    """
    height, width = size
    smaller = (min(height, mask.shape[0]), min(width, mask.shape[1]))
    resized: Any = mask
    if smaller != mask.shape:
        resized = cv2.resize(resized, (smaller[1], smaller[0]), interpolation=cv2.INTER_AREA)
    if smaller != (height, width):
        resized = cv2.resize(resized, (width, height), interpolation=cv2.INTER_LINEAR)
    return _cut(np.asarray(resized, np.uint8))


def _cut(values: NDArray[np.uint8]) -> Mask:
    return np.asarray(np.where(values >= 128, 255, 0), np.uint8)
