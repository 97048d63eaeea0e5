"""Whether a video file is whole: the sizes that MP4, AVI, Matroska, FLV and MXF state against the bytes there are.

Decoders read what there is of a cut-off file and report a normal end.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import BinaryIO

START_BYTES = 1024
"""How much of a file's start ``looks_like_video`` wants to see."""

_MP4_BOXES = frozenset(
    b"ftyp moov mdat moof mfra sidx ssix free skip wide uuid meta styp pdin udta emsg prft pnot".split()
)
_MXF_KEY = b"\x06\x0e\x2b\x34"
_STARTS = (
    b"\x1a\x45\xdf\xa3",  # Matroska, WebM
    b"\x30\x26\xb2\x75\x8e\x66\xcf\x11",  # ASF, WMV
    b"\x06\x0e\x2b\x34\x02\x05\x01\x01",  # MXF
    b"\x00\x00\x01\xba",  # MPEG program stream: VOB, MPG
    b"\x00\x00\x01\xb3",  # MPEG-1 or -2 video
    b"FLV\x01",
    b"\x1f\x07\0",  # DV
    b"OggS",
    b"YUV4MPEG2 ",
    b"DKIF",  # IVF
    b"nut/multimedia container\0",
)
# The first unit of raw H.264 (parameter set, delimiter, supplement) and H.265 (video parameter set, delimiter).
_RAW_UNITS = frozenset((0x67, 0x27, 0x47, 0x09, 0x06, 0x40, 0x46))
_VIDEO_STREAMS = frozenset(bytes((number,)) for number in (*range(0xE0, 0xF0), 0xFD))
_TAIL, _LAST_PICTURES = 4 << 20, 12  # bytes, which hold as many pictures of the fastest broadcast
_PACKETS = ((0, 188), (4, 192), (0, 204))  # of MPEG transport streams: where the first starts, and how long each is


def looks_like_video(start: bytes) -> bool:
    """Whether a file's first ``START_BYTES`` are those of a video container, or of raw H.264, H.265 or MPEG video."""
    if has_container(start):
        return True
    unit = 4 if start.startswith(b"\0\0\0\1") else 3 if start.startswith(b"\0\0\1") else None
    return unit is not None and bool(start[unit : unit + 1]) and start[unit] in _RAW_UNITS


def has_container(start: bytes) -> bool:
    """Whether a file's first ``START_BYTES`` are those of a video container."""
    if start.startswith(_STARTS) or (start[:4] == b"RIFF" and start[8:12] == b"AVI "):
        return True
    if start[4:8] in (b"ftyp", b"moov", b"mdat", b"wide", b"pnot"):
        return True
    return any(
        len(start) > first + 3 * length
        and all(start[at] == 0x47 for at in range(first, first + 4 * length, length) if at < len(start))
        for first, length in _PACKETS
    )


def cut_off(path: Path) -> bool:
    """Whether the container states more bytes than the file has; False where it does not say, or is gone."""
    try:
        stream = path.open("rb")
    except OSError:
        return False
    with stream:
        start = stream.read(16)
        length = os.fstat(stream.fileno()).st_size
        if start[:4] == b"RIFF":
            return _riff_end(stream, length) > length
        if start[:4] == b"\x1a\x45\xdf\xa3":
            return _matroska_end(stream) > length
        if start[4:8] in (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip"):
            return _mp4_cut(stream, length)
        if start[:4] == b"FLV\x01":
            return _flv_end(stream, length) > length
        if start[:4] == _MXF_KEY:
            return _mxf_end(stream, length) > length
    return False


def last_video_pids(path: Path) -> set[int]:
    """The numbers of the streams (PIDs) that the last pictures in an MPEG transport stream belong to.

    A recording may go on in another stream than it began with, as when a channel changes its programme.
    """
    with path.open("rb") as stream:
        length = os.fstat(stream.fileno()).st_size
        stream.seek(max(0, length - _TAIL))
        tail = stream.read(_TAIL)
    for size, prefix in ((188, 0), (192, 4), (204, 0)):
        for first in range(prefix, size):
            marks = tail[first : len(tail) - 187 : size]
            if marks and not marks.strip(b"\x47"):
                packets = (tail[at : at + 188] for at in range(first, len(tail) - 187, size))
                pids = [pid for packet in packets if (pid := _begun_picture(packet)) is not None]
                return set(pids[-_LAST_PICTURES:])
    return set()


def _begun_picture(packet: bytes) -> int | None:
    """The PID of a transport packet in which a picture (a packet of a video stream, ISO/IEC 13818-1) begins."""
    if not packet[1] & 0x40 or not packet[3] & 0x10:  # no start, no payload
        return None
    start = 4 + (1 + packet[4] if packet[3] & 0x20 else 0)
    code = packet[start : start + 4]
    return (packet[1] & 0x1F) << 8 | packet[2] if code[:3] == b"\0\0\1" and code[3:4] in _VIDEO_STREAMS else None


def _flv_end(stream: BinaryIO, length: int) -> int:
    """Where the last tag of sound, pictures or data ends."""
    stream.seek(5)
    position = int.from_bytes(stream.read(4), "big") + 4
    while position + 4 <= length:
        stream.seek(position)
        head = stream.read(4)
        if head[0] & 0x1F not in (8, 9, 18):
            break
        position += 15 + int.from_bytes(head[1:], "big")
    return position - 4  # less the length of the tag, which some leave out after the last


def _mxf_end(stream: BinaryIO, length: int) -> int:
    """Where the last packet of key, length and value ends, or the footer begins that the first one names."""
    position, footer = 0, 0
    while position + 17 <= length:
        stream.seek(position)
        head = stream.read(64)
        if head[:4] != _MXF_KEY:
            break
        more = head[16] & 0x7F if head[16] & 0x80 else 0
        value = 17 + more
        if position == 0:  # a partition: version, grid, its own place, the one before, the footer's
            footer = int.from_bytes(head[value + 24 : value + 32], "big")
        position += value + (int.from_bytes(head[17:value], "big") if more else head[16])
    return max(position, footer)


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
    """Whether a box runs past the end of the file, or the movie's index or its pictures are not there.

    Bytes behind the last box that are no box (a dash cam's padding, a maker's notes) do not matter.
    """
    position, found = 0, set()
    while position + 8 <= length:
        stream.seek(position)
        head = stream.read(16)
        size, kind = int.from_bytes(head[:4], "big"), head[4:8]
        if kind not in _MP4_BOXES:
            break
        found.add(kind)
        if size == 1:
            size = int.from_bytes(head[8:16], "big")
        elif size == 0:  # to the end of the file
            size = length - position
        if size < 8 or position + size > length:
            return True
        position += size
    return not {b"moov", b"mdat"} <= found


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
