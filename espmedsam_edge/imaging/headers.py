"""What an image file's header says, and whether the file is whole, before any pixel is decoded.

Decoders fill what is missing from a cut-off file with grey or black and say nothing; they also allocate what a header
asks for. So size, depth and completeness are checked here first, for the formats that ``decode`` accepts.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

_PNG = b"\x89PNG\r\n\x1a\n"
_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
# In entropy-coded data 0xFF is followed by 0x00 or a restart marker; any other pair starts a segment.
_JPEG_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]", re.DOTALL)
_JPEG_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}

CUT_OFF = "it is cut off"


class HeaderError(ValueError):
    """Not a whole image of a known format; the text says why, as the end of a sentence."""


@dataclass(frozen=True)
class ImageHeader:
    """What matters of a header.

    Attributes:
        format: "JPEG", "PNG", "TIFF", "BMP" or "WebP".
        width, height: pixels as stored, before ``orientation`` is applied.
        orientation: Exif's number, 1 to 8; 1 is upright.
        white_is_zero: grey samples count down from white (TIFF's photometric interpretation 0).
    """

    format: str
    width: int
    height: int
    orientation: int = 1
    white_is_zero: bool = False


def image_format(start: bytes) -> str | None:
    """The format that a file's first 16 bytes announce, or None for anything that is not read here."""
    if start.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if start.startswith(_PNG):
        return "PNG"
    if start.startswith(_TIFF):
        return "TIFF"
    if start.startswith(b"RIFF") and start[8:12] == b"WEBP":
        return "WebP"
    if start.startswith(b"BM"):
        return "BMP"
    return None


def read_header(data: bytes) -> ImageHeader:
    """Parse a whole file's header and check that nothing of the file is missing.

    Raises:
        HeaderError: empty, another format, cut off, or damaged where that can be told.
    """
    if not data:
        raise HeaderError("it is empty")
    name = image_format(data[:16])
    if name is None:
        raise HeaderError("it is not a JPEG, PNG, TIFF, BMP or WebP image")
    try:
        return _PARSERS[name](data)
    except (struct.error, IndexError, OverflowError) as error:
        raise HeaderError(CUT_OFF) from error


def _jpeg(data: bytes) -> ImageHeader:
    size, orientation, position, pictured = None, 1, 2, False
    while True:
        found = _JPEG_MARKER.search(data, position)
        if found is None:
            raise HeaderError(CUT_OFF)
        marker, position = data[found.start() + 1], found.end()
        if marker == 0xD9:
            break
        if marker in (0x01, 0xD8):
            continue
        length = struct.unpack_from(">H", data, position)[0]
        if length < 2 or position + length > len(data):
            raise HeaderError(CUT_OFF)
        if marker in _JPEG_FRAMES and size is None:
            size = struct.unpack_from(">HH", data, position + 3)
        elif marker == 0xE1 and data[position + 2 : position + 8] == b"Exif\0\0":
            orientation = _exif_orientation(data[position + 8 : position + length])
        pictured = pictured or marker == 0xDA
        position += length
    if size is None or not pictured:
        raise HeaderError("it holds no picture")
    return ImageHeader("JPEG", size[1], size[0], orientation)


def _png(data: bytes) -> ImageHeader:
    width, height = struct.unpack_from(">II", data, 16)
    orientation, pictured = 1, False
    for kind, body in _png_chunks(data):
        if kind == b"eXIf":
            orientation = _exif_orientation(body)
        pictured = pictured or kind == b"IDAT"
    if not pictured:
        raise HeaderError("it holds no picture")
    return ImageHeader("PNG", width, height, orientation)


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """The chunks up to IEND, each with its checksum verified; the pixels themselves are not copied."""
    position, view = len(_PNG), memoryview(data)
    while True:
        length, kind = struct.unpack_from(">I4s", data, position)
        end = position + 8 + length
        checksum = struct.unpack_from(">I", data, end)[0]
        if zlib.crc32(view[position + 4 : end]) != checksum:
            raise HeaderError("it is damaged (a PNG checksum differs)")
        if kind == b"IEND":
            return
        yield kind, b"" if kind == b"IDAT" else data[position + 8 : end]
        position = end + 4


def _webp(data: bytes) -> ImageHeader:
    if struct.unpack_from("<I", data, 4)[0] + 8 > len(data):
        raise HeaderError(CUT_OFF)
    size, orientation, position = None, 1, 12
    while position + 8 <= len(data):
        kind, length = struct.unpack_from("<4sI", data, position)
        body = position + 8
        if kind == b"VP8X" and size is None:
            size = (
                1 + int.from_bytes(data[body + 4 : body + 7], "little"),
                1 + int.from_bytes(data[body + 7 : body + 10], "little"),
            )
        elif kind == b"VP8L" and size is None:
            bits = struct.unpack_from("<I", data, body + 1)[0]
            size = 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
        elif kind == b"VP8 " and size is None:
            width, height = struct.unpack_from("<HH", data, body + 6)
            size = width & 0x3FFF, height & 0x3FFF
        elif kind == b"EXIF":
            exif = data[body : body + length]
            orientation = _exif_orientation(exif[6:] if exif.startswith(b"Exif\0\0") else exif)
        position = body + length + (length & 1)
    if size is None:
        raise HeaderError("it holds no picture")
    return ImageHeader("WebP", *size, orientation)


def _bmp(data: bytes) -> ImageHeader:
    pixels, header = struct.unpack_from("<II", data, 10)
    if header == 12:
        width, height, _, bits = struct.unpack_from("<HHHH", data, 18)
        compression = 0
    else:
        width, height, _, bits, compression = struct.unpack_from("<iiHHI", data, 18)
    if width < 0:
        raise HeaderError("its width is negative")
    height = abs(height)
    if compression == 0 and pixels + (width * bits + 31) // 32 * 4 * height > len(data):
        raise HeaderError(CUT_OFF)
    return ImageHeader("BMP", width, height)


def _tiff(data: bytes) -> ImageHeader:
    tags = dict(_tiff_tags(data))
    try:
        width, height = tags[256][0], tags[257][0]
    except (KeyError, IndexError):
        raise HeaderError("it has no picture size") from None
    depth = max(tags.get(258, (1,)), default=1)
    if depth > 16:
        raise HeaderError(f"its samples have {depth} bits, not 8 or 16")
    for offsets, counts in ((273, 279), (324, 325)):
        for offset, count in zip(tags.get(offsets, ()), tags.get(counts, ()), strict=False):
            if offset + count > len(data):
                raise HeaderError(CUT_OFF)
    if 273 not in tags and 324 not in tags:
        raise HeaderError("it holds no picture")
    return ImageHeader("TIFF", width, height, _valid(tags.get(274)), tags.get(262, (1,))[:1] == (0,))


def _exif_orientation(exif: bytes) -> int:
    """The orientation in a block of Exif data; 1 where there is none or it is damaged, as viewers do."""
    if not exif.startswith(_TIFF):
        return 1
    try:
        return _valid(dict(_tiff_tags(exif)).get(274))
    except (HeaderError, struct.error, OverflowError):
        return 1


def _valid(orientation: tuple[int, ...] | None) -> int:
    return orientation[0] if orientation and 1 <= orientation[0] <= 8 else 1


# The tags that are used: width, height, bits a sample, photometric interpretation, strips, orientation, tiles.
_TIFF_TAGS = {256, 257, 258, 262, 273, 274, 279, 324, 325}
_TIFF_INTEGERS = {1: "B", 3: "H", 4: "I", 16: "Q"}


def _tiff_tags(data: bytes) -> Iterator[tuple[int, tuple[int, ...]]]:
    """The integer tags of the first directory of a TIFF or BigTIFF, each once however often it is listed."""
    order = "<" if data[:1] == b"I" else ">"
    big = data[2:4] in (b"+\0", b"\0+")
    directory = struct.unpack_from(f"{order}{'Q' if big else 'I'}", data, 8 if big else 4)[0]
    entries = struct.unpack_from(f"{order}{'Q' if big else 'H'}", data, directory)[0]
    position = directory + (8 if big else 2)
    entry, inline = (20, 8) if big else (12, 4)
    if position + entries * entry > len(data):
        raise HeaderError(CUT_OFF)
    wanted = set(_TIFF_TAGS)
    for start in range(position, position + entries * entry, entry):
        tag, kind = struct.unpack_from(f"{order}HH", data, start)
        count = struct.unpack_from(f"{order}{'Q' if big else 'I'}", data, start + 4)[0]
        if tag not in wanted or kind not in _TIFF_INTEGERS:
            continue
        wanted.remove(tag)
        layout = struct.Struct(f"{order}{_TIFF_INTEGERS[kind]}")
        value = start + entry - inline
        if count * layout.size > inline:
            value = struct.unpack_from(f"{order}{'Q' if big else 'I'}", data, value)[0]
        if value + count * layout.size > len(data):
            raise HeaderError(CUT_OFF)
        yield tag, tuple(item for (item,) in layout.iter_unpack(data[value : value + count * layout.size]))


_PARSERS = {"JPEG": _jpeg, "PNG": _png, "TIFF": _tiff, "BMP": _bmp, "WebP": _webp}
