"""What a compressed DICOM frame says of its own size, before a decoder believes it.

A decoder allocates what the compressed data ask for, whatever the DICOM header says: 9 kB of JPEG-LS can hold a
gigapixel of zeros behind a header of 96x64. So size and samples are read here first, of JPEG 2000 also the number of
its parts, each of which costs memory and time however empty it is, and of RLE the lengths.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

_JPEG, _JPEG2000 = b"\xff\xd8", b"\xff\x4f\xff\x51"
_JP2 = b"\0\0\0\x0cjP  "
# As libjpeg looks for a segment: bytes between two are passed over, 0xFF may be repeated, TEM, RST, SOI have no length.
_JPEG_SEGMENT = re.compile(rb"\xff([^\x00\x01\xd0-\xd8\xff])", re.DOTALL)
_JPEG_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC} | {0xF7}  # SOF0 to SOF15, and JPEG-LS's SOF55
_MOST_SEGMENTS = 1000
_START_OF_TILE, _START_OF_DATA = 0x90, 0x93  # JPEG 2000's SOT and SOD
_CODING, _COMPONENT_CODING = 0x52, 0x53  # COD and COC
_FEW_PRECINCTS, _SAMPLES_A_PRECINCT = 10_000, 256  # OpenJPEG needs 2 kB for each
_FEW_PACKETS = 1_000_000  # OpenJPEG passes over 13 million in a second
_RLE_HEADER = struct.Struct("<16I")


@dataclass(frozen=True)
class FrameSize:
    """Pixels of a frame, and samples of each: 1 where it is grey."""

    width: int
    height: int
    samples: int

    def __str__(self) -> str:
        return f"{self.width}x{self.height} pixels of {self.samples} sample{'' if self.samples == 1 else 's'}"


def bare_codestream(data: bytes) -> bytes:
    """A frame without the JP2 boxes that DICOM does not allow around JPEG 2000, but some files have.

    Raises:
        ValueError: there are boxes, and no codestream in them.
    """
    if not data.startswith(_JP2):
        return data
    place = 0
    while place + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, place)
        if kind == b"jp2c":
            return data[place + (16 if length == 1 else 8) :]
        if length < 8:
            break
        place += length
    raise ValueError("JP2 boxes without a codestream")


def size_of(codestream: bytes) -> FrameSize:
    """The size that a JPEG, JPEG-LS or JPEG 2000 codestream has by its own header.

    Raises:
        ValueError: it is none of them, or is cut off before its size; or JPEG 2000 of far more parts than its pixels
            and bytes account for.
    """
    try:
        if codestream.startswith(_JPEG):
            return _jpeg_size(codestream)
        if codestream.startswith(_JPEG2000):
            return _jpeg2000_size(codestream)
    except (struct.error, IndexError) as error:
        raise ValueError("a codestream that is cut off") from error
    raise ValueError("no codestream that is known")


def mixes_colours(codestream: bytes) -> bool:
    """Whether JPEG 2000 says that its decoder makes RGB of what it stores (ISO/IEC 15444-1, annex G)."""
    if not codestream.startswith(_JPEG2000):
        return False
    coding = next((body for marker, body in _jpeg2000_headers(codestream) if marker == _CODING), b"")
    return coding[4:5] == b"\1"


def is_whole(codestream: bytes) -> bool:
    """Whether a JPEG, JPEG-LS or JPEG 2000 codestream ends with its end marker, padding left out."""
    return codestream.rstrip(b"\0").endswith(b"\xff\xd9")


def check_rle(data: bytes, pixels: int) -> None:
    """Refuse RLE segments that overlap or are longer than any packing of so many bytes: two for one.

    Raises:
        ValueError: there is one, or no RLE header.
    """
    try:
        count, *offsets = _RLE_HEADER.unpack_from(data)
    except struct.error as error:
        raise ValueError("an RLE header that is cut off") from error
    places = [*offsets[:count], len(data)]
    if any(not 0 <= end - start <= 2 * pixels + 2 for start, end in pairwise(places)):
        raise ValueError("RLE segments that do not fit the frame")


def _jpeg_size(data: bytes) -> FrameSize:
    """Of the first frame header; segments before it are passed over by their lengths."""
    place = 2
    for _ in range(_MOST_SEGMENTS):
        found = _JPEG_SEGMENT.search(data, place)
        if found is None:
            break
        marker, place = found[1][0], found.end()
        if marker in _JPEG_FRAMES:
            height, width, samples = struct.unpack_from(">HHB", data, place + 3)
            return FrameSize(width, height, samples)
        place += struct.unpack_from(">H", data, place)[0]
    raise ValueError("a JPEG without a size")


def _jpeg2000_size(data: bytes) -> FrameSize:
    right, bottom, left, top, *tiles, samples = struct.unpack_from(">8IH", data, 8)
    size = FrameSize(right - left, bottom - top, samples)
    tile_width, tile_height, tiles_left, tiles_top = tiles
    if min(size.width, size.height, tile_width, tile_height) < 1 or tiles_left > left or tiles_top > top:
        raise ValueError("a JPEG 2000 image without pixels")
    count = _ceil(right - tiles_left, tile_width) * _ceil(bottom - tiles_top, tile_height) * samples
    layers, precincts = 1, 1
    for marker, body in _jpeg2000_headers(data):
        if marker == _CODING:
            layers = max(layers, struct.unpack_from(">H", body, 2)[0])
        elif marker != _COMPONENT_CODING:
            continue
        custom, steps = (body[0], body[5:]) if marker == _CODING else _component_coding(body, samples)
        tile = min(tile_width, size.width), min(tile_height, size.height)
        precincts = max(precincts, _precincts(tile, steps[0], steps[5:] if custom & 1 else None))
    precincts *= count
    if precincts > _FEW_PRECINCTS + size.width * size.height * samples // _SAMPLES_A_PRECINCT:
        raise ValueError("JPEG 2000 of too many precincts")
    if precincts * layers > _FEW_PACKETS + len(data):  # in a whole codestream a packet is at least a byte
        raise ValueError("JPEG 2000 of too many packets")
    return size


def _jpeg2000_headers(data: bytes) -> Iterator[tuple[int, bytes]]:
    """The marker segments of the main header and of each tile-part's, without their lengths."""
    place, end_of_part = 2, 0
    while place + 4 <= len(data) and data[place] == 0xFF:
        marker, length = struct.unpack_from(">xBH", data, place)
        if marker == _START_OF_TILE:
            part = struct.unpack_from(">I", data, place + 6)[0]
            end_of_part = place + part if part else len(data)
        if marker == _START_OF_DATA:
            if end_of_part <= place:
                return
            place = end_of_part
            continue
        yield marker, data[place + 4 : place + 2 + length]
        place += 2 + length


def _component_coding(body: bytes, samples: int) -> tuple[int, bytes]:
    """COC's flag of own precincts, and what follows it: as COD's, behind a component's number of 1 or 2 bytes."""
    start = 1 if samples < 257 else 2
    return body[start], body[start + 1 :]


def _precincts(tile: tuple[int, int], levels: int, exponents: bytes | None) -> int:
    """How many precincts a tile of so many samples has, over all of its resolutions (ISO/IEC 15444-1, B.6)."""
    count = 0
    for resolution in range(levels + 1):
        both = 0xFF if exponents is None else exponents[resolution]
        width, height = (_ceil(side, 1 << (levels - resolution)) for side in tile)
        count += _ceil(width, 1 << (both & 15)) * _ceil(height, 1 << (both >> 4))
    return count


def _ceil(number: int, divisor: int) -> int:
    return -(-number // divisor)
