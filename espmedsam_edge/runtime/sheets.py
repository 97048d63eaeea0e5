"""Sheets: pictures of one size side by side in a grid, as contact sheets and mosaics are.

Told by what a single picture has not: lines at equal distances, from edge to edge, across which nothing goes on. Such a
line is of one colour, or the picture changes far more across it than beside it (two smooth pictures meet), or the small
changes along both its sides have nothing in common (two textures meet). How often a picture has such lines elsewhere
tells how likely a grid of them is by chance.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import numpy as np

from espmedsam_edge.imaging.geometry import Frame, Tensor

_MOST = 16  # pictures along a side
_LEAST = 128  # pixels of one's side
_BLOCK = 4  # pixels, along a line, that count as one
_BESIDE = (-17, -13, -9, 9, 13, 17)  # rows from a line where the picture goes on
_SPIKE = 2.0  # times as much change as beside the line
_NOISE = 1.5  # grey levels
_LITTLE = 0.25  # of what the changes along a line usually have in common with those along the next
_TEXTURE = 0.1  # of them must usually be in common, else nothing is told by them
_USUAL = 65  # places that are looked at for what is usual
_NEAR = 20  # rows
_CHANCE = 0.02


def grid_of(frame: Frame) -> tuple[int, int]:
    """How many pictures lie below and beside one another in a frame, (H, W, 3) uint8; (1, 1): it is one picture."""
    return _Rows(frame).parts(), _Rows(frame.transpose(1, 0, 2)).parts()


class _Rows:
    """Lines across a picture, each named by the row below it."""

    def __init__(self, frame: Frame) -> None:
        self._frame = frame

    def parts(self) -> int:
        """Of how many equal heights pictures lie below one another; the most there may be."""
        height = len(self._frame)
        for count in range(min(_MOST, height // _LEAST), 1, -1):
            lines = [row * height // count for row in range(1, count)]
            if height % count == 0 and any(self._shows(signs, lines) for signs in self._signs):
                return count
        return 1

    @property
    def _signs(self) -> list[tuple[Callable[[int], bool], ...]]:
        """What pictures may be parted by, one of each for all lines."""
        flat, sudden, unlike = self._is_flat, self._is_sudden, self._is_unlike
        return [(flat, sudden), (flat, unlike), (flat, sudden, unlike)]

    def _shows(self, signs: tuple[Callable[[int], bool], ...], lines: list[int]) -> bool:
        """Whether all lines have a sign, and few other lines do."""

        def has_sign(line: int) -> bool:
            return any(sign(line) for sign in signs)

        if not all(has_sign(line) for line in lines):
            return False
        others = [line for line in self._usual if min(abs(line - one) for one in lines) > _NEAR]
        chance = (1 + sum(has_sign(line) for line in others)) / (1 + len(others))
        return bool(chance ** len(lines) <= _CHANCE)

    @cached_property
    def _usual(self) -> list[int]:
        places = np.linspace(32, len(self._frame) - 32, _USUAL, dtype=int)
        return [int(place) for place in places]

    @cached_property
    def _usually_common(self) -> float:
        return float(np.median([self._in_common(line) for line in self._usual]))

    def _is_flat(self, line: int) -> bool:
        return max(float(np.ptp(side)) for side in self._sides(line)) <= 4 * _NOISE

    def _is_sudden(self, line: int) -> bool:
        beside = np.median([self._change(line + step) for step in _BESIDE])
        return self._change(line) > _NOISE + _SPIKE * float(beside)

    def _is_unlike(self, line: int) -> bool:
        return self._usually_common >= _TEXTURE and self._in_common(line) < _LITTLE * self._usually_common

    def _sides(self, line: int) -> tuple[Tensor, Tensor]:
        """The second row above a line and the second below it; those beside it mix where JPEG shares colours."""
        return self._blocks(line - 2), self._blocks(line + 1)

    def _blocks(self, row: int) -> Tensor:
        values = self._frame[row]
        length = len(values) // _BLOCK * _BLOCK
        return np.asarray(values[:length].reshape(-1, _BLOCK * values.shape[1]).mean(axis=1, dtype=np.float32))

    def _change(self, line: int) -> float:
        above, below = self._sides(line)
        return float(np.abs(above - below).mean())

    def _in_common(self, line: int) -> float:
        """Of the changes along both sides, the part that is alike less the part that is opposed."""
        above, below = (np.where(np.abs(step) < 1, 0, np.sign(step)) for step in map(np.diff, self._sides(line)))
        return float(np.mean(above * below))
