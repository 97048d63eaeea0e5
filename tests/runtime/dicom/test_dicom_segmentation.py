"""DICOM-SEG: opens in pydicom and highdicom, equals the masks, and points to the frames they were made of."""

from __future__ import annotations

import os
import shutil
import subprocess
import tracemalloc
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sink_material import result_of

from espmedsam_edge import modalities
from espmedsam_edge.errors import UserError
from espmedsam_edge.runtime.dicom.codes import OWN_SCHEME, codes_of
from espmedsam_edge.runtime.dicom.segmentation import Algorithm
from espmedsam_edge.runtime.sinks import dicom_seg
from espmedsam_edge.runtime.sinks.dicom_seg import DicomSegmentations
from espmedsam_edge.runtime.sources.source import SourceFrame

pydicom = pytest.importorskip("pydicom", reason="needs pydicom (extra dicom)")
highdicom = pytest.importorskip("highdicom", reason="needs highdicom (extra dicom)")
from seg_sources import CT, PATIENT, SECONDARY_CINE, save_dicom, save_enhanced  # noqa: E402 (needs pydicom)

ALGORITHM = Algorithm("1.2.3", {"precision": "fp16", "checkpoint": "abc"})


def random_masks(count: int, size: tuple[int, int] = (48, 64), seed: int = 0) -> np.ndarray:
    masks = np.random.default_rng(seed).random((count, *size)) < 0.4
    if count > 2:
        masks[2] = False
    return masks


def write(
    paths: dict[Path, Path],
    masks: dict[Path, np.ndarray],
    modality: str = "ultrasound",
) -> None:
    with DicomSegmentations(paths, ALGORITHM) as sink:
        for path, stack in masks.items():
            for index, mask in enumerate(stack):
                image = np.zeros((*mask.shape, 3), np.uint8)
                sink.write(SourceFrame(image, path, index), result_of(mask, modality))


def check(path: Path, source: Any, masks: np.ndarray) -> Any:
    """The file's pixels are the masks, by pydicom and by highdicom through the references to the source's frames."""
    dataset = pydicom.dcmread(path)
    np.testing.assert_array_equal(dataset.pixel_array.reshape(masks.shape), masks)
    segmentation = highdicom.seg.segread(path)
    if len(masks) > 1:
        found = segmentation.get_pixels_by_source_frame(
            source.SOPInstanceUID, list(range(1, len(masks) + 1)), ignore_spatial_locations=True
        )
    else:
        found = segmentation.get_pixels_by_source_instance([source.SOPInstanceUID], ignore_spatial_locations=True)
    np.testing.assert_array_equal(found[..., 0], masks)
    assert verified(path) == []
    return dataset


def verified(path: Path) -> list[str]:
    """The errors that David Clunie's dciodvfy finds; none where it is not installed (make test-packages)."""
    if shutil.which("dciodvfy") is None:
        return []
    done = subprocess.run(["dciodvfy", str(path)], capture_output=True, text=True, errors="replace")
    return [line for line in done.stderr.splitlines() if line.startswith("Error")]


def test_a_single_image(tmp_path: Path) -> None:
    source = save_dicom(tmp_path / "a.dcm")
    masks = random_masks(1)
    write({tmp_path / "a.dcm": tmp_path / "new" / "s.dcm"}, {tmp_path / "a.dcm": masks})
    found = check(tmp_path / "new" / "s.dcm", source, masks)
    assert os.listdir(tmp_path / "new") == ["s.dcm"]
    assert found.StudyInstanceUID == source.StudyInstanceUID
    assert found.SeriesInstanceUID != source.SeriesInstanceUID
    for keyword, value in PATIENT.items():
        assert found[keyword].value == value  # it belongs to the same study of the same patient
    (segment,) = found.SegmentSequence
    assert segment.SegmentLabel == "Lesion"
    assert segment.SegmentAlgorithmType == "AUTOMATIC"
    assert segment.SegmentedPropertyTypeCodeSequence[0].CodeValue == "52988006"
    assert segment.AnatomicRegionSequence[0].CodeMeaning == "Breast"
    identification = segment.SegmentationAlgorithmIdentificationSequence[0]
    assert identification.AlgorithmName == "ESP-MedSAM Edge"
    assert identification.AlgorithmVersion == "1.2.3"
    assert "fp16" in str(identification.AlgorithmParameters)
    assert "not a medical device" in found.ContentDescription


@pytest.mark.parametrize("frames", [2, 7])
@pytest.mark.parametrize("size", [(48, 64), (37, 51)])  # the second: frames do not end at whole bytes
@pytest.mark.parametrize("sop_class", [None, SECONDARY_CINE])
def test_a_cine(tmp_path: Path, frames: int, size: tuple[int, int], sop_class: str | None) -> None:
    source = save_dicom(tmp_path / "a.dcm", size, frames, sop_class)
    masks = random_masks(frames, size)
    write({tmp_path / "a.dcm": tmp_path / "s.dcm"}, {tmp_path / "a.dcm": masks})
    found = check(tmp_path / "s.dcm", source, masks)
    groups = found.PerFrameFunctionalGroupsSequence
    assert [g.DerivationImageSequence[0].SourceImageSequence[0].ReferencedFrameNumber for g in groups] == list(
        range(1, frames + 1)
    )
    indices = [tuple(group.FrameContentSequence[0].DimensionIndexValues) for group in groups]
    assert len(set(indices)) == frames
    assert all(len(index) == len(found.DimensionIndexSequence) for index in indices)


def test_a_cine_of_one_frame_and_one_with_a_frame_of_reference(tmp_path: Path) -> None:
    one = save_dicom(tmp_path / "one.dcm", frames=1)
    moved = save_dicom(tmp_path / "moved.dcm", frames=3, FrameOfReferenceUID="1.2.3")
    for name, source, count in (("one", one, 1), ("moved", moved, 3)):
        masks = random_masks(count)
        write({tmp_path / f"{name}.dcm": tmp_path / "s.dcm"}, {tmp_path / f"{name}.dcm": masks})
        check(tmp_path / "s.dcm", source, masks)


def test_a_slice_keeps_its_place_in_space(tmp_path: Path) -> None:
    place = {
        "FrameOfReferenceUID": "1.2.3",
        "ImagePositionPatient": [1, 2, 3],
        "ImageOrientationPatient": [1, 0, 0, 0, 1, 0],
        "PixelSpacing": [0.5, 0.25],
        "SliceThickness": 2,
    }
    source = save_dicom(tmp_path / "a.dcm", sop_class=CT, **place)
    masks = random_masks(1)
    write({tmp_path / "a.dcm": tmp_path / "s.dcm"}, {tmp_path / "a.dcm": masks})
    found = check(tmp_path / "s.dcm", source, masks)
    assert found.FrameOfReferenceUID == "1.2.3"
    shared = found.SharedFunctionalGroupsSequence[0]
    assert list(shared.PixelMeasuresSequence[0].PixelSpacing) == [0.5, 0.25]


@pytest.mark.parametrize("thickness", [{}, {"SliceThickness": 2}])
def test_a_spacing_is_repeated_only_with_a_thickness(tmp_path: Path, thickness: dict[str, object]) -> None:
    """highdicom writes one without, but does not open it."""
    source = save_dicom(tmp_path / "a.dcm", PixelSpacing=[0.5, 0.25], **thickness)
    masks = random_masks(1)
    write({tmp_path / "a.dcm": tmp_path / "s.dcm"}, {tmp_path / "a.dcm": masks})
    found = check(tmp_path / "s.dcm", source, masks)
    assert ("PixelMeasuresSequence" in found.SharedFunctionalGroupsSequence[0]) == bool(thickness)


@pytest.mark.parametrize("places", [[0, 2, 4, 6, 8], [6, 0, 8, 2, 4]])
@pytest.mark.parametrize("size", [(48, 64), (37, 51)])
def test_an_enhanced_image_whatever_the_order_of_its_frames(
    tmp_path: Path, places: list[int], size: tuple[int, int]
) -> None:
    source = save_enhanced(tmp_path / "a.dcm", places, size)
    masks = random_masks(5, size)
    write({tmp_path / "a.dcm": tmp_path / "s.dcm"}, {tmp_path / "a.dcm": masks})
    segmentation = highdicom.seg.segread(tmp_path / "s.dcm")
    found = segmentation.get_pixels_by_source_frame(source.SOPInstanceUID, [1, 2, 3, 4, 5])
    np.testing.assert_array_equal(found[..., 0], masks)
    frames = segmentation.PerFrameFunctionalGroupsSequence
    assert sorted(float(frame.PlanePositionSequence[0].ImagePositionPatient[2]) for frame in frames) == sorted(places)
    assert sorted(os.listdir(tmp_path)) == ["a.dcm", "s.dcm"]


@pytest.mark.parametrize("enhanced", [False, True])
def test_memory_does_not_grow_with_the_masks(tmp_path: Path, enhanced: bool) -> None:
    size, frames = (1024, 1024), 40  # 42 MB of masks, 5 MB packed
    path = tmp_path / "a.dcm"
    if enhanced:
        save_enhanced(path, range(frames), (8, 8))
    else:
        save_dicom(path, (8, 8), frames)
    dataset = pydicom.dcmread(path)
    dataset.Rows, dataset.Columns = size  # the pixels are not read
    dataset.save_as(path)
    result = result_of(random_masks(1, size)[0])
    save_dicom(tmp_path / "small.dcm")
    write({tmp_path / "small.dcm": tmp_path / "s.dcm"}, {tmp_path / "small.dcm": random_masks(1)})  # imports
    with DicomSegmentations({path: tmp_path / "s.dcm"}, ALGORITHM) as sink:
        tracemalloc.start()
        for index in range(frames):
            sink.write(SourceFrame(np.zeros((8, 8, 3), np.uint8), path, index), result)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert (tmp_path / "s.dcm").stat().st_size > 5_000_000
    assert peak < 30_000_000


def test_too_many_frames_are_refused_at_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_dicom(tmp_path / "a.dcm", frames=5)
    monkeypatch.setattr(dicom_seg, "_MOST_FRAMES", 4)
    sink = DicomSegmentations({tmp_path / "a.dcm": tmp_path / "s.dcm"}, ALGORITHM)
    with pytest.raises(UserError, match=r"its 5 frames are over the limit of 4\. Export it in parts"):
        sink.write(SourceFrame(np.zeros((48, 64, 3), np.uint8), tmp_path / "a.dcm"), result_of(random_masks(1)[0]))


def test_several_files_have_one_each(tmp_path: Path) -> None:
    files = [tmp_path / f"{name}.dcm" for name in "abc"]
    sources = [save_dicom(files[0]), save_dicom(files[1], frames=3), save_dicom(files[2], (20, 30))]
    masks = {files[0]: random_masks(1), files[1]: random_masks(3, seed=1), files[2]: random_masks(1, (20, 30), 2)}
    write({file: tmp_path / "o" / file.name for file in files}, masks)
    for file, source in zip(files, sources, strict=True):
        check(tmp_path / "o" / file.name, source, masks[file])


def test_a_source_that_was_not_wholly_segmented_has_none(tmp_path: Path) -> None:
    files = [tmp_path / f"{name}.dcm" for name in "abcd"]
    for file in files:
        save_dicom(file, frames=4)
    masks = {files[0]: random_masks(3), files[1]: random_masks(4), files[2]: random_masks(4, (40, 64)), files[3]: []}
    with pytest.raises(UserError, match=r"no DICOM-SEG of .*a\.dcm and 1 more: not all of it"):
        write({file: tmp_path / "o" / file.name for file in files}, masks)  # type: ignore[arg-type]
    assert os.listdir(tmp_path / "o") == ["b.dcm"]


def test_a_changed_modality_has_none(tmp_path: Path) -> None:
    save_dicom(tmp_path / "a.dcm", frames=2)
    image = np.zeros((48, 64, 3), np.uint8)
    sink = DicomSegmentations({tmp_path / "a.dcm": tmp_path / "s.dcm"}, ALGORITHM)
    for index, modality in enumerate(("ultrasound", "fundus")):
        sink.write(SourceFrame(image, tmp_path / "a.dcm", index), result_of(random_masks(1)[0], modality))
    with pytest.raises(UserError, match="with one modality"):
        sink.__exit__(None, None, None)


def test_an_interrupted_run_leaves_none(tmp_path: Path) -> None:
    save_dicom(tmp_path / "a.dcm", frames=2)

    def interrupted() -> None:
        with DicomSegmentations({tmp_path / "a.dcm": tmp_path / "s.dcm"}, ALGORITHM) as sink:
            image = np.zeros((48, 64, 3), np.uint8)
            sink.write(SourceFrame(image, tmp_path / "a.dcm"), result_of(random_masks(1)[0]))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert os.listdir(tmp_path) == ["a.dcm"]


def test_what_highdicom_lacks_is_empty_and_what_must_be_there_is_asked_for(tmp_path: Path) -> None:
    without = dict.fromkeys(("PatientName", "PatientBirthDate", "StudyDate", "AccessionNumber", "StudyID"))
    source = save_dicom(tmp_path / "a.dcm", **without)
    write({tmp_path / "a.dcm": tmp_path / "s.dcm"}, {tmp_path / "a.dcm": random_masks(1)})
    assert str(check(tmp_path / "s.dcm", source, random_masks(1)).PatientName) == ""
    save_dicom(tmp_path / "b.dcm", StudyInstanceUID=None)
    with pytest.raises(UserError, match=r"no DICOM-SEG can be made of .*b\.dcm: .*StudyInstanceUID"):
        write({tmp_path / "b.dcm": tmp_path / "t.dcm"}, {tmp_path / "b.dcm": random_masks(1)})


NAMES = {
    "latin": ("ISO_IR 100", "Müller^Jörg"),
    "japanese": (["", "ISO 2022 IR 87"], "Yamada^Tarou=山田^太郎=やまだ^たろう"),
    "cyrillic": ("ISO_IR 144", "Люкceмбypг"),
    "greek": ("ISO_IR 126", "Διονυσιος"),
    "utf8": ("ISO_IR 192", "Wang^X=王^小东"),
    "chinese": ("GB18030", "Wang^XiaoDong=王^小东"),
    "korean": (["", "ISO 2022 IR 149"], "Hong^Gildong=洪^吉洞=홍^길동"),
    "none": (None, "Doe^Jane"),
}


@pytest.mark.parametrize("language", NAMES)
def test_patients_of_all_languages_keep_their_names(tmp_path: Path, language: str) -> None:
    charset, name = NAMES[language]
    values = {} if charset is None else {"SpecificCharacterSet": charset}
    source = save_dicom(tmp_path / "a.dcm", PatientName=name, **values)
    write({tmp_path / "a.dcm": tmp_path / "s.dcm"}, {tmp_path / "a.dcm": random_masks(1)})
    assert check(tmp_path / "s.dcm", source, random_masks(1)).PatientName == name


def test_private_elements_and_what_stands_before_a_header_stay_in_the_source(tmp_path: Path) -> None:
    """Those within sequences, too, which are repeated: what others put there may name anybody."""
    from pydicom.sequence import Sequence

    def private(dataset: Any, value: str) -> Any:
        dataset.private_block(0x11, "PLANTED CREATOR", create=True).add_new(1, "LO", value)
        return dataset

    item = pydicom.Dataset()
    item.PatientID, item.IssuerOfPatientID = "repeated", "ward"
    source = private(save_dicom(tmp_path / "a.dcm"), "PLANTED 1")
    source.OtherPatientIDsSequence = Sequence([private(item, "PLANTED 2")])
    source.preamble = b"PLANTED".ljust(128, b"\0")
    source.save_as(tmp_path / "a.dcm")
    write({tmp_path / "a.dcm": tmp_path / "seg.dcm"}, {tmp_path / "a.dcm": random_masks(1)})
    content = (tmp_path / "seg.dcm").read_bytes()
    assert b"repeated" in content
    assert b"PLANTED" not in content


def test_what_is_not_dicom_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"picture")
    with pytest.raises(UserError, match=r"a\.png is not DICOM"):
        DicomSegmentations({tmp_path / "a.png": tmp_path / "s.dcm"}, ALGORITHM)


def test_without_highdicom_there_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dicom_seg, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"highdicom.* is not installed\. Install it"):
        DicomSegmentations({}, ALGORITHM)


def test_no_patient_name_is_printed(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """highdicom warns of names that are not FAMILY^GIVEN, and prints them."""
    save_dicom(tmp_path / "a.dcm", PatientName="JANE DOE")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        write({tmp_path / "a.dcm": tmp_path / "s.dcm"}, {tmp_path / "a.dcm": random_masks(1)})
    written = capfd.readouterr()
    assert "JANE" not in written.out + written.err + "".join(str(warning.message) for warning in caught)


def test_random_weights_are_named(tmp_path: Path) -> None:
    save_dicom(tmp_path / "a.dcm")
    with DicomSegmentations({tmp_path / "a.dcm": tmp_path / "s.dcm"}, Algorithm("1", {}, trained=False)) as sink:
        sink.write(SourceFrame(np.zeros((48, 64, 3), np.uint8), tmp_path / "a.dcm"), result_of(random_masks(1)[0]))
    made = pydicom.dcmread(tmp_path / "s.dcm")
    assert "UNTRAINED" in made.SeriesDescription
    assert "UNTRAINED" in made.SegmentSequence[0].SegmentAlgorithmName


@pytest.mark.parametrize("modality", modalities.PAPER_MODALITIES)
def test_codes_of_the_known_modalities_are_those_of_the_dictionary(modality: str) -> None:
    from pydicom.sr.codedict import codes

    known = codes_of(modality)
    assert known.kind[1] == "SCT"
    for value, scheme, meaning in filter(None, (known.category, known.kind, known.region)):
        keyword = "".join(word.title() for word in meaning.split())
        if keyword != "Polyp":  # the one that pydicom's dictionary does not hold
            found = getattr(codes.SCT, {"SkinLesion": "SkinLesion"}.get(keyword, keyword))
            assert (found.value, found.scheme_designator) == (value, scheme)


def test_targets_of_the_users_own_have_private_codes(tmp_path: Path) -> None:
    modalities.register("histology", "tumour glands (all)")
    modalities.register("fundus", "optic disc")
    assert codes_of("histology").kind == ("TUMOUR_GLANDS_AL", OWN_SCHEME, "tumour glands (all)")
    assert codes_of("fundus").kind == ("OPTIC_DISC", OWN_SCHEME, "optic disc")
    source = save_dicom(tmp_path / "a.dcm")
    write({tmp_path / "a.dcm": tmp_path / "s.dcm"}, {tmp_path / "a.dcm": random_masks(1)}, "histology")
    assert check(tmp_path / "s.dcm", source, random_masks(1)).SegmentSequence[0].SegmentLabel == "tumour glands (all)"


@pytest.mark.data
def test_development_files(tmp_path: Path, data_root: Path) -> None:
    files = sorted((data_root / "dicom").glob("*.dcm"))
    for file in files:
        source = pydicom.dcmread(file, stop_before_pixels=True)
        masks = random_masks(int(source.get("NumberOfFrames") or 1), (source.Rows, source.Columns))
        write({file: tmp_path / file.name}, {file: masks})
        check(tmp_path / file.name, source, masks)
