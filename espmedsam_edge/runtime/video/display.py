"""How a decoded picture is meant to be seen: its display matrix and the shape of its pixels."""

from __future__ import annotations

import struct
from fractions import Fraction
from typing import Any

import numpy as np

from espmedsam_edge.imaging.geometry import Frame

SQUARE = Fraction(1)
Matrix = tuple[int, int, int, int]
_TINY = 16  # pixels
_STRANGEST = 8  # aspects beyond 8:1 are slips of whoever wrote them


class Display:
    """How a stream's pictures are shown; its display matrix is read off the first one and holds for all.

    Args:
        stated: width by height of a pixel as stored; 1 stands in where the file does not say, or says what cannot be.
    """

    def __init__(self, stated: Fraction | None = None) -> None:
        plausible = bool(stated) and stated is not None and Fraction(1, _STRANGEST) <= stated <= _STRANGEST
        self._stored = Fraction(stated) if stated is not None and plausible else SQUARE
        self._matrix: Matrix | None = None
        self._known = False

    @property
    def aspect(self) -> Fraction:
        """Width by height of a pixel of what ``shown`` gives; final after its first picture."""
        turned = self._matrix is not None and bool(self._matrix[1] and self._matrix[2])
        return 1 / self._stored if turned else self._stored

    def shown(self, picture: Any) -> Frame:
        """One of PyAV's pictures as (H, W, 3) uint8 BGR, turned and mirrored as it plays."""
        if not self._known:
            self._matrix, self._known = display_matrix(picture), True
        frame: Frame = picture.to_ndarray(format="bgr24")
        return frame if self._matrix is None else upright(frame, self._matrix)


def display_matrix(picture: Any) -> Matrix | None:
    """The signs (a, b, c, d) of a picture's display matrix: x' = ax + cy, y' = bx + dy; None without one."""
    # A picture whose side data was looked at is in a cycle with it, and keeps itself and its decoder alive until the
    # garbage collector comes. So a tiny copy is looked at.
    for data in picture.reformat(width=_TINY, height=_TINY, format="gray8").side_data:
        if getattr(data.type, "name", "") == "DISPLAYMATRIX" and data.buffer_size >= 36:
            a, b, _, c, d, *_ = ((value > 0) - (value < 0) for value in struct.unpack("<9i", bytes(data)[:36]))
            return a, b, c, d
    return None


def upright(frame: Frame, matrix: Matrix) -> Frame:
    """Apply a display matrix's signs (a, b, c, d); anything but quarter turns and mirrors leaves the frame alone."""
    a, b, c, d = matrix
    if a and d and not (b or c):
        across, down = a < 0, d < 0
    elif b and c and not (a or d):
        frame, across, down = np.swapaxes(frame, 0, 1), c < 0, b < 0
    else:
        return frame
    return np.ascontiguousarray(frame[:: -1 if down else 1, :: -1 if across else 1])
