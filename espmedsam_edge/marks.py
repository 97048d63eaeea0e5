"""How this program knows its own results again: what each kind of file says of who wrote it.

Pictures and videos carry ``MARK`` in their metadata, DICOM-SEGs name the program as their maker, and tables, lines of
JSON and reports are known by the form that only this program gives them. Checkpoints count as nobody's: one may be
weeks of training.
"""

from __future__ import annotations

import json
import os
import re
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MARK = "espmedsam-edge"
"""In the metadata of pictures: a PNG's ``Software``, a JPEG's comment."""

VIDEO_MARK = f"written by {MARK}"
"""In a video's ``comment``."""

MAKER = "ESP-MedSAM Edge"
"""Manufacturer of DICOM-SEGs and reports."""

AREA_COLUMNS: tuple[str, ...] = (
    "source",
    "frame",
    "time_s",
    "area_px",
    "area_fraction",
    "area_mm2",
    "modality",
    "objects",
    "confidence",
)
"""The table of areas."""

OBJECT_COLUMNS: tuple[str, ...] = (
    "source",
    "frame",
    "time_s",
    "modality",
    "id",
    "gap",
    "x",
    "y",
    "box_x",
    "box_y",
    "box_width",
    "box_height",
    "eccentricity",
    "probability",
    "area_px",
    "equivalent_diameter_px",
    "longest_px",
    "shortest_px",
    "perimeter_px",
    "unit",
    "area",
    "equivalent_diameter",
    "longest",
    "shortest",
    "perimeter",
)
"""The table of objects; the last five are in ``unit``, empty where it is."""

SCORE_COLUMNS: tuple[str, ...] = ("modality", "dataset", "id", "dice_percent")
"""How a table of scores begins."""

BENCH_TITLE = "# Bench of "
"""How a benchmark's page begins."""

_HEAD = 64 << 10
_LONGEST_LINE = 16 << 20
_MOST_JSON = 64 << 20
_PNG, _JPEG = b"\x89PNG\r\n\x1a\n", b"\xff\xd8"
_PNG_HEADER = len(_PNG) + 25  # with the chunk IHDR, which comes first
_FRAME = re.compile(r"\d{6,}\.png")


def marked(picture: bytes) -> bytes:
    """A PNG or JPEG with the mark in its metadata; its pixels stay as they are."""
    if picture.startswith(_PNG):
        text = b"tEXtSoftware\0" + MARK.encode()
        chunk = struct.pack(">I", len(text) - 4) + text + struct.pack(">I", zlib.crc32(text))
        return picture[:_PNG_HEADER] + chunk + picture[_PNG_HEADER:]
    if picture.startswith(_JPEG):
        end = 2
        if picture[2:4] == b"\xff\xe0":  # JFIF's own segment has to come first
            end += 2 + int.from_bytes(picture[4:6], "big")
        return picture[:end] + _jpeg_comment() + picture[end:]
    raise ValueError("neither PNG nor JPEG")


def _jpeg_comment() -> bytes:
    return b"\xff\xfe" + struct.pack(">H", len(MARK) + 2) + MARK.encode()


def mp4_mark() -> bytes:
    """A box for the end of an MP4 or MOV whose writer knows no metadata; players pass over it."""
    return struct.pack(">I4s", 8 + len(VIDEO_MARK), b"free") + VIDEO_MARK.encode()


def matroska_mark() -> bytes:
    """The same for a Matroska file: an element Void."""
    return b"\xec" + bytes([0x80 | len(VIDEO_MARK)]) + VIDEO_MARK.encode()


@dataclass(frozen=True)
class Kind:
    """A kind of result.

    Attributes:
        what: in a few words.
        wrote: whether this program wrote the file at a path, as far as its content says; called for ordinary files, and
            for ``FRAMES`` for folders.
    """

    what: str
    wrote: Callable[[Path], bool]


def _head(path: Path) -> bytes:
    with path.open("rb") as stream:
        return stream.read(_HEAD)


def _tail(path: Path) -> bytes:
    with path.open("rb") as stream:
        stream.seek(max(0, path.stat().st_size - 256))
        return stream.read()


def _wrote_picture(path: Path) -> bool:
    head = _head(path)[:4096]
    if head.startswith(_PNG):
        return b"tEXtSoftware\0" + MARK.encode() in head
    return (head.startswith(_JPEG) and _jpeg_comment() in head) or _wrote_slide_mask(path)


def _wrote_video(path: Path) -> bool:
    return any(VIDEO_MARK.encode() in part for part in (_head(path), _tail(path)))


def _wrote_frames(folder: Path) -> bool:
    """Whether every mask of a video that may be replaced in its folder is ours."""
    names = [entry.name for entry in os.scandir(folder) if _FRAME.fullmatch(entry.name)]
    return all((folder / name).is_file() and _wrote_picture(folder / name) for name in names)


def _wrote_segmentation(path: Path) -> bool:
    head = _head(path)
    return head[128:132] == b"DICM" and MAKER.encode() in head


def _wrote_lines(path: Path) -> bool:
    with path.open("rb") as stream:
        line = stream.readline(_LONGEST_LINE)
    value = _parsed(line)
    return isinstance(value, dict) and {"source", "frame", "time", "modality", "area", "milliseconds"} <= value.keys()


def _wrote_areas(path: Path) -> bool:
    head = _head(path).splitlines()[:1]
    shorter = [AREA_COLUMNS[:-left_out] for left_out in (1, 2, 3)]  # of earlier versions
    return any(head == [",".join(columns).encode()] for columns in (AREA_COLUMNS, *shorter))


def _wrote_object_table(path: Path) -> bool:
    return _head(path).splitlines()[:1] == [",".join(OBJECT_COLUMNS).encode()]


def _wrote_scores(path: Path) -> bool:
    return _head(path).startswith(",".join(SCORE_COLUMNS).encode() + b",")


def _wrote_bench(path: Path) -> bool:
    value = _whole(path)
    if not isinstance(value, dict):
        return False
    kinds = {"bench": "contenders", "trial": "tried"}
    return {"schema", "bundle", kinds.get(str(value.get("kind")), "kind of no benchmark")} <= value.keys()


def _wrote_means(path: Path) -> bool:
    """{modality: {dataset: {"images": ..., "dice": ..., ...}}}, and no more."""
    value = _whole(path)
    if not isinstance(value, dict):
        return False
    if not all(isinstance(datasets, dict) and datasets for datasets in value.values()):
        return False
    entries = [entry for datasets in value.values() for entry in datasets.values()]
    return all(isinstance(entry, dict) and {"images", "dice", "hd95"} <= entry.keys() for entry in entries)


def _wrote_page(path: Path) -> bool:
    return _head(path).startswith(BENCH_TITLE.encode())


def _whole(path: Path) -> Any:
    return _parsed(path.read_bytes()) if path.stat().st_size <= _MOST_JSON else None


def _parsed(text: bytes) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _wrote_slide_mask(path: Path) -> bool:
    head = _head(path)[:4096]
    return head.startswith((b"II+\0", b"II*\0")) and MARK.encode() + b"\0" in head  # its Software


def _wrote_objects(path: Path) -> bool:
    return _head(path).startswith(f'{{"type":"FeatureCollection","generator":"{MARK}",'.encode())


PICTURE = Kind("picture", _wrote_picture)
VIDEO = Kind("video", _wrote_video)
FRAMES = Kind("folder of masks", _wrote_frames)
SEGMENTATION = Kind("DICOM-SEG", _wrote_segmentation)
REPORT = Kind("DICOM-SR", _wrote_segmentation)
LINES = Kind("file of measurements", _wrote_lines)
AREAS = Kind("table of areas", _wrote_areas)
OBJECT_TABLE = Kind("table of objects", _wrote_object_table)
SCORES = Kind("table of scores", _wrote_scores)
MEANS = Kind("file of mean scores", _wrote_means)
BENCH = Kind("file of a benchmark", _wrote_bench)
PAGE = Kind("page of a benchmark", _wrote_page)
SLIDE_MASK = Kind("mask of a slide", _wrote_slide_mask)
OBJECTS = Kind("file of outlines", _wrote_objects)
ANNOTATIONS = Kind("folder of annotations", lambda folder: True)  # what stands there is looked at before
CHECKPOINT = Kind("checkpoint to replace", lambda path: False)
