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
from itertools import repeat

from espmedsam_edge.imaging.av1_header import check_av1_size
from espmedsam_edge.imaging.header_errors import CUT_OFF, HeaderError, NotReadError
from espmedsam_edge.imaging.heif_header import heif_format, read_heif
from espmedsam_edge.imaging.tiff_header import TIFF_STARTS, read_orientation, read_tiff

IMAGE_SUFFIXES = frozenset({
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".tif", ".tiff", ".bmp", ".dib", ".webp", ".gif", ".avif", ".heic",
    ".heif", ".hif",
})  # fmt: skip
"""How names of image files end, in small letters; HEIC needs a package of its own to be read."""

UNREAD_SUFFIXES = frozenset({".jp2", ".j2k", ".jpx", ".jxl", ".pnm", ".ppm", ".pgm", ".pbm", ".exr", ".psd"})
"""Of pictures that are not read: in a folder each is told by name, not left out in silence."""

MOST_SCANS = 64
"""Of a JPEG; programs write a dozen. Each costs 1.3 ms a megapixel, however little is in it."""

_NOT_READ = {
    b"\0\0\0\x0cjP  ": "JPEG 2000", b"\xff\x4f\xff\x51": "JPEG 2000", b"\0\0\0\x0cJXL ": "JPEG XL",
    b"\xff\x0a": "JPEG XL", b"\x76\x2f\x31\x01": "OpenEXR", b"8BPS": "a Photoshop file", b"%PDF": "a PDF",
    b"SIMPLE  =": "FITS", **{b"P" + digit + end: "PNM" for digit in (b"1", b"2", b"3", b"4", b"5", b"6")
                             for end in (b"\n", b" ", b"\r")},
}  # fmt: skip
"""How files of other kinds of pictures start."""

_FEW_PARTS, _BYTES_A_PART = 1000, 128  # segments, chunks and blocks: so many, and one more for so many bytes on average
_PNG = b"\x89PNG\r\n\x1a\n"
_PNG_KEPT = frozenset({b"IHDR", b"PLTE", b"tRNS", b"IDAT"})
# In entropy-coded data 0xFF is followed by 0x00 or a restart marker; any other pair starts a segment.
_JPEG_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]", re.DOTALL)
_JPEG_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}


@dataclass(frozen=True)
class ImageHeader:
    """What matters of a header.

    Attributes:
        format: "JPEG", "PNG", "TIFF", "BMP", "WebP", "GIF", "AVIF" or "HEIC".
        width, height: pixels as stored, before ``orientation`` is applied.
        orientation: Exif's number, 1 to 8; 1 is upright.
        white_is_zero: grey samples count down from white (TIFF's photometric interpretation 0).
        pictures: how many the file holds: pages, or frames of an animation.
        depth: bits of a TIFF's or AVIF's samples; 8 stands for whatever others have.
        ended: False of a JPEG without its end mark, of which only decoding tells whether anything else is missing.
    """

    format: str
    width: int
    height: int
    orientation: int = 1
    white_is_zero: bool = False
    pictures: int = 1
    depth: int = 8
    ended: bool = True


def image_format(start: bytes) -> str | None:
    """The format that a file's first 64 bytes announce, or None for anything that is not read here."""
    if start.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if start.startswith(_PNG):
        return "PNG"
    if start.startswith(TIFF_STARTS):
        return "TIFF"
    if start.startswith(b"RIFF") and start[8:12] == b"WEBP":
        return "WebP"
    if start.startswith(b"BM"):
        return "BMP"
    if start.startswith((b"GIF87a", b"GIF89a")):
        return "GIF"
    return heif_format(start)


def read_header(data: bytes) -> ImageHeader:
    """Parse a whole file's header and check that nothing of the file is missing.

    Raises:
        HeaderError: empty, another format, cut off, or damaged where that can be told.
    """
    if not data:
        raise HeaderError("it is empty")
    name = image_format(data[:64])
    if name is None:
        other = next((kind for start, kind in _NOT_READ.items() if data.startswith(start)), None)
        if other is not None:
            raise NotReadError(f"it is {other}, which is not read")
        raise HeaderError("it is not a JPEG, PNG, TIFF, BMP, WebP, GIF, AVIF or HEIC image")
    try:
        return _PARSERS[name](data)
    except (struct.error, IndexError, OverflowError) as error:
        raise HeaderError(CUT_OFF) from error


def _jpeg(data: bytes) -> ImageHeader:
    size, orientation, position, scans = None, 1, 2, 0
    simple, samples, ended = True, 0, False  # one scan of all samples, from its start to its end
    for _ in _parts(data):
        found = _JPEG_MARKER.search(data, position)
        if found is None:
            if size is None or scans != 1 or not simple:
                raise HeaderError(CUT_OFF)
            break
        marker, position = data[found.start() + 1], found.end()
        if marker == 0xD9:
            ended = True
            break
        if marker in (0x01, 0xD8):
            continue
        length = struct.unpack_from(">H", data, position)[0]
        if length < 2 or position + length > len(data):
            raise HeaderError(CUT_OFF)
        if marker in _JPEG_FRAMES and size is None:
            size, samples = struct.unpack_from(">HH", data, position + 3), data[position + 7]
            simple = marker in (0xC0, 0xC1)
        elif marker == 0xDD and any(data[position + 2 : position + 4]):  # restarts: decoders look for the next
            simple = False
        elif marker == 0xE1 and data[position + 2 : position + 8] == b"Exif\0\0":
            orientation = _exif_orientation(data[position + 8 : position + length])
        scans += marker == 0xDA
        simple = simple and (marker != 0xDA or data[position + 2] == samples)
        if scans > MOST_SCANS:
            raise HeaderError(f"it has more than {MOST_SCANS} scans")
        position += length
    if size is None or not scans:
        raise HeaderError("it holds no picture")
    return ImageHeader("JPEG", size[1], size[0], orientation, ended=ended)


def _parts(data: bytes) -> Iterator[None]:
    """As many turns as a file of this length may have parts, each of which costs time, however little is in it."""
    yield from repeat(None, _FEW_PARTS + len(data) // _BYTES_A_PART)
    raise HeaderError("it is of too many parts")


def _png(data: bytes) -> ImageHeader:
    width, height = struct.unpack_from(">II", data, 16)
    orientation, pictured, pictures = 1, False, 1
    for kind, body in _png_chunks(data):
        if kind == b"eXIf":
            orientation = _exif_orientation(body)
        elif kind == b"acTL":  # an animation's
            pictures = max(1, struct.unpack_from(">I", body)[0])
        pictured = pictured or kind == b"IDAT"
    if not pictured:
        raise HeaderError("it holds no picture")
    return ImageHeader("PNG", width, height, orientation, pictures=pictures)


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """The chunks up to IEND, each with its checksum verified; the pixels themselves are not copied."""
    position, view = len(_PNG), memoryview(data)
    for _ in _parts(data):
        length, kind = struct.unpack_from(">I4s", data, position)
        end = position + 8 + length
        checksum = struct.unpack_from(">I", data, end)[0]
        if zlib.crc32(view[position + 4 : end]) != checksum:
            raise HeaderError("it is damaged (a PNG checksum differs)")
        if kind == b"IEND":
            return
        yield kind, b"" if kind == b"IDAT" else data[position + 8 : end]
        position = end + 4


def bare_png(data: bytes) -> bytes:
    """A whole PNG with what its pixels are made of alone, the first picture of an animation.

    libpng unpacks each compressed text, 8 MB in 8 kB, and keeps it; and it prints the names that colour profiles have.
    """
    pieces, position = [_PNG], len(_PNG)
    while True:
        length, kind = struct.unpack_from(">I4s", data, position)
        end = position + 12 + length
        if kind in _PNG_KEPT or kind == b"IEND":
            pieces.append(data[position:end])
        if kind == b"IEND":
            return b"".join(pieces)
        position = end


def _webp(data: bytes) -> ImageHeader:
    if struct.unpack_from("<I", data, 4)[0] + 8 > len(data):
        raise HeaderError(CUT_OFF)
    size, orientation, position, pictures = None, 1, 12, 0
    for _ in _parts(data):
        if position + 8 > len(data):
            break
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
        elif kind == b"ANMF":  # a frame of an animation
            pictures += 1
        elif kind == b"EXIF":
            exif = data[body : body + length]
            orientation = _exif_orientation(exif[6:] if exif.startswith(b"Exif\0\0") else exif)
        position = body + length + (length & 1)
    if size is None:
        raise HeaderError("it holds no picture")
    return ImageHeader("WebP", *size, orientation, pictures=max(1, pictures))


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


def _gif(data: bytes) -> ImageHeader:
    width, height, packed = struct.unpack_from("<HHB", data, 6)
    position, pictures, parts = 13 + _colour_table(packed), 0, _parts(data)
    while data[position] != 0x3B:  # the trailer
        if data[position] == 0x2C:
            pictures += 1
            position += 10 + _colour_table(data[position + 9]) + 1
        elif data[position] == 0x21:
            position += 2
        else:
            raise HeaderError("it is damaged (an unknown GIF block)")
        while data[position]:  # sub-blocks
            position += 1 + data[position]
            next(parts)
        position += 1
        next(parts)
    if pictures == 0:
        raise HeaderError("it holds no picture")
    return ImageHeader("GIF", width, height, pictures=pictures)


def _colour_table(packed: int) -> int:
    """The bytes of a GIF's colour table, whose size is in the low bits of ``packed``; 0 without one."""
    return 3 << (packed & 7) + 1 if packed & 0x80 else 0


def _heif(data: bytes) -> ImageHeader:
    found = read_heif(data)
    name = image_format(data[:64]) or "HEIC"
    if name == "AVIF":
        check_av1_size(data, found.width, found.height)
    return ImageHeader(name, found.width, found.height, found.orientation, pictures=found.pictures, depth=found.depth)


def _tiff(data: bytes) -> ImageHeader:
    found = read_tiff(data)
    return ImageHeader(
        "TIFF", found.width, found.height, found.orientation, found.white_is_zero, found.pictures, found.depth
    )


def _exif_orientation(exif: bytes) -> int:
    """The orientation in a block of Exif data; 1 where there is none or it is damaged, as viewers do."""
    if not exif.startswith(TIFF_STARTS):
        return 1
    try:
        return read_orientation(exif).value
    except (HeaderError, struct.error, OverflowError):
        return 1


_PARSERS = {
    "JPEG": _jpeg, "PNG": _png, "TIFF": _tiff, "BMP": _bmp, "WebP": _webp, "GIF": _gif, "AVIF": _heif, "HEIC": _heif,
}  # fmt: skip
