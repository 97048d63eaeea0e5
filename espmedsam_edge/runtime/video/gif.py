"""Animated GIFs whose pictures have no graphic control: FFmpeg tells pictures apart by it and drops those without."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

_STARTS = (b"GIF87a", b"GIF89a")
_CONTROL = b"\x21\xf9\x04\0\0\0\0\0"  # nothing is transparent, and no delay is stated
_LARGEST = 256 << 20  # bytes; larger files are left to FFmpeg as they are


def completed_gif(path: Path) -> bytes | None:
    """A GIF with a control before each picture; None for files that need none, are damaged, or are no GIF."""
    try:
        with path.open("rb") as stream:
            if not stream.read(6).startswith(_STARTS) or path.stat().st_size > _LARGEST:
                return None
            stream.seek(0)
            data = stream.read()
    except OSError:
        return None
    try:
        places = _pictures_without_control(data)
    except IndexError:
        return None
    if not places:
        return None
    cuts = [0, *places, len(data)]
    return _CONTROL.join(data[start:end] for start, end in pairwise(cuts))


def _pictures_without_control(data: bytes) -> list[int]:
    """Where they start.

    Raises:
        IndexError: cut off.
    """
    places, controlled = [], False
    position = 13 + _colour_table(data[10])
    while data[position] != 0x3B:  # the trailer
        if data[position] == 0x2C:  # a picture
            if not controlled:
                places.append(position)
            controlled = False
            position += 10 + _colour_table(data[position + 9]) + 1
        elif data[position] == 0x21:  # an extension
            controlled = controlled or data[position + 1] == 0xF9
            position += 2
        else:
            return []
        while data[position]:  # sub-blocks
            position += 1 + data[position]
        position += 1
    return places


def _colour_table(packed: int) -> int:
    return 3 << (packed & 7) + 1 if packed & 0x80 else 0
