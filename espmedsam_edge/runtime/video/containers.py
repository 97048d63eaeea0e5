"""Whether a video file is whole: the sizes that MP4, AVI and Matroska containers state against the bytes there are.

Decoders read what there is of a cut-off file and report a normal end.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import BinaryIO


def looks_like_video(start: bytes) -> bool:
    """Whether a file's first 16 bytes are those of an MP4/MOV, AVI or Matroska/WebM container."""
    return (
        start[4:8] == b"ftyp" or (start[:4] == b"RIFF" and start[8:12] == b"AVI ") or start[:4] == b"\x1a\x45\xdf\xa3"
    )


def cut_off(path: Path) -> bool:
    """Whether the container states more bytes than the file has; False for containers that do not state it."""
    with path.open("rb") as stream:
        start = stream.read(16)
        length = os.fstat(stream.fileno()).st_size
        if start[:4] == b"RIFF":
            return _riff_end(stream, length) > length
        if start[:4] == b"\x1a\x45\xdf\xa3":
            return _matroska_end(stream) > length
        if start[4:8] in (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip"):
            return _mp4_cut(stream, length)
    return False


def _riff_end(stream: BinaryIO, length: int) -> int:
    """Where the last RIFF chunk ends; an AVI over 1 GB has several."""
    position = 0
    while position + 8 <= length:
        stream.seek(position)
        head = stream.read(8)
        if head[:4] != b"RIFF":  # trailing bytes that are none of the container's
            return position
        position += 8 + int.from_bytes(head[4:8], "little")
    return position


def _mp4_cut(stream: BinaryIO, length: int) -> bool:
    """Whether a box runs past the end of the file, or the movie's index is not there."""
    position, indexed = 0, False
    while position + 8 <= length:
        stream.seek(position)
        head = stream.read(16)
        size = int.from_bytes(head[:4], "big")
        indexed = indexed or head[4:8] == b"moov"
        if size == 1:
            size = int.from_bytes(head[8:16], "big")
        elif size == 0:  # to the end of the file
            size = length - position
        if size < 8:
            return True
        position += size
    return position != length or not indexed


def _matroska_end(stream: BinaryIO) -> int:
    """Where the segment ends; 0 if its size is not stated, as in a live recording."""
    stream.seek(4)
    header = _ebml_size(stream)
    if header is None or header > 1 << 20:
        return 0
    stream.seek(header, os.SEEK_CUR)
    if stream.read(4) != b"\x18\x53\x80\x67":
        return 0
    size = _ebml_size(stream)
    return 0 if size is None else stream.tell() + size


def _ebml_size(stream: BinaryIO) -> int | None:
    """A variable-length size; None if it is the reserved value for "unknown"."""
    first = stream.read(1)
    if not first or not first[0]:
        return None
    more = 8 - first[0].bit_length()
    bits = 7 * (more + 1)
    value = int.from_bytes(first + stream.read(more), "big") & ((1 << bits) - 1)
    return None if value == (1 << bits) - 1 else value
