"""Overlapping tiles of a large picture, and one map of logits from those of the tiles.

Every tile is a square of the picture's own pixels, so the network sees its targets at the size they had in training.
Tiles start where their logits fall on one grid over the picture, and are joined there by Hann weights: a tile counts
most where it knows most of what is around, and its edges leave no seam.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from espmedsam_edge.imaging.crop import Crop
from espmedsam_edge.imaging.geometry import Tensor

OVERLAP = 1 / 7
"""Of a tile's side that the next one shares with it, at least: 64 of 448 pixels."""


@dataclass(frozen=True)
class _Axis:
    """Tiles along one side of a picture.

    Attributes:
        length: of the picture's side, in pixels.
        tile: of a tile, in pixels; not more than ``length``.
        cells: of a tile's logits.
        overlap: part of a tile, from 0 and under 1.
    """

    length: int
    tile: int
    cells: int
    overlap: float

    @cached_property
    def total(self) -> int:
        """How many logits the whole side has."""
        return max(self.cells + (self.length > self.tile), round(self.length * self.cells / self.tile))

    @cached_property
    def starts(self) -> list[int]:
        """Where tiles start among the logits: spread evenly, the first at 0, the last at the end."""
        room = self.total - self.cells
        step = max(1, int(self.cells * (1 - self.overlap)))
        count = -(-room // step) + 1
        return [round(index * room / max(1, count - 1)) for index in range(count)]

    def pixel(self, start: int) -> int:
        """Where a tile starts in the picture, less than a logit from where its logits do."""
        return round(start * (self.length - self.tile) / max(1, self.total - self.cells))

    @cached_property
    def window(self) -> Tensor:
        """Weights of a tile's logits, (cells,), over 0."""
        centres = (np.arange(self.cells) + 0.5) / self.cells
        return np.asarray(np.sin(np.pi * centres) ** 2, np.float32)

    @cached_property
    def weight(self) -> Tensor:
        """The sum of all tiles' weights, (total,)."""
        summed = np.zeros(self.total, np.float32)
        for start in self.starts:
            summed[start : start + self.cells] += self.window
        return summed


class Tiles:
    """The tiles of one picture, a row after the other.

    Example:
        >>> tiles = Tiles((100, 900), tile=448, cells=112)
        >>> len(tiles), [(place.x, place.width, place.height) for place in tiles]
        (3, [(0, 448, 100), (228, 448, 100), (452, 448, 100)])
        >>> tiles.join([np.full((112, 112), 2, np.float32)] * 3).shape
        (112, 225)

    Args:
        size: (H, W) of the picture.
        tile: side of a tile in the picture's pixels, or its (H, W); a side of the picture that is no longer is taken
            as it is.
        cells: side of a tile's logits.
        overlap: part of a tile's side that the next one shares, at least; 0: tiles lie side by side.
    """

    def __init__(
        self, size: tuple[int, int], tile: int | tuple[int, int], cells: int, overlap: float = OVERLAP
    ) -> None:
        sides = (tile, tile) if isinstance(tile, int) else tile
        self._down, self._across = (
            _Axis(whole, min(whole, side), cells, overlap) for whole, side in zip(size, sides, strict=True)
        )

    def __len__(self) -> int:
        return len(self._down.starts) * len(self._across.starts)

    def _starts(self) -> Iterator[tuple[int, int]]:
        return ((y, x) for y in self._down.starts for x in self._across.starts)

    def __iter__(self) -> Iterator[Crop]:
        """Their places in the picture, all of one size."""
        for y, x in self._starts():
            yield Crop(self._across.pixel(x), self._down.pixel(y), self._across.tile, self._down.tile)

    def join(self, logits: Iterable[Tensor]) -> Tensor:
        """One map of logits for the whole picture; of the tiles' only one is held at a time.

        Args:
            logits: (cells, cells) float32 of each tile, in order.

        Returns:
            (h, w) float32 that covers the picture, as the logits of one that is segmented whole do.
        """
        down, across = self._down, self._across
        joined: NDArray[np.float32] = np.zeros((down.total, across.total), np.float32)
        window = down.window[:, None] * across.window
        for (y, x), one in zip(self._starts(), logits, strict=True):
            joined[y : y + down.cells, x : x + across.cells] += window * one
        joined /= down.weight[:, None]
        joined /= across.weight
        return joined
