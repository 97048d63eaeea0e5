"""No value of a DICOM header is told: malformed attributes of all kinds, in errors, logs, warnings and files."""

from __future__ import annotations

import json
import logging
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("highdicom", reason="needs highdicom (extra dicom)")

from planted_dicom import COPIED, FORMS, MARKS, OTHERS, attributes, planted
from pydicom.datadict import tag_for_keyword
from seg_sources import save_dicom

from espmedsam_edge.bundle import Bundle
from espmedsam_edge.cli import main
from espmedsam_edge.errors import UserError
from espmedsam_edge.runtime.dicom.discretion import discreet
from espmedsam_edge.runtime.dicom.identifiers import DicomIdentifiers
from espmedsam_edge.runtime.dicom.packed_masks import PackedMasks
from espmedsam_edge.runtime.dicom.reading import _TAGS, read_dicom_frames, read_dicom_header
from espmedsam_edge.runtime.dicom.segmentation import _REPEATED, Algorithm
from espmedsam_edge.runtime.segmentation import Segmentation, Timings
from espmedsam_edge.runtime.sinks.dicom_seg import DicomSegmentations
from espmedsam_edge.runtime.sources.source import SourceFrame

IDENTIFIERS = ("StudyInstanceUID", "SeriesInstanceUID")


class _Records(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.NOTSET)
        self.text = ""

    def emit(self, record: logging.LogRecord) -> None:
        self.text += self.format(record) + "\n"


@contextmanager
def _everything_told(capfd: pytest.CaptureFixture[str]) -> Iterator[Callable[[], str]]:
    """What is printed, logged at any level and warned of."""
    records, root = _Records(), logging.getLogger()
    level = root.level
    root.addHandler(records)
    root.setLevel(logging.NOTSET)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")

            def told() -> str:
                out, err = capfd.readouterr()
                return f"{out}{err}{records.text}{[str(warning.message) for warning in caught]}"

            yield told
    finally:
        root.setLevel(level)
        root.removeHandler(records)


def _told_by(action: Callable[[], object]) -> str:
    """The error's whole traceback, causes and contexts that are shown among it; "" if there is none."""
    try:
        action()
    except UserError as error:
        return "".join(traceback.format_exception(error))
    return ""


def _segment(path: Path, out: Path) -> None:
    mask = np.zeros((48, 64), np.uint8)
    mask[8:20, 10:30] = 255
    logits = np.where(mask > 0, np.float32(1), np.float32(-1))
    result = Segmentation(mask, "ultrasound", logits, 0.5, Timings(0, 0, 0))
    with DicomSegmentations({path: out}, Algorithm("1", {})) as sink:
        sink.write(SourceFrame(np.zeros((48, 64, 3), np.uint8), path), result)


def _assert_nothing_told(told: str) -> None:
    assert [mark for mark in MARKS if mark in told] == [], told


def _errors(path: Path) -> list[str]:
    """What reading, asking for identifiers and segmenting a file end with; "" for each that is done."""
    return [
        _told_by(lambda: read_dicom_header(path)),
        _told_by(lambda: list(read_dicom_frames(path))),
        _told_by(lambda: DicomIdentifiers("hashed")(path)),
        _told_by(lambda: _segment(path, path.with_name("seg.dcm"))),
    ]


def test_what_a_segmentation_repeats_is_named_and_never_quoted(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    keywords = attributes(COPIED)
    assert {"PatientBirthDate", "PatientName", "StudyTime", "FrameOfReferenceUID"} <= {*keywords}
    named = []
    with _everything_told(capfd) as told:
        for number, keyword in enumerate(keywords):
            for form in ("own", FORMS[1 + number % 3]) if keyword in _REPEATED else (FORMS[number % 4],):
                errors = _errors(planted(tmp_path / "a.dcm", [keyword], form))
                _assert_nothing_told("".join(errors) + told())
                assert errors[:2] == ["", ""]  # reading does not look at them
                named += [keyword] if f"{keyword}: malformed" in errors[3] else []
    assert {"PatientBirthDate", "StudyDate", "StudyTime"} <= {*named}


@pytest.mark.parametrize("form", FORMS)
def test_what_stands_beside_harms_no_reading(tmp_path: Path, capfd: pytest.CaptureFixture[str], form: str) -> None:
    known = {*attributes(COPIED), *_TAGS, "SpecificCharacterSet", "SOPClassUID", "SOPInstanceUID", "Modality"}
    keywords = [word for word in attributes(OTHERS) if word not in known]
    assert len(keywords) > 100
    with _everything_told(capfd) as told:
        errors = _errors(planted(tmp_path / "a.dcm", keywords, form))
        assert "".join(errors[:3]) == ""
        assert not errors[3] or ": malformed" in errors[3]  # highdicom repeats one of them, and looks at another
        _assert_nothing_told("".join(errors) + told())


@pytest.mark.parametrize("keyword", ["SpecificCharacterSet", "SOPClassUID", "SOPInstanceUID", "Modality", *IDENTIFIERS])
def test_identifiers_and_character_sets_are_never_quoted(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], keyword: str
) -> None:
    with _everything_told(capfd) as told:
        for form in FORMS:
            _assert_nothing_told("".join(_errors(planted(tmp_path / "a.dcm", [keyword], form))) + told())


@pytest.mark.parametrize("form", FORMS)
def test_what_is_read_of_a_header_is_named_and_never_quoted(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], form: str
) -> None:
    named = []
    with _everything_told(capfd) as told:
        for keyword in (word for word in _TAGS if (tag_for_keyword(word) or 0) < 0x7FE00000):
            path = planted(tmp_path / "a.dcm", [keyword], form)
            errors = _told_by(lambda path=path: read_dicom_header(path))
            errors += _told_by(lambda path=path: list(read_dicom_frames(path)))
            errors += _told_by(lambda path=path: _segment(path, tmp_path / "seg.dcm"))
            _assert_nothing_told(errors + told())
            if f"{keyword}: malformed" in errors:
                named.append(keyword)
    if form == "own":
        assert {"PixelSpacing", "NumberOfFrames", "InstanceNumber", "WindowCenter"} <= {*named}


def test_a_run_tells_nothing_of_them_in_lines_tables_and_names(
    toy_bundle: Bundle, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    chosen = ("PatientBirthDate", "PatientName", "SpecificCharacterSet", "StudyInstanceUID", "PixelSpacing", "Rows")
    for keyword in chosen:
        (tmp_path / "in").mkdir(exist_ok=True)
        planted(tmp_path / "in" / f"{keyword}.dcm", [keyword], "own")
    out = tmp_path / "out"
    arguments = [str(toy_bundle.path), str(tmp_path / "in"), "--backend", "onnxruntime-cpu", "--uids", "hashed"]
    arguments += ["--out", str(out / "o"), "--masks", str(out / "m"), "--jsonl", str(out / "l.jsonl")]
    arguments += ["--csv", str(out / "t.csv")]
    with _everything_told(capfd) as told:
        with pytest.raises(SystemExit) as ended:
            main(["infer", *arguments])
        assert ended.value.code == 1
        text = told()
        assert "PixelSpacing: malformed" in text
        _assert_nothing_told(text)
        with pytest.raises(SystemExit):
            main(["infer", *arguments[:4], "--dicom-seg", str(tmp_path / "seg")])
        text = told()
        assert "PatientBirthDate: malformed" in text
        _assert_nothing_told(text)
    lines = (out / "l.jsonl").read_text().splitlines()
    assert len(lines) == 4
    uids = [json.loads(line)["study_uid"] for line in lines if "StudyInstanceUID.dcm" not in line]
    assert [uid.startswith("sha256:") for uid in uids] == [True] * 3
    assert sum("study_uid" in line for line in lines) == 3  # of what is typed in its place there is not even a hash
    for file in filter(Path.is_file, out.rglob("*")):
        content = file.read_bytes()
        assert [mark for mark in MARKS if mark.encode() in content or mark in file.name] == [], file


def test_an_unknown_transfer_syntax_is_not_quoted(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    data = save_dicom(tmp_path / "a.dcm")
    data.file_meta.TransferSyntaxUID = "1.2.3.JANE"
    data.save_as(tmp_path / "a.dcm", implicit_vr=False, little_endian=True)
    with _everything_told(capfd) as told:
        error = _told_by(lambda: list(read_dicom_frames(tmp_path / "a.dcm")))
        assert error
        _assert_nothing_told(error + told())


def test_any_error_of_a_library_becomes_one_that_quotes_nothing() -> None:
    for error in (ValueError("JANE"), LookupError("JANE"), Exception("JANE"), MemoryError(), KeyError("JANE")):

        def fail(error: Exception = error) -> None:
            with discreet(lambda fault: UserError(f"cannot: {fault}")):
                raise error

        told = _told_by(fail)
        assert "cannot" in told
        assert "JANE" not in told


def test_a_full_disk_is_still_told_as_such(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: PackedMasks) -> bytes:
        raise OSError(28, "No space left on device")

    save_dicom(tmp_path / "a.dcm")
    monkeypatch.setattr(PackedMasks, "stored", full)
    with pytest.raises(UserError, match="no space left"):
        _segment(tmp_path / "a.dcm", tmp_path / "seg.dcm")
