"""A mask's objects: its connected parts, those that touch each other taken apart where they are narrow."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from espmedsam_edge.errors import UserError
from espmedsam_edge.machine.installation import why_missing

Mask = NDArray[np.uint8]  # (H, W), 0 or 255
Labels = NDArray[np.int32]  # (H, W), 0 outside, objects from 1

NARROWER = 0.94
"""Two objects meet where a part is narrower than this share of the smaller one's width."""

_BLUNT = 1.0  # pixels; keeps the stairs along the edges of small objects from being necks
_STEPS = 4096  # of a logarithm's unit: whole numbers, so that what is level is equal


def separated(mask: Mask, *, split: bool = True) -> Labels:
    """Number a mask's objects from 1, in the order of their first pixels.

    With ``split``, an 8-connected part with several widest places is cut at the necks between them: watershed on the
    distance to the background, from those of its maxima that stand out by a share of their height (``NARROWER``).

    Raises:
        UserError: scikit-image is missing, and ``split`` was asked for.
    """
    parts = _parts(mask)
    if not split:
        return parts
    if (reason := why_missing("skimage", "objects")) is not None:
        raise UserError(f"objects that touch cannot be taken apart: {reason}")
    return _cut(parts) if parts.any() else parts


def _parts(mask: Mask) -> Labels:
    return np.asarray(cv2.connectedComponents(mask, connectivity=8, ltype=cv2.CV_32S)[1], np.int32)


def _cut(parts: Labels) -> Labels:
    """The parts, taken apart."""
    from skimage.morphology import local_maxima, reconstruction
    from skimage.segmentation import watershed

    mask = (parts > 0).view(np.uint8)
    x, y, width, height = cv2.boundingRect(mask)
    inside = np.s_[y : y + height, x : x + width]
    away: Any = cv2.distanceTransform(mask, cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    away = np.pad(np.minimum(away[inside], np.float32(max(mask.shape))), 1)  # no background: no distance to it
    # Of two logarithms the difference is a ratio: a maximum counts if the way to a higher one leads through a neck.
    steps = np.rint(_STEPS * np.log1p(away / _BLUNT)).astype(np.int32)
    level = reconstruction(steps + round(_STEPS * np.log(NARROWER)), steps)
    peaks = (local_maxima(level) & (away > 0)).view(np.uint8)
    seeds = cv2.connectedComponents(peaks, connectivity=8, ltype=cv2.CV_32S)[1]
    labels = np.zeros_like(parts)
    labels[inside] = watershed(-away, seeds, mask=away > 0, connectivity=2)[1:-1, 1:-1]
    return in_order(labels)


def kept(labels: Labels, min_area: int | None, largest: int | None) -> Labels:
    """The objects of at least ``min_area`` pixels, and of these the ``largest`` ones (the first of equal ones), anew
    numbered."""
    areas = np.bincount(labels.ravel())
    areas[0] = 0
    stay = areas >= max(1, min_area or 1)
    if largest is not None and stay.sum() > largest:
        order = np.argsort(-np.where(stay, areas, 0), kind="stable")
        stay[order[largest:]] = False
    numbers = np.cumsum(stay, dtype=np.int32) * stay
    return np.asarray(numbers[labels], np.int32)


def in_order(labels: Labels) -> Labels:
    """The same objects, numbered from 1 without gaps in the order of their first pixels."""
    inside = labels[labels > 0]
    present, first = np.unique(inside, return_index=True)
    numbers = np.zeros(int(present[-1]) + 1 if present.size else 1, np.int32)
    numbers[present[np.argsort(first)]] = np.arange(1, present.size + 1, dtype=np.int32)
    return np.asarray(numbers[labels], np.int32)
