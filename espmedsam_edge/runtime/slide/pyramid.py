"""A slide as levels of a pyramid, of which any part can be read, whatever its file is."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import cv2
import numpy as np
from numpy.typing import NDArray

from espmedsam_edge.closing import Closing
from espmedsam_edge.errors import UserError
from espmedsam_edge.imaging.crop import Crop
from espmedsam_edge.imaging.geometry import Frame
from espmedsam_edge.runtime.slide.apart import SlideProcess

log = logging.getLogger(__name__)

GLASS = 255
"""What stands for what is not there: outside the slide, and tiles that scanners leave out."""

_CACHED = 128 << 20  # bytes of decoded tiles
_LEAST_MPP, _MOST_MPP = 0.01, 100.0
_ENTRY = 200  # bytes that an entry of the cache takes, were it empty


class StoredLevel(Protocol):
    """A level as a file holds it: rows of tiles of one size."""

    @property
    def size(self) -> tuple[int, int]:
        """(H, W) in pixels."""

    @property
    def tile(self) -> tuple[int, int]:
        """(H, W) of a tile."""

    @property
    def there(self) -> NDArray[np.uint8]:
        """For each tile, counted row by row, 0 where it is left out."""

    def part(self, index: int) -> Frame:
        """A tile, (h, w, 3) uint8 BGR.

        Raises:
            UserError: the slide is given up.
            Exception: any other: the tile is damaged.
        """


class Storage(Protocol):
    """An open file of a slide: its levels, the largest first, and micrometres a pixel of that as it states them."""

    @property
    def levels(self) -> Sequence[StoredLevel]:
        """At least one."""

    @property
    def stated(self) -> float | None:
        """May be what cannot be."""

    def close(self) -> None:
        """Close the file."""


@dataclass(frozen=True)
class Level:
    """One level of the pyramid.

    Attributes:
        width, height: pixels.
        downsample: pixels of the largest level that one of this spans.
    """

    width: int
    height: int
    downsample: float


class Slide(Closing):
    """An open slide. Used by one thread at a time.

    Example:
        >>> with Slide("tissue.svs") as slide:  # doctest: +SKIP
        ...     part = slide.read(0, 10_000, 8_000, 512, 512)

    Attributes:
        levels: the largest first.
        mpp: micrometres a pixel of the largest level; None: the file does not say.
        damaged: how many tiles could not be read so far; glass stands for them.

    Raises:
        UserError: not such a file, or one that can only be read whole, or that takes too much to open. Reading raises
            it where tiles take far longer than their size accounts for.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.damaged: set[tuple[int, int]] = set()
        self._cache: OrderedDict[tuple[int, int], Frame | None] = OrderedDict()
        self._cached = 0
        self._storage: Storage = SlideProcess(self.path)
        sizes = [level.size for level in self._storage.levels]
        self.levels = [Level(width, height, sizes[0][1] / width) for height, width in sizes]
        self.mpp = _plausible(self.path, self._storage.stated)

    def read(self, level: int, x: int, y: int, width: int, height: int, only: Iterable[Crop] | None = None) -> Frame:
        """A part of a level, (height, width, 3) uint8 BGR; what lies outside is glass.

        Args:
            level, x, y, width, height: which.
            only: places in the level that are looked at; elsewhere there may be glass. None: all.
        """
        found = np.full((height, width, 3), GLASS, np.uint8)
        stored = self._storage.levels[level]
        down, across = stored.tile
        right, bottom = min(x + width, self.levels[level].width), min(y + height, self.levels[level].height)
        columns = -(-stored.size[1] // across)
        first = max(0, y) // down, max(0, x) // across
        grid = stored.there[: -(-stored.size[0] // down) * columns].reshape(-1, columns)
        wanted = grid[first[0] : max(0, -(-bottom // down)), first[1] : max(0, -(-right // across))]
        if only is not None:
            looked_at = np.zeros_like(wanted)
            for one in only:
                upper, left = max(0, one.y // down - first[0]), max(0, one.x // across - first[1])
                lower, end = -(-(one.y + one.height) // down), -(-(one.x + one.width) // across)
                looked_at[upper : max(0, lower - first[0]), left : max(0, end - first[1])] = True
            wanted = wanted & looked_at
        for row, column in (np.argwhere(wanted) + first).tolist():
            part = self._part(level, row * columns + column)
            if part is None:
                continue
            top, left = max(y, row * down), max(x, column * across)
            low, end = min(bottom, (row + 1) * down), min(right, (column + 1) * across)
            inside = part[top - row * down : low - row * down, left - column * across : end - column * across]
            found[top - y : top - y + len(inside), left - x : left - x + inside.shape[1]] = inside
        return found

    def overview(self, longest: int = 2048) -> Frame:
        """The whole slide, shrunk to about ``longest`` pixels, (h, w, 3) uint8 BGR; read in parts."""
        index = max(n for n, level in enumerate(self.levels) if n == 0 or max(level.width, level.height) >= longest)
        level = self.levels[index]
        factor = max(1, round(max(level.width, level.height) / longest))
        found = np.full((-(-level.height // factor), -(-level.width // factor), 3), GLASS, np.uint8)
        step = factor * max(1, 2048 // factor)
        for y in range(0, level.height, step):
            for x in range(0, level.width, step):
                part = self.read(index, x, y, min(step, level.width - x), min(step, level.height - y))
                size = (-(-part.shape[1] // factor), -(-part.shape[0] // factor))
                small = cv2.resize(part, size, interpolation=cv2.INTER_AREA)
                found[y // factor : y // factor + size[1], x // factor : x // factor + size[0]] = small
        return found

    def _part(self, level: int, index: int) -> Frame | None:
        """One stored tile; None: it is damaged."""
        key = (level, index)
        if key in self._cache:
            self._cache.move_to_end(key)
            return self._cache[key]
        part: Frame | None
        try:
            part = self._storage.levels[level].part(index)
        except UserError:
            raise
        except Exception as error:  # noqa: BLE001 (each codec has errors of its own)
            log.debug("level %d, tile %d: %s", level, index, type(error).__name__)  # its text may quote a header
            self.damaged.add(key)
            part = None
        self._cache[key] = part
        self._cached += _cost(part)
        while self._cached > _CACHED and len(self._cache) > 1:
            self._cached -= _cost(self._cache.popitem(last=False)[1])
        return part

    def close(self) -> None:
        """Close the file."""
        self._storage.close()


def _cost(part: Frame | None) -> int:
    return _ENTRY + (0 if part is None else part.nbytes)


def _plausible(path: Path, stated: float | None) -> float | None:
    """What a file states of its resolution; None where it states none, or one that cannot be."""
    if stated is not None and not _LEAST_MPP <= stated <= _MOST_MPP:  # nor is NaN
        log.warning(
            "%s states a size of its pixels which cannot be: nothing is given in micrometres. Say it: --pixel-size",
            path,
        )
        return None
    return stated
