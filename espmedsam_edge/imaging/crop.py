"""The part of a frame that is segmented: a rectangle that is named, or the picture inside borders and text panels."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, NamedTuple, TypeVar, cast

import cv2
import numpy as np
from numpy.typing import NDArray

from espmedsam_edge.errors import UserError
from espmedsam_edge.imaging.geometry import Frame

AUTO = "auto"
Pixels = TypeVar("Pixels", bound="NDArray[Any]")

_BLACKEST, _BLACK = 8, 24  # the brightest that a border is: true black with noise; video black read as full range
_DENSE, _SPARSE = 0.6, 0.3  # lit pixels of a cell of the picture, and of one beside it that belongs to it
_CELLS = 60  # across the shorter side
_LEAST_PART = 0.1  # of the frame, for what counts as its picture
_LEAST_FILL = 0.4  # of its rectangle; a sonogram's fan has half
_ALIKE = 0.2  # of the largest part, for others that count as well: pictures side by side
_LEAST_CUT = 0.01  # of the frame's side, below which nothing is cut there
_PANEL_RING = 0.15  # of the frame's edge, for the one colour of a panel
_PANEL_BRIGHTEST = 160
_PANEL_SPREAD = 3


class Crop(NamedTuple):
    """A rectangle of a frame, in pixels from its upper left corner."""

    x: int
    y: int
    width: int
    height: int

    def of(self, frame: Pixels) -> Pixels:
        """That part of (H, W, ...): a view, no copy."""
        return cast(Pixels, frame[self.y : self.y + self.height, self.x : self.x + self.width])

    def check(self, size: tuple[int, int]) -> None:
        """Refuse a frame of ``size`` = (H, W) that it does not lie in.

        Raises:
            UserError: it does not.
        """
        if self.x + self.width > size[1] or self.y + self.height > size[0]:
            raise UserError(
                f"crop {self} is not inside the frame of {size[1]}x{size[0]} pixels.",
                "Give X,Y,WIDTH,HEIGHT within it, or auto.",
            )

    def __str__(self) -> str:
        return f"{self.x},{self.y},{self.width},{self.height}"


def parse_crop(text: str) -> Crop | None:
    """``X,Y,WIDTH,HEIGHT``, or None for ``auto``.

    Raises:
        UserError: anything else.
    """
    if text.strip().lower() == AUTO:
        return None
    if not re.fullmatch(r"\s*\d{1,6}(\s*,\s*\d{1,6}){3}\s*", text, re.ASCII):
        raise UserError(f"crop '{text}' is not four whole numbers.", "Give X,Y,WIDTH,HEIGHT in pixels, or auto.")
    crop = Crop(*(int(number) for number in text.split(",")))
    if not crop.width or not crop.height:
        raise UserError(f"crop {crop} is empty.", "Give a width and a height of at least 1.")
    return crop


class PictureFinder:
    """Finds the picture inside the black borders and text panels that endoscopes and ultrasound machines put around it.

    Text is sparse where a picture is dense: a cell of the frame belongs to the picture if most of its pixels are lit,
    and the picture is what hangs together of such cells.
    """

    def __init__(self) -> None:
        self.frames = 0
        self._lit: NDArray[np.uint8] = np.zeros((0, 0), np.uint8)
        self._filled: NDArray[np.float32] = np.zeros((0, 0), np.float32)

    def add(self, frame: Frame) -> None:
        """Look at one more frame, (H, W, 3) uint8 BGR: of the same source, and as large as the first."""
        lit = _lit(frame)
        filled = _cells(lit)
        self._lit = np.maximum(self._lit, lit) if self.frames else lit
        self._filled = np.maximum(self._filled, filled) if self.frames else filled
        self.frames += 1

    def found(self) -> Crop | None:
        """The picture in the frames so far; None where nothing is to be cut, or no picture stands out."""
        box = _dense_box(self._filled) if self.frames else None
        return None if box is None else _to_pixels(box, self._lit)


def find_picture(frames: Iterable[Frame]) -> Crop | None:
    """What ``PictureFinder`` finds in frames of one size and one source."""
    finder = PictureFinder()
    for frame in frames:
        finder.add(frame)
    return finder.found()


def _lit(frame: Frame) -> NDArray[np.uint8]:
    """(H, W), 1 where a pixel is neither black nor of the one colour of a panel, else 0."""
    blue, green, red = cv2.split(frame)
    brightest = np.asarray(cv2.max(cv2.max(blue, green), red), np.uint8)
    lit: NDArray[np.bool_] = np.asarray(brightest > _black(brightest))
    for color in _panel_colors(frame):
        lower, upper = (np.clip(color + step, 0, 255).tolist() for step in (-_PANEL_SPREAD, _PANEL_SPREAD))
        lit &= cv2.inRange(frame, np.array(lower), np.array(upper)) == 0
    return lit.astype(np.uint8)


def _black(brightest: NDArray[np.uint8]) -> int:
    """The brightest that borders are here, from the darkest twentieth of the pixels."""
    counts = np.bincount(brightest[::2, ::2].ravel(), minlength=256)
    darkest = int(np.searchsorted(np.cumsum(counts), 0.05 * counts.sum()))
    return min(_BLACK, darkest + _BLACKEST)


def _panel_colors(frame: Frame) -> list[NDArray[np.int32]]:
    """Colours other than black that a good part of the frame's edge has, pixel for pixel: no camera gives such."""
    thick = max(1, min(frame.shape[:2]) // 200)
    edges = (frame[:thick], frame[-thick:], frame[:, :thick], frame[:, -thick:])
    ring = np.concatenate([edge.reshape(-1, 3) for edge in edges]).astype(np.int32)
    values, counts = np.unique(ring @ np.array([1 << 16, 1 << 8, 1]), return_counts=True)
    colors = []
    for value in values[np.argsort(counts)[::-1][:3]]:
        color = np.array([value >> 16, value >> 8 & 255, value & 255], np.int32)
        near = np.abs(ring - color).max(axis=1) <= _PANEL_SPREAD
        if _BLACK < color.max() <= _PANEL_BRIGHTEST and near.mean() >= _PANEL_RING:
            colors.append(color)
    return colors


def _cells(lit: NDArray[np.uint8]) -> NDArray[np.float32]:
    """The part of lit pixels in each cell of a grid."""
    height, width = lit.shape
    side = max(1.0, min(height, width) / _CELLS)
    grid = (max(1, round(width / side)), max(1, round(height / side)))
    return np.asarray(cv2.resize(lit.astype(np.float32), grid, interpolation=cv2.INTER_AREA), np.float32)


def _dense_box(filled: NDArray[np.float32]) -> tuple[int, int, int, int] | None:
    """(left, top, right, bottom) in cells around what hangs together, without thin parts; None: nothing stands out."""
    square = np.ones((3, 3), np.uint8)
    core, beside = (
        cv2.morphologyEx((filled >= part).astype(np.uint8), cv2.MORPH_OPEN, square, borderType=cv2.BORDER_REPLICATE)
        for part in (_DENSE, _SPARSE)
    )
    count, labels, stats, _ = cv2.connectedComponentsWithStats(beside, connectivity=4)
    areas = np.bincount(labels[core > 0], minlength=count)[1:]  # a part counts by what is dense in it
    if count < 2 or areas.max() < _LEAST_PART * core.size:
        return None
    kept = stats[1:][areas >= _ALIKE * areas.max()]
    left, top = int(kept[:, cv2.CC_STAT_LEFT].min()), int(kept[:, cv2.CC_STAT_TOP].min())
    right = int((kept[:, cv2.CC_STAT_LEFT] + kept[:, cv2.CC_STAT_WIDTH]).max())
    bottom = int((kept[:, cv2.CC_STAT_TOP] + kept[:, cv2.CC_STAT_HEIGHT]).max())
    filling = kept[:, cv2.CC_STAT_AREA].sum() / ((right - left) * (bottom - top))
    return (left, top, right, bottom) if filling >= _LEAST_FILL else None


def _to_pixels(box: tuple[int, int, int, int], lit: NDArray[np.uint8]) -> Crop | None:
    """The box in pixels: from a cell further out inwards to the first row and column that the picture reaches."""
    height, width = lit.shape
    side = max(1.0, min(height, width) / _CELLS)
    across, down = width / max(1, round(width / side)), height / max(1, round(height / side))
    left, right = _edges(lit[round(box[1] * down) : round(box[3] * down)].mean(axis=0), box[0], box[2], across)
    top, bottom = _edges(lit[:, round(box[0] * across) : round(box[2] * across)].mean(axis=1), box[1], box[3], down)
    left, right = _whole_where_near(left, right, width)
    top, bottom = _whole_where_near(top, bottom, height)
    crop = Crop(left, top, right - left, bottom - top)
    return None if crop == (0, 0, width, height) else crop


def _edges(lit: NDArray[np.float64], first: int, last: int, side: float) -> tuple[int, int]:
    start, end = max(0, round((first - 1) * side)), min(len(lit), round((last + 1) * side))
    reached = np.flatnonzero(lit[start:end] >= _LEAST_FILL / 4)
    return (start + int(reached[0]), start + int(reached[-1]) + 1) if len(reached) else (start, end)


def _whole_where_near(start: int, end: int, length: int) -> tuple[int, int]:
    near = _LEAST_CUT * length
    return (0 if start < near else start), (length if length - end < near else end)
