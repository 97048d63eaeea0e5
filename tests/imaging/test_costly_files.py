"""Small image files that cost a decoder, or a reader of headers, far more than their size: refused or read at once."""

from __future__ import annotations

import io
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Callable

import cv2
import numpy as np
import pytest

from espmedsam_edge.errors import UserError
from espmedsam_edge.imaging.decode import decode_image
from espmedsam_edge.imaging.headers import MOST_SCANS

Image = pytest.importorskip("PIL.Image", reason="Pillow writes progressive files")
PICTURE = np.asarray(cv2.resize(np.random.default_rng(0).integers(0, 256, (5, 6, 3), np.uint8), (600, 400)))


def jpeg_with_scans(more: int) -> bytes:
    """A progressive JPEG whose last scan comes ``more`` times again."""
    stream = io.BytesIO()
    Image.fromarray(PICTURE).save(stream, "JPEG", progressive=True)
    data = stream.getvalue()
    last = data.rfind(b"\xff\xc4", 0, data.rfind(b"\xff\xda"))
    return data[:-2] + data[last:-2] * more + b"\xff\xd9"


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png_with(chunks: bytes) -> bytes:
    data = cv2.imencode(".png", PICTURE)[1].tobytes()
    return data[:33] + chunks + data[33:]


def tiff_with(tags: list[tuple[int, int, int, int]], more: bytes = b"") -> bytes:
    """A TIFF's header and its first directory: tag, type, count and value of each entry."""
    entries = b"".join(struct.pack("<HHII", *tag) for tag in tags)
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + struct.pack("<I", 0) + more


_SIZE = [(256, 3, 1, 64), (257, 3, 1, 64)]
COSTLY: dict[str, Callable[[], bytes]] = {
    "scans": lambda: jpeg_with_scans(2000),
    "JPEG segments": lambda: b"\xff\xd8" + b"\xff\xe0\0\2" * 4_000_000 + jpeg_with_scans(0)[2:],
    "JPEG marks": lambda: b"\xff\xd8\xff\xe0\0\2" + b"\xff\x01" * 8_000_000 + jpeg_with_scans(0)[2:],
    "PNG chunks": lambda: png_with(chunk(b"abCd", b"") * 1_300_000),
    "WebP chunks": lambda: b"RIFF" + struct.pack("<I", 16_000_004) + b"WEBP" + b"abcd\0\0\0\0" * 2_000_000,
    "GIF blocks": lambda: b"GIF89a" + bytes([64, 0, 64, 0, 0, 0, 0]) + b"\x21\xfe" + b"\1a" * 8_000_000 + b"\0;",
    "TIFF entries": lambda: tiff_with([*_SIZE, *([(999, 3, 1, 0)] * 60_000)]),
    "TIFF numbers": lambda: tiff_with(
        [*_SIZE, *((tag, 3, 8_000_000, 200) for tag in (258, 273, 279, 324, 325, 262, 274))], bytes(16_000_300)
    ),
}


@pytest.mark.parametrize("kind", COSTLY)
def test_files_of_too_many_parts_are_refused_at_once(kind: str) -> None:
    data = COSTLY[kind]()
    begin = time.process_time()
    with pytest.raises(UserError, match=r"cannot read the image: it (has more than|is of too many|holds no)"):
        decode_image(data)
    assert time.process_time() - begin < 2  # the scans alone took 14 s, the others up to 8


@pytest.mark.parametrize("more", [0, 20, MOST_SCANS // 2])
def test_progressive_pictures_are_read(more: int) -> None:
    data = jpeg_with_scans(more)
    expected = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    np.testing.assert_array_equal(decode_image(data), expected)


@pytest.mark.parametrize("form", ["zTXt", "iTXt"])
def test_texts_that_unpack_to_gigabytes_are_left_out(form: str) -> None:
    """libpng alone takes 13 s for these 0.8 MB."""
    text = zlib.compress(bytes(7_900_000), 9)
    body = (b"k\0\0" if form == "zTXt" else b"k\0\1\0\0\0") + text
    data = png_with(chunk(form.encode(), body) * 100)
    begin = time.process_time()
    np.testing.assert_array_equal(decode_image(data), PICTURE)
    assert time.process_time() - begin < 2


def test_nothing_of_a_files_metadata_is_printed() -> None:
    """libpng warns of colour profiles, and prints the names that they have."""
    profile = chunk(b"iCCP", b"\x1b]0;owned\0\0" + zlib.compress(b"no profile"))
    script = "import sys; from espmedsam_edge.imaging.decode import decode_image; decode_image(sys.stdin.buffer.read())"
    done = subprocess.run([sys.executable, "-c", script], input=png_with(profile), capture_output=True, check=True)
    assert (done.stdout, done.stderr) == (b"", b"")


def test_a_chain_of_tiff_directories_is_not_walked_for_long() -> None:
    """Directories may lie in each other, so a megabyte can hold many thousands of them."""
    entries = 900
    directory = b"".join(struct.pack("<HHII", 999, 3, 1, 0) for _ in range(entries))
    whole = cv2.imencode(".tif", PICTURE[:64, :64])[1].tobytes()
    data = bytearray(whole)
    first = struct.unpack_from("<I", data, 4)[0]
    count = struct.unpack_from("<H", data, first)[0]
    link = first + 2 + 12 * count
    for _ in range(200):
        struct.pack_into("<I", data, link, len(data))
        link = len(data) + 2 + 12 * entries
        data += struct.pack("<H", entries) + directory + bytes(4)
    begin = time.process_time()
    np.testing.assert_array_equal(decode_image(bytes(data)), PICTURE[:64, :64])
    assert time.process_time() - begin < 2
