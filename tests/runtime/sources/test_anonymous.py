"""Numbers in place of names: which file has which, and that a text holds no name any more."""

from __future__ import annotations

from pathlib import Path

import pytest
from dicom_files import ramp, save_dicom
from hypothesis import given
from hypothesis import strategies as st

from espmedsam_edge.errors import UserError
from espmedsam_edge.runtime.sources.anonymous import SourceNames
from espmedsam_edge.runtime.sources.live import LiveOptions
from espmedsam_edge.runtime.sources.opening import open_sources


def test_files_are_numbered_by_name_and_keep_their_numbers_in_any_order(tmp_path: Path) -> None:
    (tmp_path / "study").mkdir()
    for name, number in (("DOE 2", 1), ("DOE 10", 3), ("DOE 1", 2)):
        save_dicom(tmp_path / "study" / name, ramp(), InstanceNumber=number, SeriesInstanceUID="1.2")
    alone = save_dicom(tmp_path / "DOE.dcm", ramp())
    names = SourceNames()
    sources, failures = open_sources(
        [str(tmp_path / "study"), "test://fundus?frames=1&live=no", str(alone)], LiveOptions(), names
    )
    assert failures == []
    assert [source.name for source in sources] == ["source-1", "source-2", "source-3"]
    frames = []
    for source in sources:
        with source:
            frames += [(frame.source, frame.path.name) for frame in source]
    assert frames == [
        ("source-1-0002", "DOE 2"),
        ("source-1-0001", "DOE 1"),
        ("source-1-0003", "DOE 10"),
        ("source-2", "source-2"),
        ("source-3", "DOE.dcm"),
    ]


def test_addresses_are_numbered_too() -> None:
    sources, _ = open_sources(["rtsp://h/doe", "rtsp://h/roe"], LiveOptions(), SourceNames())
    assert [(source.name, str(source.files[0])) for source in sources] == [("source-1",) * 2, ("source-2",) * 2]


@pytest.mark.parametrize("specification", ["DOE^JANE", "DOE^JANE/", "./DOE^JANE", "DOE^JANE/*.png"])
def test_what_leads_to_nothing_is_called_by_its_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, specification: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("DOE^JANE").mkdir()
    sources, (failure,) = open_sources([specification], None, SourceNames())
    assert sources == []
    assert failure.name == "source-1"
    assert "DOE" not in failure.message
    assert "source-1" in failure.message


def named(*files: str) -> SourceNames:
    names = SourceNames()
    names.add(1, [Path(file) for file in files])
    return names


def test_texts_hold_numbers_and_otherwise_what_they_held() -> None:
    names = named("in/DOE.dcm", "in/DOE.dcm.bak", "a", "in/DOE  JANE.png")
    assert names.hide("cannot read in/DOE.dcm: it is a picture. Copy it again.") == (
        "cannot read source-1-0001: it is source-1-0003 picture. Copy it again."
    )
    assert names.hide("'in/DOE.dcm.bak', in/DOE.dcm.") == "'source-1-0002', source-1-0001."
    assert names.hide("data of pain/DOE.dcm") == "data of pain/DOE.dcm"  # another file
    assert SourceNames().hide("as it is") == "as it is"
    with pytest.raises(UserError, match=r"^no source-1-0004\. Try source-1-0001$") as caught, names.in_errors():
        raise UserError("no in/DOE  JANE.png.", "Try in/DOE.dcm", exit_code=1)  # which leaves one space of two
    assert caught.value.exit_code == 1


@given(st.lists(st.text("ab ./^", min_size=1, max_size=8), min_size=1, max_size=4), st.text("ab :.", max_size=9))
def test_no_name_stays(parts: list[str], tail: str) -> None:
    files = [f"DOE{part}" for part in parts]
    text = str(UserError(f"cannot read {Path(files[0])}: {tail}"))
    assert "DOE" not in named(*files).hide(text)
