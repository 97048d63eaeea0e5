"""Mask files to binary masks, and masks to another size, by one rule for training and evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from espmedsam_edge.errors import UserError
from espmedsam_edge.imaging.decode import read_samples

Mask = NDArray[np.uint8]  # (H, W), 0 or 255

_NEAR_THE_TOP = 0.75  # of the full range: what a mask's white comes to through JPEG or resizing


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

    With two values, whichever they are, the higher one is the target; so are zeros and ones, 0 and 127, one colour of a
    palette. Of more values, which JPEG and resizing leave, those from half of the full range up are the target, so a
    mask of 253s and 4s is read as it was meant. In a coloured mask the brightest channel counts; where the colour is
    the same everywhere, transparency is the mask.

    Raises:
        UserError: as ``decode.read_image``, and several values of which none is near the top of the range: labels of
            several kinds or numbered objects, of which only the user knows what is the target.
    """
    samples = read_samples(path)
    if samples.ndim == 2:
        return binary(samples, str(path))
    colours, alpha = samples[..., :3], samples[..., 3:]
    if alpha.size and (colours == colours[:1, :1]).all():
        return binary(alpha[..., 0], str(path))
    return binary(colours.max(axis=2), str(path))


def binary(values: NDArray[Any], name: str = "the mask") -> MaskFile:
    """Cut (H, W) uint8 or uint16 values into a mask; the rule is ``read_mask``'s, ``name`` stands for it in errors.

    Raises:
        UserError: labels of several kinds, or numbered objects.
    """
    counts = np.bincount(values.ravel(), minlength=1)
    present = np.flatnonzero(counts)
    if len(present) <= 2:
        target = values > (present[0] if len(present) == 2 else 0)
        return MaskFile(target.astype(np.uint8) * np.uint8(255), 0)
    top = int(np.iinfo(values.dtype).max)
    if present[-1] < _NEAR_THE_TOP * top:
        shown = ", ".join(str(value) for value in present[:4]) + (", ..." if len(present) > 4 else "")
        raise UserError(
            f"cannot read {name} as a mask: it holds the values {shown}.",
            "Write the target's pixels as 255 and all others as 0.",
            exit_code=1,
        )
    grey = values.size - int(counts[0]) - int(counts[-1] if present[-1] == top else 0)
    return MaskFile(np.asarray(np.where(values > top // 2, 255, 0), np.uint8), grey)


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
