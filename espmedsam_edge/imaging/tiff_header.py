"""TIFF and BigTIFF, and Exif, which is one: the tags that matter, how many pictures there are, and the orientation."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator, Set
from mmap import mmap
from typing import NamedTuple

from espmedsam_edge.imaging.header_errors import CUT_OFF, HeaderError, NotReadError

TIFF_STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")

_NEW_SUBFILE_TYPE, _WIDTH, _HEIGHT, _BITS, _COMPRESSION, _PHOTOMETRIC, _DESCRIPTION = 254, 256, 257, 258, 259, 262, 270
_STRIPS, _ORIENTATION, _STRIP_BYTES, _TILES, _TILE_BYTES, _SOFTWARE = 273, 274, 279, 324, 325, 305
_SAMPLES, _PLANAR, _INNER, _EXTRA_SAMPLES = 277, 284, 330, 338
_X_RESOLUTION, _Y_RESOLUTION, _RESOLUTION_UNIT = 282, 283, 296
_USED = {
    _NEW_SUBFILE_TYPE, _WIDTH, _HEIGHT, _BITS, _COMPRESSION, _PHOTOMETRIC, _DESCRIPTION,
    _STRIPS, _ORIENTATION, _STRIP_BYTES, _TILES, _TILE_BYTES, _SAMPLES, _PLANAR, _INNER, _EXTRA_SAMPLES, _SOFTWARE,
}  # fmt: skip
_RATIONAL = 5  # two numbers, above and below
# Bytes, characters, unsigned integers, places.
_LAYOUTS = {1: "B", 2: "B", 3: "H", 4: "I", _RATIONAL: "Q", 13: "I", 16: "Q", 18: "Q"}
_MOST_PICTURES = 10_000
_MOST_ENTRIES = 1000  # of a directory; there are not as many tags in use
_MOST_STRIPS, _MOST_VALUES, _MOST_TEXT = (
    1_000_000,
    64,
    1 << 16,
)  # of strips and tiles, of other numbers, of a description
_SCALED_DOWN, _TRANSPARENCY = 1, 4  # bits of NewSubfileType: a thumbnail or a level of a pyramid; a mask
_PREMULTIPLIED, _APART = 1, 2  # of ExtraSamples: how transparency lies beside colours
_IMAGEJ = re.compile(rb"ImageJ=.*^images=(\d{1,9})$", re.DOTALL | re.MULTILINE)
# What OpenCV's TIFF reader is built with or does without; others are named.
_COMPRESSIONS = {
    34712: "JPEG 2000", 33003: "JPEG 2000", 33005: "JPEG 2000", 50000: "Zstandard", 50001: "WebP", 50002: "JPEG XL",
    34925: "LZMA", 34887: "LERC",
}  # fmt: skip


class Tiff(NamedTuple):
    """The first picture of a file as stored, and how many there are beside thumbnails and levels of a pyramid.

    Attributes:
        depth: bits of a sample.
    """

    width: int
    height: int
    orientation: int
    white_is_zero: bool
    pictures: int
    depth: int


class Scale(NamedTuple):
    """What a file says of the size of its pixels.

    Attributes:
        description: the first picture's, where programs write what they know; "" without one.
        across, down: pixels of the upright picture in a unit; 0 where it is not said.
        unit: TIFF's: 1 none, 2 inches, 3 centimetres.
    """

    description: str
    across: float
    down: float
    unit: int


class Orientation(NamedTuple):
    """Exif's number, 1 to 8 (1 where none is given), and where in the file it stands (None: nowhere)."""

    value: int
    place: int | None


class _Tag(NamedTuple):
    values: tuple[int, ...]
    place: int
    kind: int


def read_tiff(data: bytes) -> Tiff:
    """Parse a whole file; nothing of the first picture may be missing.

    Raises:
        HeaderError: cut off, no picture, or one that common readers show wrongly.
        struct.error: cut off.
    """
    first, following = _directory(data, _main_directory(data))
    values = {tag: found.values for tag, found in first.items()}
    try:
        width, height = values[_WIDTH][0], values[_HEIGHT][0]
    except (KeyError, IndexError):
        raise HeaderError("it has no picture size") from None
    depth = max(values.get(_BITS, (1,)), default=1)
    _check_kind(values, depth)
    for offsets, counts in ((_STRIPS, _STRIP_BYTES), (_TILES, _TILE_BYTES)):
        for offset, count in zip(values.get(offsets, ()), values.get(counts, ()), strict=False):
            if offset + count > len(data):
                raise HeaderError(CUT_OFF)
    if _STRIPS not in values and _TILES not in values:
        raise HeaderError("it holds no picture")
    described = _IMAGEJ.search(bytes(value & 255 for value in values.get(_DESCRIPTION, ())))
    pictures = max(1 + _further_pictures(data, following), int(described[1]) if described else 1)
    white_is_zero = values.get(_PHOTOMETRIC, (1,))[:1] == (0,)
    return Tiff(width, height, _orientation(first).value, white_is_zero, pictures, depth)


def _check_kind(values: dict[int, tuple[int, ...]], depth: int) -> None:
    """Refuse what libtiff and OpenCV read as another picture than it is, without a word."""
    samples = values.get(_SAMPLES, (1,))[0]
    if values.get(_PHOTOMETRIC, (1,))[0] in (8, 9, 10):
        raise NotReadError("its colours are CIELAB")
    if depth > 8 and samples > 1 and values.get(_PLANAR, (1,))[0] == 2:
        raise NotReadError(f"its colours of {depth} bits lie in separate planes")
    if depth > 8 and samples == 2:
        raise NotReadError(f"it is grey with transparency, or of two channels, of {depth} bits")


def compression_name(data: bytes) -> str | None:
    """The name of a compression that common readers do without, if the first picture has one."""
    try:
        tag = _directory(data, _main_directory(data))[0].get(_COMPRESSION)
    except (HeaderError, struct.error, OverflowError):
        return None
    return _COMPRESSIONS.get(tag.values[0]) if tag and tag.values else None


def read_scale(data: bytes | bytearray | mmap) -> Scale:
    """What the first picture says of the size of its pixels.

    Raises:
        HeaderError, struct.error, OverflowError: damaged.
    """
    wanted = {_DESCRIPTION, _ORIENTATION, _X_RESOLUTION, _Y_RESOLUTION, _RESOLUTION_UNIT}
    tags = _directory(data, _main_directory(data), wanted)[0]
    shift = (0, 32) if data[:1] == b"I" else (32, 0)  # of a rational's two numbers in one

    def rational(tag: int) -> float:
        if tag not in tags or tags[tag].kind != _RATIONAL or not tags[tag].values:
            return 0.0
        above, below = (tags[tag].values[0] >> bits & 0xFFFFFFFF for bits in shift)
        return above / below if below else 0.0

    across, down = rational(_X_RESOLUTION), rational(_Y_RESOLUTION)
    if _orientation(tags).value > 4:  # it lies on its side
        across, down = down, across
    text = bytes(value & 255 for value in tags[_DESCRIPTION].values) if _DESCRIPTION in tags else b""
    unit = tags[_RESOLUTION_UNIT].values[0] if _RESOLUTION_UNIT in tags and tags[_RESOLUTION_UNIT].values else 2
    return Scale(text.rstrip(b"\0").decode("utf-8", "replace"), across, down, unit)


def read_orientation(data: bytes) -> Orientation:
    """The orientation of the first picture, or of an Exif block.

    Raises:
        HeaderError, struct.error, OverflowError: damaged.
    """
    return _orientation(_directory(data, _first_directory(data))[0])


def plain_tiff(data: bytes) -> bytes:
    """The same file as readers take it that turn pictures or their tiles, show the first, and mix in transparency.

    The picture that ``read_tiff`` names comes first, upright as stored, its colours as they are.
    """
    main = _main_directory(data)
    tags = _directory(data, main)[0]
    order, big = _byte_order(data)
    value, place = _orientation(tags)
    extra = tags.get(_EXTRA_SAMPLES)
    turned = place is not None and value != 1
    apart = extra is not None and extra.values[:1] == (_APART,)
    if main == _first_directory(data) and not turned and not apart:
        return data
    changed = bytearray(data)
    if main != _first_directory(data):
        struct.pack_into(f"{order}{'Q' if big else 'I'}", changed, 8 if big else 4, main)
    if place is not None and turned:
        struct.pack_into(f"{order}H", changed, place, 1)  # a short at the start of the field
    if extra is not None and apart:  # libtiff multiplies colours by it, unless that was done
        struct.pack_into(f"{order}H", changed, extra.place, _PREMULTIPLIED)
    return bytes(changed)


class TiffPages:
    """The pictures of a file beside thumbnails and levels of a pyramid: changes it in place to show one or the other.

    Example:
        >>> import cv2, numpy as np
        >>> _ = cv2.imwritemulti("stack.tif", [np.full((8, 8), value, np.uint8) for value in (10, 20, 30)])
        >>> pages = TiffPages(bytearray(open("stack.tif", "rb").read()))
        >>> [int(cv2.imdecode(np.frombuffer(pages.show(number), np.uint8), -1).mean()) for number in range(len(pages))]
        [10, 20, 30]

    Args:
        data: the whole file.

    Attributes:
        description: the first picture's, where programs say what the others are; "" without one.
        means_numbers: written by a program that means numbers, not what they look like, where 0 is white.
    """

    def __init__(self, data: bytearray) -> None:
        chain = list(_chain(data, _first_directory(data)))
        self._data = data
        self._places = [place for tags, place in chain if not _kind(tags) & (_SCALED_DOWN | _TRANSPARENCY)]
        self._tags = _directory(data, self._places[0])[0] if self._places else {}
        text = bytes(value & 255 for value in self._values(_DESCRIPTION))
        self.description = text.rstrip(b"\0").decode("utf-8", "replace")
        software = bytes(value & 255 for value in self._values(_SOFTWARE))
        self.means_numbers = text.startswith(b"ImageJ=") or software.startswith(b"tifffile")
        # ImageJ writes one directory alone before what is large: the others' samples follow the first one's.
        described = _IMAGEJ.search(text)
        follow = len(self._places) == 1 and described is not None and self._values(_COMPRESSION)[:1] in ((), (1,))
        self._following = int(described[1]) if described is not None and follow else 0
        if self._following > _MOST_PICTURES:
            raise HeaderError("it is of too many parts")

    def _values(self, tag: int) -> tuple[int, ...]:
        return self._tags[tag].values if tag in self._tags else ()

    def __len__(self) -> int:
        return max(len(self._places), self._following)

    def show(self, number: int) -> bytearray:
        """The file, with this picture as its only one.

        Raises:
            struct.error: damaged.
        """
        (order, big), changed = _byte_order(self._data), self._data
        offset, place = f"{order}{'Q' if big else 'I'}", self._places[min(number, len(self._places) - 1)]
        struct.pack_into(offset, changed, 8 if big else 4, place)
        entries = struct.unpack_from(f"{order}{'Q' if big else 'H'}", changed, place)[0]
        end = place + (8 if big else 2) + entries * (20 if big else 12)
        if end + struct.calcsize(offset) <= len(changed):
            struct.pack_into(offset, changed, end, 0)  # no picture follows
        if self._following:
            layout, offsets = _LAYOUTS[self._tags[_STRIPS].kind], self._tags[_STRIPS]
            shift = number * sum(self._values(_STRIP_BYTES))
            for index, strip in enumerate(offsets.values):
                start = offsets.place + index * struct.calcsize(layout)
                struct.pack_into(f"{order}{layout}", changed, start, strip + shift)
        return changed


def _orientation(tags: dict[int, _Tag]) -> Orientation:
    tag = tags.get(_ORIENTATION)
    if tag is None or not tag.values or not 1 <= tag.values[0] <= 8:
        return Orientation(1, None)
    return Orientation(tag.values[0], tag.place)


def _first_directory(data: bytes | bytearray | mmap) -> int:
    order, big = _byte_order(data)
    return int(struct.unpack_from(f"{order}{'Q' if big else 'I'}", data, 8 if big else 4)[0])


def _main_directory(data: bytes | bytearray | mmap) -> int:
    """Where the first picture is that is neither scaled down nor a mask: in the chain, else inside one of it.

    A preview may stand before it, and raw converters put the picture itself inside the preview's directory.
    """
    first = _first_directory(data)
    inner: list[int] = []
    for tags, place in _chain(data, first):
        if not _kind(tags) & (_SCALED_DOWN | _TRANSPARENCY):
            return place
        inner += tags[_INNER].values if _INNER in tags else ()
    for place in inner:
        for tags, directory in _chain(data, place):
            if not _kind(tags) & (_SCALED_DOWN | _TRANSPARENCY):
                return directory
    return first


def _kind(tags: dict[int, _Tag]) -> int:
    tag = tags.get(_NEW_SUBFILE_TYPE)
    return tag.values[0] if tag and tag.values else 0


def _chain(data: bytes | bytearray | mmap, directory: int) -> Iterator[tuple[dict[int, _Tag], int]]:
    """Directories that follow each other, as far as they are whole; a chain that bites its tail ends."""
    seen: set[int] = set()
    while directory and directory not in seen and len(seen) < _MOST_PICTURES:
        seen.add(directory)
        place = directory
        try:
            tags, directory = _directory(data, directory, {_NEW_SUBFILE_TYPE, _INNER})
        except (HeaderError, struct.error, OverflowError):
            return
        yield tags, place


def _byte_order(data: bytes | bytearray | mmap) -> tuple[str, bool]:
    return "<" if data[:1] == b"I" else ">", data[2:4] in (b"+\0", b"\0+")


def _further_pictures(data: bytes, directory: int) -> int:
    """How many full pictures follow."""
    return sum(not _kind(tags) & (_SCALED_DOWN | _TRANSPARENCY) for tags, _ in _chain(data, directory))


def _directory(data: bytes | bytearray | mmap, directory: int, wanted: Set[int] = _USED) -> tuple[dict[int, _Tag], int]:
    """The wanted tags of a directory, each once however often it is listed, and where the next one is (0: none)."""
    order, big = _byte_order(data)
    offset = f"{order}{'Q' if big else 'I'}"
    entries = struct.unpack_from(f"{order}{'Q' if big else 'H'}", data, directory)[0]
    start, entry, inline = directory + (8 if big else 2), *((20, 8) if big else (12, 4))
    end = start + entries * entry
    if end > len(data):
        raise HeaderError(CUT_OFF)
    if entries > _MOST_ENTRIES:
        raise HeaderError("it is of too many parts")
    tags = dict(_tags(data, range(start, end, entry), offset, entry - inline, inline, wanted))
    return tags, struct.unpack_from(offset, data, end)[0] if end + inline <= len(data) else 0


def _tags(
    data: bytes | bytearray | mmap, entries: range, offset: str, skipped: int, inline: int, used: Set[int]
) -> Iterator[tuple[int, _Tag]]:
    order, wanted = offset[0], set(used)
    for start in entries:
        tag, kind = struct.unpack_from(f"{order}HH", data, start)
        count = struct.unpack_from(offset, data, start + 4)[0]
        if tag not in wanted or kind not in _LAYOUTS:
            continue
        wanted.remove(tag)
        layout = struct.Struct(f"{order}{_LAYOUTS[kind]}")
        place = start + skipped
        if count * layout.size > inline:
            place = struct.unpack_from(offset, data, place)[0]
        if place + count * layout.size > len(data):
            raise HeaderError(CUT_OFF)
        if tag in (_STRIPS, _STRIP_BYTES, _TILES, _TILE_BYTES):
            if count > _MOST_STRIPS:
                raise HeaderError("it is of too many parts")
        else:
            count = min(count, _MOST_TEXT if tag == _DESCRIPTION else _MOST_VALUES)
        values = tuple(item for (item,) in layout.iter_unpack(data[place : place + count * layout.size]))
        yield tag, _Tag(values, place, kind)
