"""AV1's own size in an AVIF file, against what the file says of itself: a decoder allocates the former."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator

from espmedsam_edge.imaging.header_errors import HeaderError

_SEQUENCE_HEADER = 1  # the type of open bitstream unit (AV1, 6.2.2)
_UNITS = 8  # how many are looked at in one picture's data; the sequence header is the first or second
_MOST_PARTS = 4096  # tiles of a grid, or chunks of an animation
_MARGIN = 64  # pixels by which a tile may go beyond the picture
_ALPHA = 2  # a picture may have as many pixels again in transparency


def check_av1_size(data: bytes, width: int, height: int) -> None:
    """Refuse a file of which some part is larger than the picture that it announces, before it is decoded.

    Args:
        data: the whole AVIF file.
        width, height: of the picture, as the file says, in pixels as stored.

    Raises:
        HeaderError: a part is larger, or all together are far larger, or no part says its size.
    """
    total, known = 0, False
    for place in dict.fromkeys(_places(data)):
        size = _size_at(data, place)
        if size is None:  # not of AV1: Exif, XMP, a grid's description
            continue
        known = True
        total += size[0] * size[1]
        if size[0] > width + _MARGIN or size[1] > height + _MARGIN or total > _ALPHA * (width + 512) * (height + 512):
            raise HeaderError(f"it says {width}x{height} pixels, and its data {size[0]}x{size[1]}")
    if not known:
        raise HeaderError("its data do not say how large they are")


def _places(data: bytes) -> Iterator[int]:
    """Where pictures' data may begin: the extents of the items, and the first sample of each track."""
    count = 0
    for found in re.finditer(rb"iloc|stco|co64", data):
        if found[0] == b"iloc":
            places: Iterator[int] = _extents(data, found.end())
        else:
            places = _first_chunk(data, found.end(), ">I" if found[0] == b"stco" else ">Q")
        try:
            for place in places:
                count += 1
                if count > _MOST_PARTS:
                    raise HeaderError("it has too many parts")
                yield place
        except (struct.error, IndexError):  # these letters stood in other data
            continue


def _first_chunk(data: bytes, start: int, layout: str) -> Iterator[int]:
    if struct.unpack_from(">I", data, start + 4)[0]:
        yield struct.unpack_from(layout, data, start + 8)[0]


def _extents(data: bytes, start: int) -> Iterator[int]:
    """The first extent of each item (ISO/IEC 14496-12, 8.11.3), by its place in the file or, for idat, in that box."""
    version = data[start]
    sizes = [data[start + 4] >> 4, data[start + 4] & 15, data[start + 5] >> 4, data[start + 5] & 15 if version else 0]
    offset_size, length_size, base_size, index_size = sizes
    at, item = start + 6, 2 if version < 2 else 4
    items, at = int.from_bytes(data[at : at + item], "big"), at + item
    inside = data.find(b"idat") + 4
    for _ in range(min(items, _MOST_PARTS)):
        method = data[at + item + 1] & 15 if version else 0
        at += item + (2 if version else 0) + 2
        base, at = int.from_bytes(data[at : at + base_size], "big"), at + base_size
        extents, at = struct.unpack_from(">H", data, at)[0], at + 2
        for number in range(extents):
            at += index_size
            offset, at = int.from_bytes(data[at : at + offset_size], "big"), at + offset_size + length_size
            if number == 0:
                yield base + offset + (inside if method == 1 else 0)


def _size_at(data: bytes, place: int) -> tuple[int, int] | None:
    """The largest frame that a sequence header among the first units at a place allows; None if there is none."""
    for _ in range(_UNITS):
        if place + 2 > len(data) or data[place] & 0x81:  # the forbidden and the reserved bit
            return None
        kind, extended, sized = data[place] >> 3 & 15, data[place] >> 2 & 1, data[place] >> 1 & 1
        place += 1 + extended
        length, place = _leb128(data, place) if sized else (len(data) - place, place)
        if kind == _SEQUENCE_HEADER:
            return _frame_size(data[place : place + min(length, 64)])
        place += length
    return None


def _leb128(data: bytes, place: int) -> tuple[int, int]:
    value = 0
    for number in range(8):
        if place >= len(data):
            break
        value |= (data[place] & 0x7F) << 7 * number
        place += 1
        if not data[place - 1] & 0x80:
            break
    return value, place


def _frame_size(header: bytes) -> tuple[int, int] | None:
    """Width and height of a sequence header (AV1, 5.5.1); None where timing is stated, as no picture does."""
    bits = _Bits(header)
    bits.read(4)  # profile, still picture
    if bits.read(1):  # the reduced header of a still picture
        bits.read(5)
    else:
        if bits.read(1):
            return None
        delays = bits.read(1)
        for _ in range(bits.read(5) + 1):
            bits.read(12)
            if bits.read(5) > 7:
                bits.read(1)
            if delays and bits.read(1):
                bits.read(4)
    width_bits, height_bits = bits.read(4) + 1, bits.read(4) + 1
    return bits.read(width_bits) + 1, bits.read(height_bits) + 1


class _Bits:
    def __init__(self, data: bytes) -> None:
        self._value, self._left = int.from_bytes(data, "big"), 8 * len(data)

    def read(self, count: int) -> int:
        self._left -= count
        if self._left < 0:
            raise HeaderError("its data are cut off")
        return self._value >> self._left & ((1 << count) - 1)
