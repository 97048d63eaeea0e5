"""HEIF (ISO/IEC 23008-12), the container of AVIF and HEIC: the main picture's size and how it is turned."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import NamedTuple

from espmedsam_edge.imaging.header_errors import CUT_OFF, HeaderError

_AVIF = (b"avif", b"avis")
_HEIC = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx")
_EITHER = (b"mif1", b"mif2", b"msf1")  # then the compatible brands tell
_SIZES = (b"trak", b"mdia", b"minf", b"stbl", b"stsz")  # where a movie lists the sizes of its samples

# Exif's orientation after irot (quarter turns against the clock) and then imir (0: top to bottom, 1: left to right).
_ORIENTATIONS = {
    (0, None): 1, (1, None): 8, (2, None): 3, (3, None): 6,
    (0, 1): 2, (0, 0): 4, (2, 1): 4, (2, 0): 2, (1, 1): 7, (1, 0): 5, (3, 1): 5, (3, 0): 7,
}  # fmt: skip


_AV1_DEPTHS = (8, 8, 10, 12)  # by the bits high_bitdepth and twelve_bit


class Heif(NamedTuple):
    """The main picture: pixels as stored, before ``orientation`` (Exif's number, 1 to 8) is applied.

    Attributes:
        pictures: frames of an animation, else 1.
        depth: bits of a sample, as AV1's configuration says; 8 without one.
    """

    width: int
    height: int
    orientation: int
    pictures: int = 1
    depth: int = 8


def heif_format(start: bytes) -> str | None:
    """ "AVIF" or "HEIC" for a file that starts so (64 bytes), None for all others, videos among them."""
    if start[4:8] != b"ftyp":
        return None
    brand, compatible = start[8:12], start[16 : min(len(start), int.from_bytes(start[:4], "big"))]
    if brand in _AVIF or (brand in _EITHER and b"avif" in compatible):
        return "AVIF"
    return "HEIC" if brand in _HEIC + _EITHER else None


def read_heif(data: bytes) -> Heif:
    """Parse a whole file.

    Raises:
        HeaderError: cut off, or no picture.
        struct.error: cut off.
    """
    meta, pictures = None, 1
    for kind, start, end in _boxes(data, 0, len(data)):
        if kind == b"meta":
            meta = _main_picture(data, start + 4, end)
        elif kind == b"moov":
            pictures = max(pictures, _frames(data, start, end))
        elif kind == b"mdat" and meta is not None:
            break  # what follows is no matter: cameras append clips and notes of their own
    if meta is None:
        raise HeaderError("it holds no picture")
    return meta._replace(pictures=pictures)


def _frames(data: bytes, start: int, end: int, path: tuple[bytes, ...] = _SIZES) -> int:
    """How many samples the longest track of a movie box has."""
    most = 0
    for kind, inner, after in _boxes(data, start, end):
        if kind == path[0]:
            found = _frames(data, inner, after, path[1:]) if path[1:] else struct.unpack_from(">I", data, inner + 8)[0]
            most = max(most, found)
    return most


def _main_picture(data: bytes, start: int, end: int) -> Heif:
    main = 0
    properties = [(b"", 0, 0)]  # they are counted from 1
    uses: dict[int, list[int]] = {}
    for kind, inner, after in _boxes(data, start, end):
        if kind == b"pitm":
            main = int.from_bytes(data[inner + 4 : inner + (6 if data[inner] == 0 else 8)], "big")
        elif kind == b"iprp":
            for part, begin, stop in _boxes(data, inner, after):
                if part == b"ipco":
                    properties += _boxes(data, begin, stop)
                elif part == b"ipma":
                    uses.update(_associations(data, begin))
    size: tuple[int, int] | None = None
    turns, mirror = 0, None
    for number in uses.get(main, ()):
        if number >= len(properties):
            continue
        kind, begin, _ = properties[number]
        if kind == b"ispe":
            width, height = struct.unpack_from(">II", data, begin + 4)
            size = width, height
        elif kind == b"irot":
            turns = data[begin] & 3
            if mirror is not None and turns & 1:  # the mirror comes first: as the other one after the turn
                mirror = 1 - mirror
        elif kind == b"imir":
            mirror = data[begin] & 1
    if size is None:
        raise HeaderError("it holds no picture")
    # A grid's own properties name no depth, its tiles' do, and all have one.
    depth = max((_AV1_DEPTHS[data[begin + 2] >> 5 & 3] for kind, begin, _ in properties if kind == b"av1C"), default=8)
    return Heif(*size, _ORIENTATIONS[turns, mirror], depth=depth)


def _associations(data: bytes, start: int) -> Iterator[tuple[int, list[int]]]:
    """Which properties (counted from 1) each item has."""
    version, wide = data[start], data[start + 3] & 1
    entries = struct.unpack_from(">I", data, start + 4)[0]
    position, item = start + 8, ">H" if version == 0 else ">I"
    for _ in range(entries):
        name = struct.unpack_from(item, data, position)[0]
        position += struct.calcsize(item)
        count, position = data[position], position + 1
        step = 2 if wide else 1
        numbers = [
            int.from_bytes(data[at : at + step], "big") & (0x7FFF if wide else 0x7F)
            for at in range(position, position + count * step, step)
        ]
        position += count * step
        yield name, numbers


def _boxes(data: bytes, start: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    """The boxes between two places: kind, where the content starts, and where it ends."""
    while start + 8 <= end:
        size, kind = struct.unpack_from(">I4s", data, start)
        header = 8
        if size == 1:
            size, header = struct.unpack_from(">Q", data, start + 8)[0], 16
        elif size == 0:
            size = end - start
        if size < header or start + size > end:
            raise HeaderError(CUT_OFF)
        yield kind, start + header, start + size
        start += size
