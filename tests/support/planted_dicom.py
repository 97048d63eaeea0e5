"""DICOM files in which one attribute holds what it must not: a patient's data, as typed into the wrong field."""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from pydicom import dcmread
from pydicom.datadict import dictionary_VR, tag_for_keyword
from seg_sources import save_dicom

MARKS = ("JANE", "SECRET")
"""What must be told nowhere."""

_TEXT = b"DOE^JANE^SECRET=JANE 01.01.70\\SECRET\xff\xfe\x1b[2J="
COPIED = ("patient", "general-study", "frame-of-reference")
"""Modules that a segmentation repeats of its source."""

OTHERS = (
    "clinical-trial-subject", "patient-study", "clinical-trial-study", "general-series", "clinical-trial-series",
    "general-equipment", "enhanced-general-equipment", "sop-common", "general-image",
)  # fmt: skip
_LONG = ("OB", "OD", "OF", "OL", "OV", "OW", "SQ", "SV", "UC", "UN", "UR", "UT", "UV")
FORMS = ("own", "LO", "UN", "item")
"""How it stands there: under the attribute's own value representation, under another, or in a sequence's item."""


def attributes(modules: Sequence[str]) -> list[str]:
    """The keywords of the attributes of these modules of the standard."""
    table = json.loads(files("highdicom").joinpath("_standard/module_attribute_map.json").read_text())
    words = {entry["keyword"] for module in modules for entry in table[module] if not entry["path"]}
    return sorted(word for word in words if tag_for_keyword(word))


def planted(path: Path, keywords: Sequence[str], form: str) -> Path:
    """Write a whole image in which these attributes are malformed in one of ``FORMS``."""
    save_dicom(path)
    return plant(path, keywords, form)


def plant(path: Path, keywords: Sequence[str], form: str) -> Path:
    """The same in a file that is there."""
    data = dcmread(path)
    for keyword in keywords:
        if keyword in data:
            delattr(data, keyword)
    data.save_as(path, enforce_file_format=True)
    content = path.read_bytes()
    start = 144 + int.from_bytes(content[140:144], "little")
    path.write_bytes(content[:start] + b"".join(_malformed(keyword, form) for keyword in keywords) + content[start:])
    return path


def _malformed(keyword: str, form: str) -> bytes:
    tag, value = tag_for_keyword(keyword), _TEXT + b" " * (len(_TEXT) % 2)
    assert tag is not None
    vr = dictionary_VR(tag).partition(" ")[0] if form in ("own", "item") else form
    if form == "item":
        vr, value = "SQ", _element(0xFFFEE000, "", _element(0x00100010, "PN", value) + _element(tag, "DA", value))
    return _element(tag, vr, value)


def _element(tag: int, vr: str, value: bytes) -> bytes:
    group, element = tag >> 16, tag & 0xFFFF
    if not vr:
        return struct.pack("<HHI", group, element, len(value)) + value
    if vr in _LONG:
        return struct.pack("<HH2sHI", group, element, vr.encode(), 0, len(value)) + value
    return struct.pack("<HH2sH", group, element, vr.encode(), len(value)) + value
