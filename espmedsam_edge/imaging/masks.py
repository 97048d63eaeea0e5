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
_HIGHEST_LABEL = 32  # beside 255 alone: classes and what belongs to none, as Pascal VOC has them
_ANOTHER_COLOUR = 0.005  # of the bright pixels: more are no noise of compression


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
    the same everywhere, transparency is the mask. Signed, wide and floating-point samples count as whole numbers, or
    from 0 to 1 as parts.

    Raises:
        UserError: as ``decode.read_image``, and several values of which none is near the top of the range, or small
            ones and 255, or several bright colours: labels of several kinds or numbered objects, of which only the user
            knows what is the target.
    """
    samples = _unsigned(read_samples(path), str(path))
    if samples.ndim == 2:
        return binary(samples, str(path))
    colours, alpha = samples[..., :3], samples[..., 3:]
    if alpha.size and (colours == colours[:1, :1]).all():
        return binary(alpha[..., 0], str(path))
    brightest = colours.max(axis=2)
    found = binary(brightest, str(path))
    if _colours_of_the_bright(colours, brightest) > 1:
        raise _unclear(str(path), "several colours")
    return found


def _unsigned(samples: NDArray[Any], name: str) -> NDArray[Any]:
    """Samples of other types, as programs that compute write masks: whole numbers as they are, 0 to 1 as 0 to 255."""
    if samples.dtype in (np.uint8, np.uint16):
        return samples
    low, high = (float(end) for end in (samples.min(), samples.max()))
    if low >= 0 and high < 1 << 16 and (samples == np.rint(samples)).all():
        return samples.astype(np.uint8 if high < 1 << 8 else np.uint16)
    if low >= 0 and high <= 1:
        return np.asarray(np.rint(samples * 255.0), np.uint8)
    raise _unclear(name, f"{samples.dtype.name} values from {low:.4g} to {high:.4g}")


def _colours_of_the_bright(colours: NDArray[Any], brightest: NDArray[Any]) -> int:
    """How many colours the pixels over half the largest value have, told by which of their channels are bright."""
    bright = brightest > brightest.max() // 2
    if not bright.any() or (colours[..., :1] == colours).all():
        return 1
    channels = colours[bright] > brightest[bright][:, None] // 2
    counts = np.bincount(channels @ np.array([1, 2, 4]), minlength=8)
    return int((counts > _ANOTHER_COLOUR * channels.shape[0]).sum())


def _unclear(name: str, holds: str) -> UserError:
    return UserError(
        f"cannot read {name} as a mask: it holds {holds}.",
        "Write the target's pixels as 255 and all others as 0.",
        exit_code=1,
    )


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
    if present[-1] < _NEAR_THE_TOP * top or (present[-1] == 255 and present[-2] <= _HIGHEST_LABEL):
        shown = ", ".join(str(value) for value in present[:4]) + (", ..." if len(present) > 4 else "")
        raise _unclear(name, f"the values {shown}")
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
