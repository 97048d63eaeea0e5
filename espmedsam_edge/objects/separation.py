"""A mask's objects: its connected parts, those that touch each other taken apart where they are narrow."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from espmedsam_edge.errors import UserError
from espmedsam_edge.machine.installation import why_missing

Mask = NDArray[np.uint8]  # (H, W), 0 or 255
Labels = NDArray[np.int32]  # (H, W), 0 outside, objects from 1

NARROWER = 0.97
"""Two objects meet where a part is narrower than this share of the smaller one's width, of both without ``ROUNDED``."""

ROUNDED = 2.0
"""Pixels of half a width; what smooths the edges hides so much of the necks between small objects."""

AT_ONCE = 1 << 20
"""Pixels that are taken apart at once, if the parts in them are not larger; each takes some 200 bytes."""

FINE = 1 << 22
"""Pixels up to which the box around a part is taken apart with lines of half a pixel."""

LARGEST = 1 << 24
"""Pixels of the box around a part that is taken apart."""

_SPARSE = 1 << 18  # pixels of a group's box that parts need not fill

BAND = 1 << 20
"""Pixels that are counted at once."""

_SMOOTH = 1.0  # lines; with it the stairs along the edges of small objects are no necks
_FLOODS = 64  # pixels that a widest place is flooded by before all of the rest is at once
_AROUND = np.ones((3, 3), np.uint8)
_STEPS = 4096  # of a logarithm's unit: whole numbers, so that what is level is equal


def separated(mask: Mask, *, split: bool = True) -> Labels:
    """Number a mask's objects from 1, in the order of their first pixels.

    With ``split``, an 8-connected part with several widest places is cut at the necks between them: watershed on the
    distance to the background, from those of its maxima that stand out by a share of their height (``NARROWER``). Parts
    of which the box has more than ``LARGEST`` pixels are not.

    Raises:
        UserError: scikit-image is missing, and ``split`` was asked for.
    """
    if not mask.any():
        return np.zeros(mask.shape, np.int32)
    if not split:
        return np.asarray(cv2.connectedComponents(mask, connectivity=8, ltype=cv2.CV_32S)[1], np.int32)
    if (reason := why_missing("skimage", "objects")) is not None:
        raise UserError(f"objects that touch cannot be taken apart: {reason}")
    found = cv2.connectedComponentsWithStats(mask, connectivity=8, ltype=cv2.CV_32S)
    parts, boxes = np.asarray(found[1], np.int32), np.asarray(found[2], np.int64)
    labels = np.zeros_like(parts)
    last = 0
    for chosen, box in _groups(boxes):
        own = chosen[parts[box]]
        cut = _cut(own)
        np.copyto(labels[box], cut + last, where=own)
        last += int(cut.max())
    large = np.flatnonzero(boxes[1:, 2] * boxes[1:, 3] > LARGEST) + 1
    numbers = np.zeros(len(boxes), np.int32)
    numbers[large] = np.arange(last + 1, last + 1 + len(large))
    labels += numbers[parts]
    return in_order(labels)


def _groups(boxes: NDArray[np.int64]) -> Iterator[tuple[NDArray[np.bool_], tuple[slice, slice]]]:
    """Parts that lie near each other: which they are, and the box around them, of at most ``AT_ONCE`` pixels.

    The boxes of all groups are not many times the picture, as groups fill theirs. A part that is larger is alone, and
    in no group if it is larger than ``LARGEST``.
    """
    x, y, width, height = boxes[:, :4].T
    order = np.lexsort((x, y))
    order = order[(order > 0) & (width * height <= LARGEST)[order]]
    sides = np.stack([x, y, x + width, y + height], axis=1)[order].tolist()
    start = 0
    while start < len(order):
        left, top, right, bottom = sides[start]
        own, end = (right - left) * (bottom - top), start + 1
        while end < len(sides):
            a, b, c, d = sides[end]
            wide = min(left, a), min(top, b), max(right, c), max(bottom, d)
            around, more = (wide[2] - wide[0]) * (wide[3] - wide[1]), own + (c - a) * (d - b)
            if around > AT_ONCE or around > max(_SPARSE, 8 * more):
                break
            (left, top, right, bottom), own, end = wide, more, end + 1
        chosen = np.zeros(len(boxes), bool)
        chosen[order[start:end]] = True
        yield chosen, np.s_[max(0, top - 1) : bottom + 1, max(0, left - 1) : right + 1]  # with background around it
        start = end


def _cut(mask: NDArray[np.bool_]) -> Labels:
    """Some parts taken apart, numbered from 1."""
    from skimage.morphology import local_maxima
    from skimage.segmentation import watershed

    # Twice as fine, each second line is the mask's own, and those between have edges that are less of a staircase.
    step = 2 if mask.size <= FINE else 1
    inside = mask if step == 1 else cv2.pyrUp(mask.view(np.uint8) * np.uint8(255)) > 127
    away: Any = cv2.distanceTransform(inside.view(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    away = np.minimum(away, np.float32(max(inside.shape)))  # no background: no distance to it
    away = np.pad(cv2.GaussianBlur(away, (0, 0), _SMOOTH) * inside / np.float32(step), step)
    # Of two logarithms the difference is a ratio: a maximum counts if the way to a higher one leads through a neck.
    # One pixel above what is rounded the logarithm goes over into a straight line, for specks.
    line = np.minimum(away, np.float32(ROUNDED + 1))
    steps = np.rint(_STEPS * (np.log(np.maximum(away - np.float32(ROUNDED), np.float32(1))) + line))
    level = _flooded(np.maximum(steps + np.float32(round(_STEPS * np.log(NARROWER))), 0), steps)
    peaks = (local_maxima(level) & (away > 0)).view(np.uint8)
    seeds: Any = cv2.connectedComponents(peaks, connectivity=8, ltype=cv2.CV_32S)[1]
    if step == 2:  # a seed between lines is one on the lines beside it, of which one is inside
        seeds = cv2.dilate(seeds.astype(np.float32), _AROUND)[::2, ::2].astype(np.int32)
        away = away[::2, ::2]
    return np.asarray(watershed(-away, seeds, mask=away > 0, connectivity=2)[1:-1, 1:-1], np.int32)


def _flooded(level: Any, ceiling: Any) -> Any:
    """``reconstruction`` by dilation, of whole numbers; it sorts all pixels, which few need."""
    for _ in range(_FLOODS):
        wider = np.minimum(cv2.dilate(level, _AROUND), ceiling)
        if np.array_equal(wider, level):
            return level
        level = wider
    from skimage.morphology import reconstruction

    return reconstruction(level, ceiling)


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
    """The same objects, numbered from 1 without gaps in the order of their first pixels; in place."""
    height, width = labels.shape
    first = np.full(int(labels.max(initial=0)) + 1, -1, np.int64)
    rows = max(1, BAND // max(1, width))
    for start in range((height - 1) // rows * rows, -1, -rows):
        band = labels[start : start + rows].ravel()
        first[band[::-1]] = start * width + np.arange(band.size)[::-1]  # the last word, the first pixel's, counts
    first[0] = -1
    present = np.flatnonzero(first >= 0)
    numbers = np.zeros(first.size, np.int32)
    numbers[present[np.argsort(first[present])]] = np.arange(1, present.size + 1, dtype=np.int32)
    for start in range(0, height, rows):
        labels[start : start + rows] = numbers[labels[start : start + rows]]
    return labels
