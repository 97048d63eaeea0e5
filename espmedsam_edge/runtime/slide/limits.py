"""What a slide's file may ask for: no more than its bytes account for, before anything of it is decoded."""

from __future__ import annotations

from pathlib import Path

from espmedsam_edge.errors import UserError
from espmedsam_edge.imaging.headers import read_header
from espmedsam_edge.runtime.dicom.codestreams import bare_codestream, size_of

LARGEST_TILE = 1 << 28
"""Bytes of a decoded tile or strip."""

CONVERT = "Convert it to a tiled TIFF: vips tiffsave IN OUT.tif --tile --pyramid --compression jpeg --bigtiff"

_LONGEST_SIDE = 1 << 21  # pixels; the largest slides have some 300,000
_MOST_TILES = 1 << 24  # of a level, whether they are stored or not; the largest slides have a million
_PIXELS_A_BYTE = 4096  # of a level; blank tiles of 256x256 pixels take 30 bytes where they are packed best
_ROOM = 1 << 16  # bytes of a tile's tables and profiles
_BY_HEADER = (b"\x89PNG", b"RIFF")
_CODESTREAMS = (b"\xff\xd8", b"\xff\x4f\xff\x51", b"\0\0\0\x0cjP  ")


def check_level(path: Path, size: tuple[int, int], tile: tuple[int, int], stored: int) -> None:
    """Refuse a level that its file cannot hold.

    Args:
        path: the slide, for messages.
        size, tile: (H, W) of the level and of a tile.
        stored: bytes of the file.

    Raises:
        UserError: sides that cannot be, tiles that are too large or too many, far more pixels than bytes.
    """
    sides = (*size, *tile)
    if not all(isinstance(side, int) and 1 <= side <= _LONGEST_SIDE for side in sides):
        raise UserError(f"cannot read {path} as a slide: its sizes cannot be.", "Copy it again.", exit_code=1)
    if size[0] * size[1] > _PIXELS_A_BYTE * stored:
        raise UserError(
            f"cannot read {path} as a slide: so few bytes hold no slide of its size.", "Copy it again.", exit_code=1
        )
    if -(-size[0] // tile[0]) * -(-size[1] // tile[1]) > _MOST_TILES:
        raise UserError(f"cannot read {path}: its tiles are too small, and too many.", CONVERT, exit_code=1)
    if 3 * tile[0] * tile[1] > LARGEST_TILE:
        raise UserError(f"cannot read {path}: it can only be read whole, or in tiles that large.", CONVERT, exit_code=1)


def most_stored(tile: tuple[int, int], sample_bytes: int = 1) -> int:
    """The most bytes that a tile, (H, W), may take in the file: twice those of its samples, and room for tables."""
    return 2 * 4 * tile[0] * tile[1] * sample_bytes + _ROOM


def check_stored(data: bytes, tile: tuple[int, int]) -> None:
    """Refuse compressed data whose own header states a larger size than the tile's, (H, W); not all have one.

    Raises:
        ValueError: they do, or are damaged.
    """
    if data.startswith(_BY_HEADER):
        header = read_header(data)
        stated = header.width, header.height
    elif data.startswith(_CODESTREAMS):
        found = size_of(bare_codestream(data))
        stated = found.width, found.height
    else:
        return
    if stated[0] > tile[1] or stated[1] > tile[0]:
        raise ValueError("its own header says that it is larger than its tile")
