"""DICOM's identifiers in measurements: plain or hashed, and nothing else of the patient."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from sink_material import blob, result_of

from espmedsam_edge.errors import UserError
from espmedsam_edge.runtime.dicom import identifiers
from espmedsam_edge.runtime.dicom.identifiers import KEY_VARIABLE, DicomIdentifiers
from espmedsam_edge.runtime.sinks.measurements import AreaTable, JsonLines, LineForm
from espmedsam_edge.runtime.sources.source import SourceFrame

pytest.importorskip("pydicom", reason="needs pydicom (extra dicom)")
from seg_sources import PATIENT, save_dicom


def test_plain_identifiers(tmp_path: Path) -> None:
    source = save_dicom(tmp_path / "a.dcm")
    assert DicomIdentifiers("plain")(tmp_path / "a.dcm") == {
        "study_uid": source.StudyInstanceUID,
        "series_uid": source.SeriesInstanceUID,
        "instance_uid": source.SOPInstanceUID,
    }


@pytest.mark.parametrize("form", ["plain", "hashed"])
@pytest.mark.parametrize("keyword", ["StudyInstanceUID", "SeriesInstanceUID"])
def test_what_is_no_identifier_is_left_out(tmp_path: Path, form: str, keyword: str) -> None:
    """A name that was typed there would be told, or stand there as a hash that a list of names turns back."""
    path = tmp_path / "a.dcm"
    uid = str(getattr(save_dicom(path), keyword)).encode()
    path.write_bytes(path.read_bytes().replace(uid, b"DOE^JANE".ljust(len(uid))))
    found = DicomIdentifiers(form)(path)
    names = {"StudyInstanceUID": "study_uid", "SeriesInstanceUID": "series_uid"}
    assert set(found) == {"study_uid", "series_uid", "instance_uid"} - {names[keyword]}


def test_hashes_tell_studies_apart_and_hide_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = save_dicom(tmp_path / "a.dcm")
    save_dicom(tmp_path / "b.dcm", StudyInstanceUID=first.StudyInstanceUID)
    a, b = (DicomIdentifiers("hashed")(tmp_path / f"{name}.dcm") for name in "ab")
    assert a["study_uid"] == b["study_uid"]
    assert a["series_uid"] != b["series_uid"]
    assert str(first.StudyInstanceUID) not in str(a)
    monkeypatch.setenv(KEY_VARIABLE, "a secret")
    keyed = DicomIdentifiers("hashed")(tmp_path / "a.dcm")
    assert keyed["study_uid"] not in (a["study_uid"], str(first.StudyInstanceUID))
    assert keyed == DicomIdentifiers("hashed")(tmp_path / "a.dcm")


def test_other_files_have_none(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"picture")
    for path in (tmp_path / "a.png", tmp_path / "missing", Path("rtsp")):
        assert DicomIdentifiers("plain")(path) == {}


def test_wrong_forms_and_missing_packages_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="Did you mean 'hashed'"):
        DicomIdentifiers("hash")
    monkeypatch.setattr(identifiers, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pydicom.* is not installed\. Install it"):
        DicomIdentifiers("hashed")


@pytest.mark.parametrize("uids", [None, "hashed", "plain"])
def test_nothing_of_the_patient_is_in_measurements(tmp_path: Path, uids: str | None) -> None:
    source = save_dicom(tmp_path / "a.dcm")
    frame = SourceFrame(np.zeros((48, 64, 3), np.uint8), tmp_path / "a.dcm", spacing=(0.1, 0.1))
    found = None if uids is None else DicomIdentifiers(uids)
    with JsonLines(tmp_path / "a.jsonl", LineForm({}, "both", found)) as lines, AreaTable(tmp_path / "a.csv") as table:
        lines.write(frame, result_of(blob((48, 64))))
        table.write(frame, result_of(blob((48, 64))))
    text = (tmp_path / "a.jsonl").read_text() + (tmp_path / "a.csv").read_text()
    for value in (*PATIENT.values(), "Doe", "Jane", "Roe"):
        assert value not in text
    assert (str(source.StudyInstanceUID) in text) == (uids == "plain")
    assert ("study_uid" in json.loads((tmp_path / "a.jsonl").read_text())) == (uids is not None)
