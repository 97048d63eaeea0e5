"""A mask's objects: its connected parts, those that touch each other taken apart where they are narrow."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from espmedsam_edge.errors import UserError
from espmedsam_edge.machine.installation import why_missing

Mask = NDArray[np.uint8]  # (H, W), 0 or 255
Labels = NDArray[np.int32]  # (H, W), 0 outside, objects from 1
Box = tuple[slice, slice]  # rows, columns

NARROWER = 0.97
"""Two objects meet where a part is narrower than this share of the smaller one's width, of both without ``ROUNDED``."""

ROUNDED = 2.0
"""Pixels of half a width; what smooths the edges hides so much of the necks between small objects."""

SHEET = 1 << 9
"""Pixels a side of what is taken apart at once, if the parts are not larger; each pixel takes some 200 bytes."""

FINE = 1 << 22
"""Pixels up to which the box around a part is taken apart with lines of half a pixel."""

LARGEST = 1 << 24
"""Pixels of the box around a part that is taken apart."""

SPECK = 3
"""Pixels of a part that has no neck, whatever its shape."""

BAND = 1 << 20
"""Pixels that are counted at once."""

_SMOOTH = 1.0  # lines; with it the stairs along the edges of small objects are no necks
_APART = 3  # pixels between parts on a sheet, of which the blur reaches two
_AROUND = np.ones((3, 3), np.uint8)
_FLOODS, _FEW = 64, 128  # rounds of a flood for all pixels at once, and the share of them that are done one by one
_ROUND, _PATIENCE = 256, 1 << 20  # pixels that a round of a flood counts as, and all of it beyond those of its picture
_THREADS = 2
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
    found = cv2.connectedComponentsWithStats(mask, connectivity=8, ltype=cv2.CV_32S)
    labels, boxes = np.asarray(found[1], np.int32), np.asarray(found[2], np.int64)
    for number, cut in cuts(labels, boxes, np.arange(1, len(boxes))):
        np.copyto(labels[box_of(boxes, number)], cut, where=cut > 0)
    return in_order(labels)


def box_of(boxes: NDArray[np.int64], number: int) -> Box:
    """Where a part is in the picture."""
    x, y, width, height = boxes[number, :4].tolist()
    return np.s_[y : y + height, x : x + width]


def cuts(parts: Labels, boxes: NDArray[np.int64], chosen: NDArray[np.int64]) -> Iterator[tuple[int, Labels]]:
    """The parts that are several objects: the number of each, and in its box its objects, 0 beside it.

    Each part is taken for itself, whatever is around it. The numbers of objects follow those of the parts.

    Args:
        parts: (H, W), the parts' numbers; where a part was given, others may be written.
        boxes: (N, 5) of each number the left, top, width, height and area.
        chosen: the numbers of parts that are looked at.

    Raises:
        UserError: scikit-image is missing.
    """
    if (reason := why_missing("skimage", "objects")) is not None:
        raise UserError(f"objects that touch cannot be taken apart: {reason}")
    last = len(boxes) - 1
    for sheet, numbers, (cut, several) in _in_threads(
        _drawn(sheet, parts, boxes) for sheet in _sheets(boxes, chosen, parts.shape)
    ):
        for place in several:
            number, where = sheet.parts[place - 1]
            yield number, np.where(numbers[where] == place, cut[where] + np.int32(last), 0)
        last += int(cut.max(initial=0))


class _Sheet(NamedTuple):
    """Parts side by side: the height and width, and of each part the number and its place."""

    size: tuple[int, int]
    parts: list[tuple[int, Box]]


def _sheets(boxes: NDArray[np.int64], chosen: NDArray[np.int64], size: tuple[int, ...]) -> Iterator[_Sheet]:
    """Parts in rows, each with background around it.

    One that reaches the picture's edge is alone, on a sheet that ends there, as it may go on behind it; so is one that
    is larger than a sheet. Specks, and what is larger than ``LARGEST``, are on none.
    """
    x, y, width, height, area = boxes[chosen, :5].T
    alone = (x == 0) | (y == 0) | (x + width == size[1]) | (y + height == size[0])
    alone |= np.maximum(width, height) + 2 * _APART > SHEET
    wanted = (area > SPECK) & (width * height <= LARGEST)
    for number in chosen[wanted & alone].tolist():
        left, top, across, down = boxes[number, :4].tolist()
        y, x = min(_APART, top), min(_APART, left)
        below, right = min(_APART, size[0] - top - down), min(_APART, size[1] - left - across)
        yield _Sheet((y + down + below, x + across + right), [(number, np.s_[y : y + down, x : x + across])])
    others = chosen[wanted & ~alone]
    others = others[np.argsort(-boxes[others, 3], kind="stable")]
    parts: list[tuple[int, Box]] = []
    left = top = _APART
    wide = high = 0
    for number, (across, down) in zip(others.tolist(), boxes[others, 2:4].tolist(), strict=True):
        if left + across + _APART > SHEET:
            left, top = _APART, high
        if top + down + _APART > SHEET:
            yield _Sheet((high, wide), parts)
            parts, left, top, wide, high = [], _APART, _APART, 0, 0
        parts.append((number, np.s_[top : top + down, left : left + across]))
        left += across + _APART
        wide, high = max(wide, left), max(high, top + down + _APART)
    if parts:
        yield _Sheet((high, wide), parts)


def _drawn(sheet: _Sheet, parts: Labels, boxes: NDArray[np.int64]) -> tuple[_Sheet, Labels]:
    """A sheet with its parts, each with its place in the list, from 1."""
    numbers = np.zeros(sheet.size, np.int32)
    for place, (number, where) in enumerate(sheet.parts, 1):
        np.copyto(numbers[where], place, where=parts[box_of(boxes, number)] == number)
    return sheet, numbers


def _in_threads(sheets: Iterable[tuple[_Sheet, Labels]]) -> Iterator[tuple[_Sheet, Labels, tuple[Labels, list[int]]]]:
    """Each sheet with what ``_cut`` makes of it, in order; the next ones are cut meanwhile, but for large ones."""
    waiting: deque[tuple[_Sheet, Labels, Future[tuple[Labels, list[int]]]]] = deque()

    def first() -> tuple[_Sheet, Labels, tuple[Labels, list[int]]]:
        sheet, numbers, cut = waiting.popleft()
        return sheet, numbers, cut.result()

    with ThreadPoolExecutor(_THREADS, "espmedsam-objects") as pool:
        for sheet, numbers in sheets:
            waiting.append((sheet, numbers, pool.submit(_cut, numbers)))
            while waiting and (len(waiting) > _THREADS or numbers.size > SHEET * SHEET):
                yield first()
        while waiting:
            yield first()


def _cut(parts: Labels) -> tuple[Labels, list[int]]:
    """The objects of parts, numbered from 1, and the numbers of the parts that are several; the others are left out."""
    from skimage.morphology import local_maxima
    from skimage.segmentation import watershed

    # Twice as fine, each second line is the mask's own, and those between have edges that are less of a staircase.
    mask = parts > 0
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
    own = np.pad(parts, 1)
    seeds *= own > 0
    at = np.flatnonzero(seeds)
    whose = np.zeros(int(seeds.max(initial=0)) + 1, np.int64)
    whose[seeds.flat[at]] = own.flat[at]
    several = np.bincount(whose[whose > 0], minlength=int(parts.max(initial=0)) + 1) > 1
    if not several.any():
        return np.zeros_like(parts), []
    cut = watershed(-away, seeds, mask=several[own], connectivity=2)[1:-1, 1:-1]
    return np.asarray(cut, np.int32), np.flatnonzero(several).tolist()


def _flooded(level: Any, ceiling: Any) -> Any:
    """``reconstruction`` by dilation, of whole numbers with a border of zeros; it sorts all pixels, and few change."""
    for _ in range(_FLOODS):
        wider = np.minimum(cv2.dilate(level, _AROUND), ceiling)
        changed = wider != level
        level = wider
        if cv2.countNonZero(changed.view(np.uint8)) < level.size // _FEW:
            break
    at, low, high = np.flatnonzero(changed), level.ravel(), ceiling.ravel()
    width = ceiling.shape[1]
    around = [down + across for down in (-width, 0, width) for across in (-1, 0, 1) if down or across]
    patience = level.size + _PATIENCE
    while len(at):
        patience -= len(at) + _ROUND
        if patience < 0:
            from skimage.morphology import reconstruction

            return reconstruction(level, ceiling)
        risen = []
        for step in around:
            there = at + step
            flood = np.minimum(low[at], high[there])
            higher = flood > low[there]
            low[there[higher]] = flood[higher]
            risen.append(there[higher])
        at = np.unique(np.concatenate(risen))
    return level


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
