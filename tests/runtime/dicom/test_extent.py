"""DICOM headers of very many parts: refused within a second, by counting; whole files pass."""

from __future__ import annotations

import io
import struct
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("pydicom", reason="needs pydicom (extra dicom)")

import pydicom
from dicom_files import save_dicom
from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian

from espmedsam_edge.errors import UserError
from espmedsam_edge.runtime.dicom.extent import MOST_NESTED, MOST_PARTS, TooMuch, check_extent
from espmedsam_edge.runtime.dicom.reading import read_dicom_frames, read_dicom_header

GROUPS = 0x52009230  # Per-Frame Functional Groups Sequence
ORDERS = {ExplicitVRLittleEndian: "<", ImplicitVRLittleEndian: "<", ExplicitVRBigEndian: ">"}


def element(syntax: str, tag: int, vr: str, value: bytes, length: int | None = None) -> bytes:
    order, size = ORDERS[syntax], len(value) if length is None else length
    head = struct.pack(f"{order}HH", tag >> 16, tag & 0xFFFF)
    if not vr or syntax == ImplicitVRLittleEndian:
        return head + struct.pack(f"{order}I", size) + value
    if vr in ("SQ", "UN", "OB", "UC"):
        return head + vr.encode() + struct.pack(f"{order}HI", 0, size) + value
    return head + vr.encode() + struct.pack(f"{order}H", size) + value


def sequence(syntax: str, items: bytes, *, defined: bool) -> bytes:
    if defined:
        return element(syntax, GROUPS, "SQ", items)
    return element(syntax, GROUPS, "SQ", items + element(syntax, 0xFFFEE0DD, "", b""), 0xFFFFFFFF)


def nested(syntax: str, depth: int) -> bytes:
    content = b""
    for _ in range(depth):
        content = sequence(syntax, element(syntax, 0xFFFEE000, "", content), defined=False)
    return content


def with_header(path: Path, syntax: str, extra: bytes) -> Path:
    """An image of this syntax with these elements in front."""
    uid = syntax.encode() + b"\0" * (len(syntax) % 2)
    meta = element(ExplicitVRLittleEndian, 0x00020010, "UI", uid)
    numbers = {
        0x00280002: 1,
        0x00280010: 16,
        0x00280011: 16,
        0x00280100: 8,
        0x00280101: 8,
        0x00280102: 7,
        0x00280103: 0,
    }
    image = element(syntax, 0x00280004, "CS", b"MONOCHROME2 ")
    for tag, number in numbers.items():
        image += element(syntax, tag, "US", struct.pack(f"{ORDERS[syntax]}H", number))
    pixels = element(syntax, 0x7FE00010, "OB", bytes([90]) * 256)
    path.write_bytes(b"\0" * 128 + b"DICM" + meta + extra + image + pixels)
    return path


BOMBS: dict[str, Callable[[str], bytes]] = {
    "empty items": lambda s: sequence(s, element(s, 0xFFFEE000, "", b"") * 200_000, defined=False),
    "empty items of a known length": lambda s: sequence(s, element(s, 0xFFFEE000, "", b"") * 200_000, defined=True),
    "private elements": lambda s: element(s, 0x00290010, "LO", b"") * 600_000,
    "elements of an item": lambda s: sequence(
        s, element(s, 0xFFFEE000, "", element(s, 0x00290010, "LO", b"") * 600_000), defined=True
    ),
    "numbers": lambda s: element(s, 0x00181065, "UC", b"1\\" * 1_500_000),
    "sequences in each other": lambda s: nested(s, MOST_NESTED + 10),
}


@pytest.mark.parametrize("syntax", ORDERS)
@pytest.mark.parametrize("kind", BOMBS)
def test_headers_of_too_many_parts_are_one_line_at_once(tmp_path: Path, syntax: str, kind: str) -> None:
    path = with_header(tmp_path / "a.dcm", syntax, BOMBS[kind](syntax))
    begin = time.process_time()
    with pytest.raises(UserError, match="its header is larger than that of any image"):
        read_dicom_header(path)
    assert time.process_time() - begin < 5  # pydicom alone needs up to a minute; 0.7 s here


@pytest.mark.parametrize("syntax", ORDERS)
def test_half_as_much_is_read(tmp_path: Path, syntax: str) -> None:
    item = element(syntax, 0xFFFEE000, "", element(syntax, 0x00280030, "DS", b"1\\1 "))
    extra = sequence(syntax, item * (MOST_PARTS // 100), defined=False)
    extra += sequence(syntax, item * (MOST_PARTS // 100), defined=True) + nested(syntax, MOST_NESTED // 2)
    extra += element(syntax, 0x00290010, "LO", b"") * (MOST_PARTS // 4)
    path = with_header(tmp_path / "a.dcm", syntax, extra)
    with path.open("rb") as stream:
        check_extent(stream)
    assert [frame.shape for frame in read_dicom_frames(with_header(path, syntax, b""))] == [(16, 16, 3)]


def test_what_the_walk_counts_is_what_pydicom_makes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own example files: the limit is passed with what pydicom counts, and not with a little less."""
    seen = 0
    for file in sorted((Path(pydicom.__file__).parent / "data" / "test_files").glob("*.dcm")):
        content = file.read_bytes()
        try:
            data = pydicom.dcmread(io.BytesIO(content), stop_before_pixels=True)
            deflated = data.file_meta.TransferSyntaxUID.is_deflated
            elements, items = count(data)
        except Exception:  # noqa: BLE001 (the damaged ones among them)
            continue
        meta = len(data.file_meta)
        if deflated or elements < 30 or content[128:132] != b"DICM":
            continue
        monkeypatch.setattr("espmedsam_edge.runtime.dicom.extent.MOST_PARTS", (elements + meta + 5 * items) * 2)
        check_extent(io.BytesIO(content))
        monkeypatch.setattr("espmedsam_edge.runtime.dicom.extent.MOST_PARTS", (elements + meta) * 9 // 10)
        with pytest.raises(TooMuch):
            check_extent(io.BytesIO(content))
        seen += 1
    assert seen > 20


def count(dataset: pydicom.Dataset) -> tuple[int, int]:
    """Elements, also in items, and items."""
    elements, items = 0, 0
    for found in dataset:
        elements += 1
        if found.VR == "SQ":
            for item in found.value:
                inner = count(item)
                elements, items = elements + inner[0], items + 1 + inner[1]
    return elements, items


@pytest.mark.parametrize("spacing", [["1e308", "1e308"], ["1e-300", "1"], ["1e5", "1"], ["inf", "inf"], ["nan", "1"]])
def test_spacings_beyond_reason_are_none(tmp_path: Path, spacing: list[str]) -> None:
    path = save_dicom(tmp_path / "a.dcm", np.full((16, 16), 90, np.uint8), PixelSpacing=["0.5", "0.5"])
    assert read_dicom_header(path).spacing == (0.5, 0.5)
    values = "\\".join(spacing).encode()
    values += b" " * (len(values) % 2)
    old = element(ExplicitVRLittleEndian, 0x00280030, "DS", b"0.5\\0.5 ")
    content = path.read_bytes()
    assert old in content
    path.write_bytes(content.replace(old, element(ExplicitVRLittleEndian, 0x00280030, "DS", values)))
    assert read_dicom_header(path).spacing is None


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "values",
    [
        {"WindowCenter": "1e308", "WindowWidth": "1e308"},
        {"WindowCenter": "-1e308", "WindowWidth": "1e308", "VOILUTFunction": "SIGMOID"},
        {"WindowCenter": "1e308", "WindowWidth": "1e-300", "VOILUTFunction": "LINEAR_EXACT"},
        {"RescaleSlope": "1e308", "RescaleIntercept": "1e308"},
        {"RescaleSlope": "-1e308", "RescaleIntercept": "1e308", "WindowCenter": "1", "WindowWidth": "9"},
        {"RescaleSlope": "nan", "RescaleIntercept": "0"},
    ],
)
def test_numbers_beyond_reason_are_a_picture_or_one_line(tmp_path: Path, values: dict[str, str]) -> None:
    """Nothing is warned of on the way: warnings of NumPy are no lines for a user."""
    path = save_dicom(tmp_path / "a.dcm", np.arange(256, dtype=np.uint8).reshape(16, 16), **values)
    try:
        frames = list(read_dicom_frames(path))
    except UserError as error:
        assert "cannot read" in str(error)  # noqa: PT017
    else:
        assert [frame.shape for frame in frames] == [(16, 16, 3)]
