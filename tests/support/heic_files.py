"""HEIC as phones write it: a grid of HEVC tiles, turned and mirrored by properties of the picture."""

from __future__ import annotations

import io
import struct
from collections.abc import Sequence

import numpy as np
import pytest

TILE = 64


def phone_heic(picture: np.ndarray, turns: Sequence[tuple[str, int]] = (), exif: bytes = b"") -> bytes:
    """A whole file.

    Args:
        picture: (H, W, 3) uint8 BGR, sides multiples of ``TILE``.
        turns: ``("irot", quarter turns against the clock)`` and ``("imir", axis)``, in the order in which they apply.
        exif: a TIFF structure, kept as an item that belongs to the picture.
    """
    rows, columns = picture.shape[0] // TILE, picture.shape[1] // TILE
    tiles, sets = [], {}
    for number in range(rows * columns):
        y, x = (TILE * place for place in divmod(number, columns))
        sets, data = _hevc(np.ascontiguousarray(picture[y : y + TILE, x : x + TILE]))
        tiles.append(data)
    arrays = b"".join(struct.pack(">BHH", 0x80 | kind, 1, len(unit)) + unit for kind, unit in sorted(sets.items()))
    level = sets[33][3:15]
    hvcc = _box(
        "hvcC", b"\1" + level + struct.pack(">HBBBBHB", 0xF000, 0xFC, 0xFD, 0xF8, 0xF8, 0, 0x0F) + b"\3" + arrays
    )
    sizes = [_full("ispe", struct.pack(">II", *size)) for size in ((TILE, TILE), picture.shape[1::-1])]
    ipco = _box("ipco", hvcc, *sizes, *(_box(kind, bytes([value])) for kind, value in turns))
    count = len(tiles)
    grid, note = count + 1, count + 2
    of_tiles = b"".join(struct.pack(">HBBB", item, 2, 0x81, 2) for item in range(1, grid))
    of_grid = struct.pack(">HBB", grid, 1 + len(turns), 3) + bytes(0x80 | 4 + index for index in range(len(turns)))
    ipma = _full("ipma", struct.pack(">I", count + 1), of_tiles, of_grid)
    infe = [_infe(item, "hvc1", 1) for item in range(1, grid)] + [_infe(grid, "grid", 0), _infe(note, "Exif", 1)]
    dimg = _box("dimg", struct.pack(f">HH{count}H", grid, count, *range(1, grid)))
    cdsc = _box("cdsc", struct.pack(">HHH", note, 1, grid))
    plan = struct.pack(">BBBBHH", 0, 0, rows - 1, columns - 1, *picture.shape[1::-1])
    stored = [*tiles, struct.pack(">I", 0) + exif]
    start = _box("ftyp", b"heic\0\0\0\0mif1heic")

    def meta(first: int) -> bytes:
        entries, position = b"", first
        for item, data in zip([*range(1, grid), note], stored, strict=True):
            entries += struct.pack(">HHHHII", item, 0, 0, 1, position, len(data))
            position += len(data)
        entries += struct.pack(">HHHHII", grid, 1, 0, 1, 0, len(plan))
        return _full(
            "meta",
            _full("hdlr", struct.pack(">I4s12s", 0, b"pict", b"") + b"\0"),
            _full("pitm", struct.pack(">H", grid)),
            _full("iloc", struct.pack(">BBH", 0x44, 0, note) + entries, version=1),
            _full("iinf", struct.pack(">H", note), *infe),
            _full("iref", dimg, cdsc),
            _box("iprp", ipco, ipma),
            _box("idat", plan),
        )

    return start + meta(len(start) + len(meta(0)) + 8) + _box("mdat", *stored)


def _hevc(tile: np.ndarray) -> tuple[dict[int, bytes], bytes]:
    """One picture: its parameter sets by kind, and its slices, each behind its length."""
    av = pytest.importorskip("av", reason="writes the tiles")
    container = av.open(io.BytesIO(), "w", format="hevc")
    stream = container.add_stream(
        "libx265", rate=1, options={"x265-params": "log-level=none:keyint=1:info=0", "crf": "8"}
    )
    stream.width = stream.height = TILE
    stream.pix_fmt = "yuv420p"
    data = b""
    for frame in (av.VideoFrame.from_ndarray(tile, format="bgr24"), None):
        data += b"".join(bytes(packet) for packet in stream.encode(frame))
    units = [unit for unit in data.replace(b"\0\0\0\1", b"\0\0\1").split(b"\0\0\1") if unit]
    kinds = [(unit[0] >> 1 & 63, unit) for unit in units]
    slices = b"".join(struct.pack(">I", len(unit)) + unit for kind, unit in kinds if kind < 32)
    return {kind: unit for kind, unit in kinds if kind in (32, 33, 34)}, slices


def _infe(item: int, kind: str, hidden: int) -> bytes:
    return _full("infe", struct.pack(">HH4s", item, 0, kind.encode()) + b"\0", version=2, flags=hidden)


def _full(name: str, *parts: bytes, version: int = 0, flags: int = 0) -> bytes:
    return _box(name, struct.pack(">I", version << 24 | flags), *parts)


def _box(name: str, *parts: bytes) -> bytes:
    body = b"".join(parts)
    return struct.pack(">I4s", 8 + len(body), name.encode()) + body
