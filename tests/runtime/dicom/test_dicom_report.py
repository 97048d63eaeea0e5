"""DICOM-SR: read back by highdicom, dumped by dcmtk, checked by dciodvfy; it says what was measured, and of what."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from sink_material import result_of
from skimage.measure import regionprops

from espmedsam_edge.errors import UserError
from espmedsam_edge.objects.options import ObjectOptions
from espmedsam_edge.runtime.dicom import report as report_module
from espmedsam_edge.runtime.dicom.segmentation import Algorithm
from espmedsam_edge.runtime.run.finding import ObjectFinder
from espmedsam_edge.runtime.sinks import dicom_sr
from espmedsam_edge.runtime.sinks.dicom_seg import DicomSegmentations
from espmedsam_edge.runtime.sinks.dicom_sr import DicomReports
from espmedsam_edge.runtime.sources.source import SourceFrame

pydicom = pytest.importorskip("pydicom", reason="needs pydicom (extra dicom)")
highdicom = pytest.importorskip("highdicom", reason="needs highdicom (extra dicom)")
from seg_sources import PATIENT, save_dicom, save_enhanced  # noqa: E402 (needs pydicom)

ALGORITHM = Algorithm("1.2.3", {"precision": "fp16", "checkpoint": "abc"})
AREA, LONG, SHORT, AROUND = "Area", "Long axis", "Smallest distance of parallel tangents", "Perimeter"


def mask_with(*ellipses: tuple[int, int, int, int]) -> Any:
    """(x, y, half width, half height) each, in 96x128 pixels."""
    mask = np.zeros((96, 128), np.uint8)
    for x, y, across, down in ellipses:
        cv2.ellipse(mask, (x, y), (across, down), 15, 0, 360, 255, -1)
    return mask


def write(
    path: Path,
    masks: Sequence[Any],
    modality: str = "ultrasound",
    spacing: tuple[float, float] | None = None,
    *,
    seg: bool = False,
    options: ObjectOptions = ObjectOptions(instances=True),
    name: Path = Path("r.dcm"),
    algorithm: Algorithm = ALGORITHM,
) -> Any:
    """Write the report of a file with these masks beside it; highdicom's object of it."""
    place = path.with_name(name.name)
    segmentations = {path: path.with_name("s.dcm")} if seg else None
    find = ObjectFinder(options, needed=True)
    sinks: list[Any] = [DicomSegmentations(segmentations, algorithm)] if segmentations else []
    sinks.append(DicomReports({path: place}, algorithm, segmentations))
    for sink in sinks:
        sink.__enter__()
    for index, mask in enumerate(masks):
        time = index / 10 if len(masks) > 1 else None
        frame = SourceFrame(np.zeros((*mask.shape, 3), np.uint8), path, index, time, spacing=spacing)
        result = find.of_frame(frame, result_of(mask, modality))
        for sink in sinks:
            sink.write(frame, result)
    for sink in sinks:
        sink.__exit__(None, None, None)
    check(place)
    return highdicom.sr.srread(place)


def check(path: Path) -> None:
    """By the programs of Debian's packages dcmtk and dicom3tools, where they are (make test-packages)."""
    if shutil.which("dsrdump") is not None:
        done = subprocess.run(["dsrdump", str(path)], capture_output=True, text=True, errors="replace")
        assert done.returncode == 0
        assert "Imaging Measurement Report" in done.stdout
        assert [line for line in done.stderr.splitlines() if line.startswith("E:")] == []
    if shutil.which("dciodvfy") is not None:
        done = subprocess.run(["dciodvfy", str(path)], capture_output=True, text=True, errors="replace")
        assert "ComprehensiveSR" in done.stderr
        assert [line for line in done.stderr.splitlines() if line.startswith("Error")] == []


def groups(report: Any) -> tuple[list[Any], list[Any]]:
    """Groups of whole masks, and of objects."""
    found = report.content.get_planar_roi_measurement_groups() + report.content.get_image_measurement_groups()
    objects = [group for group in found if group.tracking_identifier.startswith("Object")]
    return [group for group in found if group not in objects], objects


def measured(group: Any) -> dict[str, tuple[float, str]]:
    return {one.name.meaning: (one.value, one.unit.value) for one in group.get_measurements()}


TWO = mask_with((40, 40, 24, 12), (95, 60, 15, 15))


@pytest.mark.parametrize("spacing", [None, (0.25, 0.25), (0.4, 0.2), (0.0005, 0.0005)])
def test_sizes_are_those_of_regionprops_in_the_unit_that_is_known(
    tmp_path: Path, spacing: tuple[float, float] | None
) -> None:
    source = save_dicom(tmp_path / "a.dcm", (96, 128))
    report = write(tmp_path / "a.dcm", [TWO], spacing=spacing)
    (whole,), objects = groups(report)
    labels = cv2.connectedComponents(TWO)[1]
    factor = 1000.0 if spacing is not None and min(spacing) < 0.01 else 1.0
    unit = "{pixels}" if spacing is None else "um" if factor > 1 else "mm"
    square = unit if spacing is None else f"{unit}2"
    references = regionprops(labels, spacing=spacing or (1, 1))
    assert len(objects) == len(references) == 2
    for number, (group, reference) in enumerate(zip(objects, references, strict=True), 1):
        found = measured(group)
        assert found[AREA] == (pytest.approx(reference.area * factor**2, rel=1e-6), square)
        largest = pytest.approx(reference.feret_diameter_max * factor, rel=0.05)
        assert found[LONG] == (largest, unit)
        assert found[SHORT][0] <= found[LONG][0]
        if spacing is None or spacing[0] == spacing[1]:
            assert found[AROUND] == (pytest.approx(reference.perimeter * factor, rel=1e-6), unit)
        else:
            assert AROUND not in found
        assert group.tracking_identifier == f"Object {number}"
        assert group.finding_type.meaning == "Lesion"
        assert [site.topographical_location if False else site.value.meaning for site in group.finding_sites] == [
            "Breast"
        ]
        outline = np.asarray(group.roi.value) - 0.5
        drawn = np.zeros_like(TWO)
        cv2.fillPoly(drawn, [outline.astype(np.int32)], 1)
        assert (drawn == (labels == number)).all()
        image = group.roi.ContentSequence[0].ReferencedSOPSequence[0]
        assert image.ReferencedSOPInstanceUID == source.SOPInstanceUID
        assert "ReferencedFrameNumber" not in image
    pixels = 1.0 if spacing is None else spacing[0] * spacing[1] * factor**2
    assert measured(whole) == {
        AREA: (pytest.approx((TWO > 0).sum() * pixels, rel=1e-6), square),
        "Quantity": (2, "{objects}"),
    }


def test_it_belongs_to_the_sources_study_and_says_who_made_it(tmp_path: Path) -> None:
    source = save_dicom(tmp_path / "a.dcm", (96, 128))
    report = write(tmp_path / "a.dcm", [TWO], algorithm=Algorithm("1.2.3", {"precision": "fp16"}, trained=False))
    assert report.StudyInstanceUID == source.StudyInstanceUID
    assert report.SeriesInstanceUID != source.SeriesInstanceUID
    assert report.Modality == "SR"
    for keyword, value in PATIENT.items():
        assert report[keyword].value == value
    assert (report.CompletionFlag, report.VerificationFlag) == ("COMPLETE", "UNVERIFIED")
    assert "not a medical device" in report.CompletionFlagDescription
    (evidence,) = report.CurrentRequestedProcedureEvidenceSequence
    (series,) = evidence.ReferencedSeriesSequence
    assert [item.ReferencedSOPInstanceUID for item in series.ReferencedSOPSequence] == [source.SOPInstanceUID]
    text = str(report)
    for said in ("UNTRAINED WEIGHTS", "precision=fp16", "1.2.3"):
        assert said in text


@pytest.mark.parametrize("kind", ["one", "cine", "enhanced"])
def test_it_refers_to_the_frames_of_the_segmentation(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a.dcm"
    order = [2, 0, 1] if kind == "enhanced" else [0, 1, 2]
    if kind == "one":
        save_dicom(path, (96, 128))
    elif kind == "cine":
        save_dicom(path, (96, 128), frames=3)
    else:
        save_enhanced(path, order, (96, 128))  # whose frames a segmentation sorts by their places
    masks = [mask_with((40, 40, 10 + 5 * number, 8)) for number in range(1 if kind == "one" else 3)]
    report = write(path, masks, seg=True)
    segmentation = pydicom.dcmread(tmp_path / "s.dcm")
    pixels = segmentation.pixel_array.reshape(-1, 96, 128)
    wholes, objects = groups(report)
    assert len(wholes) == len(objects) == len(masks)
    for index, (whole, mask) in enumerate(zip(wholes, masks, strict=True)):
        reference = whole.referenced_segmentation_frame[0].ReferencedSOPSequence[0]
        assert reference.ReferencedSOPInstanceUID == segmentation.SOPInstanceUID
        assert reference.ReferencedSOPClassUID == segmentation.SOPClassUID
        assert (pixels[reference.ReferencedFrameNumber - 1] == (mask > 0)).all()
        assert measured(whole)[AREA][0] == (mask > 0).sum()
        image = objects[index].roi.ContentSequence[0].ReferencedSOPSequence[0]
        assert image.get("ReferencedFrameNumber") == (None if kind == "one" else index + 1)


def test_an_object_that_is_followed_has_one_identifier(tmp_path: Path) -> None:
    path = tmp_path / "a.dcm"
    save_dicom(path, (96, 128), frames=4)
    masks = [mask_with((30 + 4 * step, 40, 12, 9), *([(90, 60, 9, 9)] if step != 2 else [])) for step in range(4)]
    report = write(path, masks, options=ObjectOptions(track=True))
    _, objects = groups(report)
    found = [(group.tracking_identifier, str(group.tracking_uid)) for group in objects]
    assert [name for name, _ in found] == ["Object 1", "Object 2"] * 2 + ["Object 1"] + ["Object 1", "Object 2"]
    assert len(set(found)) == len({uid for _, uid in found}) == 2


def test_an_empty_mask_is_a_report_of_nothing(tmp_path: Path) -> None:
    save_dicom(tmp_path / "a.dcm", (96, 128))
    for seg in (False, True):
        report = write(tmp_path / "a.dcm", [np.zeros((96, 128), np.uint8)], seg=seg)
        (whole,), objects = groups(report)
        assert objects == []
        assert {name: value for name, (value, _) in measured(whole).items()} == {AREA: 0, "Quantity": 0}


def test_the_same_once_more_is_the_same_instance(tmp_path: Path) -> None:
    save_dicom(tmp_path / "a.dcm", (96, 128))
    first = write(tmp_path / "a.dcm", [TWO])
    again = write(tmp_path / "a.dcm", [TWO])
    other = write(tmp_path / "a.dcm", [mask_with((40, 40, 24, 12))])
    spaced = write(tmp_path / "a.dcm", [TWO], spacing=(0.5, 0.5))
    assert first.SOPInstanceUID == again.SOPInstanceUID
    assert first.SeriesInstanceUID == again.SeriesInstanceUID
    assert len({str(one.SOPInstanceUID) for one in (first, other, spaced)}) == 3


def test_too_many_objects_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dicom_sr, "MOST_OBJECTS", 3)
    save_dicom(tmp_path / "a.dcm", (96, 128), frames=3)
    with pytest.raises(UserError, match="its 4 objects and more are over the limit of 3"):
        write(tmp_path / "a.dcm", [TWO] * 3)
    assert not (tmp_path / "r.dcm").exists()
    assert report_module.MOST_OBJECTS >= 1000


def test_what_is_not_whole_or_not_dicom_has_none(tmp_path: Path) -> None:
    save_dicom(tmp_path / "a.dcm", (96, 128), frames=3)
    with pytest.raises(UserError, match=r"no structured report of .*a\.dcm: not all of it was segmented"):
        write(tmp_path / "a.dcm", [TWO] * 2)
    (tmp_path / "b.png").write_bytes(b"no DICOM")
    with pytest.raises(UserError, match=r"b\.png is not DICOM; --dicom-sr is for DICOM inputs"):
        DicomReports({tmp_path / "b.png": tmp_path / "r.dcm"}, ALGORITHM)
    assert not (tmp_path / "r.dcm").exists()


def test_nothing_of_a_header_is_said(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Of one that is malformed, an attribute's name is all that is told."""
    for number, values in enumerate(({"PatientBirthDate": "tenth of May"}, {"StudyInstanceUID": None})):
        path = tmp_path / f"{number}.dcm"
        save_dicom(path, (96, 128), **values)
        with pytest.raises(UserError, match=next(iter(values))) as refused:
            write(path, [TWO])
        assert not any(secret in str(refused.value) for secret in (*PATIENT.values(), "May"))
    said = capfd.readouterr()
    for secret in (*PATIENT.values(), "tenth of May"):
        assert secret not in said.out + said.err


@pytest.mark.data
def test_reports_of_real_files_by_the_command(tmp_path: Path, data_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from toy_bundles import save_toy_bundle

    from espmedsam_edge import ModelOptions, Outputs, infer

    monkeypatch.chdir(tmp_path)
    bundle = save_toy_bundle(tmp_path / "toy.bundle", ("ultrasound",)).path
    model = ModelOptions(bundle, "ultrasound", objects=ObjectOptions(min_area=2000))
    report = infer(data_root / "dicom", model, Outputs(dicom_sr="sr", dicom_seg="seg", jsonl="r.jsonl"))
    assert not report.failures
    names = sorted(path.name.removesuffix("-sr.dcm") for path in (tmp_path / "sr").iterdir())
    assert names == sorted(path.stem for path in (data_root / "dicom").glob("*.dcm"))
    lines = [json.loads(line) for line in (tmp_path / "r.jsonl").read_text().splitlines()]
    for name in names:
        check(tmp_path / "sr" / f"{name}-sr.dcm")
        own = [line for line in lines if Path(line["source"]).stem == name]
        wholes, objects = groups(highdicom.sr.srread(tmp_path / "sr" / f"{name}-sr.dcm"))
        assert len(wholes) == len(own)
        assert len(objects) == sum(line["objects"] for line in own)
        for whole, line in zip(wholes, own, strict=True):
            area, unit = measured(whole)[AREA]
            assert area == pytest.approx(line["area"] if unit == "{pixels}" else line["area_mm2"], rel=1e-5)
