"""How a decoded picture is meant to be seen: its display matrix and the shape of its pixels."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np

from espmedsam_edge.imaging.geometry import Frame

SQUARE = Fraction(1)
_STRANGEST = 8  # aspects beyond 8:1 are slips of whoever wrote them


def seen(picture: Any) -> Frame:
    """One of PyAV's pictures as (H, W, 3) uint8 BGR, turned and mirrored as its display matrix says."""
    frame: Frame = picture.to_ndarray(format="bgr24")
    matrix = display_matrix(picture)
    return frame if matrix is None else upright(frame, matrix)


def display_matrix(picture: Any) -> tuple[int, int, int, int] | None:
    """The signs (a, b, c, d) of a picture's display matrix: x' = ax + cy, y' = bx + dy; None without one."""
    for data in picture.side_data:
        if getattr(data.type, "name", "") == "DISPLAYMATRIX" and data.buffer_size >= 36:
            values = struct.unpack("<9i", bytes(data)[:36])
            return tuple((value > 0) - (value < 0) for value in (values[0], values[1], values[3], values[4]))
    return None


def upright(frame: Frame, matrix: Sequence[int]) -> Frame:
    """Apply a display matrix's signs (a, b, c, d); anything but quarter turns and mirrors leaves the frame alone."""
    a, b, c, d = matrix
    if a and d and not (b or c):
        across, down = a < 0, d < 0
    elif b and c and not (a or d):
        frame, across, down = np.swapaxes(frame, 0, 1), c < 0, b < 0
    else:
        return frame
    return np.ascontiguousarray(frame[:: -1 if down else 1, :: -1 if across else 1])


def pixel_aspect(stated: Fraction | None, picture: Any = None) -> Fraction:
    """Width by height of one pixel of ``seen(picture)``.

    Args:
        stated: of a pixel as stored; 1 stands in where the file does not say, or says what cannot be.
        picture: one of PyAV's pictures, whose display matrix may turn it.
    """
    if not stated or not Fraction(1, _STRANGEST) <= stated <= _STRANGEST:
        return SQUARE
    matrix = None if picture is None else display_matrix(picture)
    return 1 / Fraction(stated) if matrix is not None and matrix[1] and matrix[2] else Fraction(stated)
