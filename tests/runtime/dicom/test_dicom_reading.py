"""DICOM to frames, against pydicom, OpenCV and the standard's formulas; damaged files; nothing of the patient."""

from __future__ import annotations

import contextlib
import logging
import struct
import warnings
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from dicom_files import BIRTH_DATE, PATIENT, PATIENT_ID, jpeg2000, ramp, save_compressed, save_dicom
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from espmedsam_edge.errors import UserError
from espmedsam_edge.runtime.dicom import decoding, reading
from espmedsam_edge.runtime.dicom.display import through_window
from espmedsam_edge.runtime.dicom.reading import is_dicom, read_dicom_frames, read_dicom_header
from espmedsam_edge.runtime.sources.files import DicomCine, ImageFiles
from espmedsam_edge.runtime.sources.opening import open_sources

pydicom = pytest.importorskip("pydicom", reason="needs pydicom (extra dicom)")


def only(path: Path) -> np.ndarray:
    (frame,) = read_dicom_frames(path)
    assert frame.dtype == np.uint8
    assert frame.flags.c_contiguous
    return frame


def grey(path: Path) -> np.ndarray:
    frame = only(path)
    assert (frame == frame[..., :1]).all()
    return frame[..., 0]


def test_8_bit_grey_stays_as_it_is(tmp_path: Path) -> None:
    np.testing.assert_array_equal(grey(save_dicom(tmp_path / "a.dcm", ramp())), ramp())


def test_rgb_becomes_bgr(tmp_path: Path) -> None:
    rgb = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
    np.testing.assert_array_equal(only(save_dicom(tmp_path / "a.dcm", rgb, "RGB")), rgb[..., ::-1])


def test_ybr_is_converted_as_opencv_does(tmp_path: Path) -> None:
    coarse = np.random.default_rng(0).integers(0, 256, (5, 6, 3), np.uint8)
    bgr = np.asarray(cv2.resize(coarse, (60, 40), interpolation=cv2.INTER_CUBIC), np.uint8)
    ycrcb = np.asarray(cv2.cvtColor(bgr, cv2.COLOR_BGR2YCrCb))
    found = only(save_dicom(tmp_path / "a.dcm", np.ascontiguousarray(ycrcb[..., [0, 2, 1]]), "YBR_FULL"))
    assert np.abs(found.astype(int) - bgr).max() <= 3  # two roundings to 8 bits


def test_monochrome1_is_inverted(tmp_path: Path) -> None:
    np.testing.assert_array_equal(grey(save_dicom(tmp_path / "a.dcm", ramp(), "MONOCHROME1")), 255 - ramp())


@pytest.mark.parametrize(("bits", "high"), [(10, 1000), (12, 4000), (16, 60_000)])
def test_more_bits_without_a_window_use_their_own_range(tmp_path: Path, bits: int, high: int) -> None:
    values = ramp(high=high, dtype=np.uint16)
    expected = np.rint(values / ((1 << bits) - 1) * 255)
    np.testing.assert_array_equal(grey(save_dicom(tmp_path / "a.dcm", values)), expected)


def test_a_window_after_rescale_is_what_pydicom_gives(tmp_path: Path) -> None:
    from pydicom.pixels import apply_modality_lut, apply_voi_lut

    stored = ramp(low=0, high=4095, dtype=np.uint16)
    elements = {"RescaleSlope": 2, "RescaleIntercept": -1000, "WindowCenter": [300, 40], "WindowWidth": [1500, 80]}
    path = save_dicom(tmp_path / "a.dcm", stored, BitsStored=12, HighBit=11, **elements)
    dataset = pydicom.dcmread(path)
    shown = apply_voi_lut(apply_modality_lut(dataset.pixel_array, dataset), dataset)  # in the rescaled range
    expected = (shown - shown.min()) / (shown.max() - shown.min()) * 255
    assert np.abs(grey(path) - expected).max() <= 0.51


@given(
    center=st.floats(-2000, 2000),
    width=st.floats(1.01, 5000),
    value=st.floats(-5000, 5000),
)
def test_the_linear_window_is_the_standards(center: float, width: float, value: float) -> None:
    """PS3.3 C.11.2.1.2.1, written out as there with y from 0 to 255."""
    if value <= center - 0.5 - (width - 1) / 2:
        expected = 0.0
    elif value > center - 0.5 + (width - 1) / 2:
        expected = 255.0
    else:
        expected = ((value - (center - 0.5)) / (width - 1) + 0.5) * 255
    assert abs(int(through_window(np.array([value]), center, width)[0]) - expected) <= 0.51


def test_the_other_window_functions() -> None:
    values = np.array([-100.0, 0.0, 50.0, 100.0, 200.0])
    assert through_window(values, 50, 100, "LINEAR_EXACT").tolist() == [0, 0, 128, 255, 255]
    sigmoid = 255 / (1 + np.exp(-4 * (values - 50) / 100))
    np.testing.assert_allclose(through_window(values, 50, 100, "SIGMOID"), sigmoid, atol=0.51)
    assert through_window(values, 50, 1).tolist() == [0, 0, 255, 255, 255]


def test_a_voi_table_goes_before_a_window(tmp_path: Path) -> None:
    from pydicom.dataset import Dataset

    table: Any = Dataset()
    table.LUTDescriptor = [256, 0, 16]
    table.add_new(0x00283006, "US", [65535 - 257 * index for index in range(256)])
    path = save_dicom(tmp_path / "a.dcm", ramp(), VOILUTSequence=[table], WindowCenter=10, WindowWidth=10)
    np.testing.assert_array_equal(grey(path), 255 - ramp())


def test_a_palette_is_applied(tmp_path: Path) -> None:
    entries = np.random.default_rng(0).integers(0, 256, (3, 256))
    path = save_dicom(tmp_path / "a.dcm", ramp(), "PALETTE COLOR")
    dataset = pydicom.dcmread(path)
    for name, channel in zip(("Red", "Green", "Blue"), entries, strict=True):
        setattr(dataset, f"{name}PaletteColorLookupTableDescriptor", [256, 0, 8])
        dataset[f"{name}PaletteColorLookupTableDescriptor"].VR = "US"
        setattr(dataset, f"{name}PaletteColorLookupTableData", channel.astype(np.uint8).tobytes())
    dataset.save_as(path)
    np.testing.assert_array_equal(only(path), entries[::-1, ramp()].transpose(1, 2, 0))


def item(**elements: Any) -> Any:
    made = pydicom.Dataset()
    for name, value in elements.items():
        setattr(made, name, value)
    return made


def group(window: tuple[float, float] | None = None, rescale: tuple[float, float] | None = None) -> Any:
    """A functional group of an enhanced multi-frame image."""
    macros = {}
    if window:
        macros["FrameVOILUTSequence"] = [item(WindowCenter=window[0], WindowWidth=window[1])]
    if rescale:
        values = item(RescaleSlope=rescale[0], RescaleIntercept=rescale[1], RescaleType="US")
        macros["PixelValueTransformationSequence"] = [values]
    return item(**macros)


@pytest.mark.parametrize("padding", [0, 100_000])  # more than is read of a header at once
def test_windows_and_rescale_of_functional_groups(tmp_path: Path, padding: int) -> None:
    """Per frame before shared before the header's own."""
    stored = np.stack([ramp(low=0, high=4000, dtype=np.uint16)] * 3)
    own = [group((100, 200)), group(rescale=(2, 500)), group((100, 200), (2, -500))]
    own[0].add_new(0x00091010, "OB", bytes(padding))
    path = save_dicom(
        tmp_path / "a.dcm",
        stored,
        SharedFunctionalGroupsSequence=[group((1000, 2000), (1, -1000))],
        PerFrameFunctionalGroupsSequence=own,
        WindowCenter=5,
        WindowWidth=6,
        RescaleSlope=7,
        RescaleIntercept=8,
    )
    expected = [((100, 200), (1, -1000)), ((1000, 2000), (2, 500)), ((100, 200), (2, -500))]
    frames = list(read_dicom_frames(path))
    for frame, (window, (slope, intercept)) in zip(frames, expected, strict=True):
        shown = through_window(stored[0].astype(float) * slope + intercept, *window)
        assert 0 < (shown == 255).mean() < 1
        np.testing.assert_array_equal(frame[..., 0], shown)


def test_functional_groups_without_windows_leave_the_headers(tmp_path: Path) -> None:
    path = save_dicom(
        tmp_path / "a.dcm",
        np.stack([ramp()] * 2),
        SharedFunctionalGroupsSequence=[group()],
        PerFrameFunctionalGroupsSequence=[group()],  # one less than there are frames
        WindowCenter=100,
        WindowWidth=50,
    )
    for frame in read_dicom_frames(path):
        np.testing.assert_array_equal(frame[..., 0], through_window(ramp(), 100, 50))


def moving(frames: int = 5) -> np.ndarray:
    return np.stack([np.full((16, 20), 40 * index, np.uint8) for index in range(frames)])


@pytest.mark.parametrize(
    ("elements", "times", "fps"),
    [
        ({"FrameTime": 40}, [0, 0.04, 0.08, 0.12, 0.16], 25),
        ({"FrameTimeVector": [0, 10, 20, 30, 40]}, [0, 0.01, 0.03, 0.06, 0.1], 40),
        ({"CineRate": 50}, [0, 0.02, 0.04, 0.06, 0.08], 50),
        ({"RecommendedDisplayFrameRate": 10}, [0, 0.1, 0.2, 0.3, 0.4], 10),
        ({}, [0, 0.04, 0.08, 0.12, 0.16], 25),
        ({"FrameTimeVector": [0, 10], "FrameTime": 20}, [0, 0.02, 0.04, 0.06, 0.08], 50),  # a vector too short
        ({"FrameTime": 1e-30, "CineRate": 10**9}, [0, 0.04, 0.08, 0.12, 0.16], 25),
        ({"FrameTime": 0, "CineRate": 20}, [0, 0.05, 0.1, 0.15, 0.2], 20),
    ],
)
def test_a_cine_loop_has_its_frame_times(
    tmp_path: Path, elements: dict[str, Any], times: list[float], fps: int
) -> None:
    path = save_dicom(tmp_path / "loop.dcm", moving(), PixelSpacing=[0.5, 0.25], **elements)
    (source,), failures = open_sources([str(path)])
    assert failures == []
    assert isinstance(source, DicomCine)
    with source:
        assert (source.fps, source.length, source.kind) == (Fraction(fps), 5, "video")
        frames = list(source)
    assert [frame.time for frame in frames] == pytest.approx(times)
    assert [int(frame.image[0, 0, 0]) for frame in frames] == [0, 40, 80, 120, 160]
    assert [frame.index for frame in frames] == list(range(5))
    assert {frame.spacing for frame in frames} == {(0.5, 0.25)}


def region(**elements: Any) -> Any:
    item = pydicom.Dataset()
    fixed = {"RegionSpatialFormat": 1, "PhysicalUnitsXDirection": 3, "PhysicalUnitsYDirection": 3}
    for name, value in {**fixed, "PhysicalDeltaX": 0.02, "PhysicalDeltaY": 0.03, **elements}.items():
        setattr(item, name, value)
    return item


@pytest.mark.parametrize(
    ("regions", "spacing"),
    [
        ([{}], (0.3, 0.2)),
        ([{}, {}], (0.3, 0.2)),
        ([{"PhysicalDeltaY": -0.03}], (0.3, 0.2)),
        ([{}, {"PhysicalDeltaX": 0.05}], None),  # two views at two scales
        ([{}, {"RegionSpatialFormat": 3, "PhysicalDeltaX": 9.0}], (0.3, 0.2)),  # a Doppler strip beside
        ([{"PhysicalUnitsXDirection": 4}], None),  # seconds
        ([{"PhysicalDeltaX": 0.0}], None),
        ([], None),
    ],
)
def test_ultrasound_calibration(
    tmp_path: Path, regions: list[dict[str, Any]], spacing: tuple[float, float] | None
) -> None:
    items = [region(**elements) for elements in regions]
    path = save_dicom(tmp_path / "a.dcm", ramp(), SequenceOfUltrasoundRegions=items)
    assert read_dicom_header(path).spacing == (pytest.approx(spacing) if spacing else None)


def test_a_detectors_spacing_is_not_the_patients(tmp_path: Path) -> None:
    path = save_dicom(tmp_path / "a.dcm", ramp(), ImagerPixelSpacing=[0.1, 0.1])
    assert read_dicom_header(path).spacing is None


def test_a_folder_is_sorted_by_series_and_number(tmp_path: Path) -> None:
    for name, number, series in (("c", 2, "1.2"), ("a", 3, "1.2"), ("d", 1, "1.2"), ("b", 1, "1.1")):
        save_dicom(tmp_path / name, ramp(), InstanceNumber=number, SeriesInstanceUID=series)
    save_dicom(tmp_path / "1.2.826.0.17", ramp(), InstanceNumber=9, SeriesInstanceUID="1.2")
    save_dicom(tmp_path / "loop.DCM", moving())
    (tmp_path / "notes").write_text("no DICOM")
    (tmp_path / "DICOMDIR").write_bytes(bytes(128) + b"DICM")
    sources, failures = open_sources([str(tmp_path)])
    assert failures == []
    assert [[file.name for file in source.files] for source in sources] == [
        ["d", "c", "a", "1.2.826.0.17", "b"],
        ["loop.DCM"],
    ]


def export(folder: Path) -> None:
    """Files as a medium holds them: by patient, study and series, without suffixes, beside a viewer's own."""
    for series, number, place in (
        ("1.1", 2, "PAT1/ST1/SE1/IM2"),
        ("1.1", 1, "PAT1/ST1/SE1/IM10"),
        ("1.2", 1, "PAT1/IM1"),
    ):
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        save_dicom(folder / place, ramp(), InstanceNumber=number, SeriesInstanceUID=series)
    save_dicom(folder / "PAT1" / "ST1" / "LOOP", moving())
    (folder / "PAT1" / ".trash").mkdir()
    save_dicom(folder / "PAT1" / ".trash" / "IM9", ramp())
    (folder / "PAT1" / "readme").write_text("no DICOM")
    assert cv2.imwrite(str(folder / "PAT1" / "thumbnail.png"), ramp())


EXPORTED = [["PAT1/IM1", "PAT1/ST1/SE1/IM10", "PAT1/ST1/SE1/IM2"], ["PAT1/ST1/LOOP"]]


def places(folder: Path) -> list[list[str]]:
    sources, failures = open_sources([str(folder)])
    assert failures == []
    return [[file.relative_to(folder).as_posix() for file in source.files] for source in sources]


def test_an_export_is_read_from_its_subfolders(tmp_path: Path) -> None:
    export(tmp_path)
    assert places(tmp_path) == EXPORTED


@pytest.mark.parametrize("index", ["DICOMDIR", "dicomdir"])
def test_a_medium_is_read_from_its_subfolders_whatever_lies_beside_its_index(tmp_path: Path, index: str) -> None:
    export(tmp_path)
    (tmp_path / index).write_bytes(bytes(128) + b"DICM")
    save_dicom(tmp_path / "loop.dcm", moving())
    assert places(tmp_path) == [EXPORTED[0], ["loop.dcm"], ["PAT1/ST1/LOOP"]]


def test_other_folders_are_not_read_from_their_subfolders(tmp_path: Path) -> None:
    export(tmp_path)
    save_dicom(tmp_path / "a.dcm", ramp())
    assert places(tmp_path) == [["a.dcm"]]


def test_a_folder_without_dicom_in_its_subfolders_says_so(tmp_path: Path) -> None:
    (tmp_path / "deeper").mkdir()
    assert cv2.imwrite(str(tmp_path / "deeper" / "a.png"), ramp())
    sources, (problem,) = open_sources([str(tmp_path)])
    assert sources == []
    assert "and no DICOM files in its subfolders. Name a glob for more" in problem.message


def test_spacing_of_single_pictures_reaches_the_frame(tmp_path: Path) -> None:
    with ImageFiles([save_dicom(tmp_path / "a.dcm", ramp(), PixelSpacing=[0.2, 0.1])]) as source:
        (frame,) = source
    assert (frame.spacing, frame.time, frame.index) == ((0.2, 0.1), None, 0)


@pytest.mark.parametrize("syntax", ["RLELossless", "JPEGLSLossless", "JPEG2000Lossless"])
@pytest.mark.parametrize("colour", [False, True])
def test_compressed_pixels_are_the_uncompressed_ones(tmp_path: Path, syntax: str, colour: bool) -> None:
    rgb = np.random.default_rng(1).integers(0, 256, (96, 128, 3), np.uint8)
    pixels = rgb if colour else rgb[..., 0].copy()
    path = save_dicom(tmp_path / "a.dcm", pixels, "RGB" if colour else "MONOCHROME2")
    dataset = pydicom.dcmread(path)
    try:
        dataset.compress(getattr(pydicom.uid, syntax))
    except RuntimeError as error:
        pytest.skip(f"no encoder here: {error}")
    dataset.save_as(path)
    if not pydicom.pixels.get_decoder(getattr(pydicom.uid, syntax)).is_available:
        pytest.skip(f"no decoder here for {syntax}")
    np.testing.assert_array_equal(only(path)[..., ::-1] if colour else grey(path), pixels)


@pytest.mark.parametrize("bits", [5, 6, 7, 8, 12, 16])  # GDCM does not take 6 and 7
def test_jpeg_ls_of_any_depth(tmp_path: Path, bits: int) -> None:
    jpeg_ls = pytest.importorskip("jpeg_ls", reason="needs pyjpegls (extra dicom)")
    pixels = ramp(high=(1 << bits) - 1, dtype=np.uint8 if bits <= 8 else np.uint16)
    codestream = bytes(jpeg_ls.encode_array(pixels))
    path = save_compressed(tmp_path / "a.dcm", [codestream], "1.2.840.10008.1.2.4.80", pixels)
    dataset = pydicom.dcmread(path)
    dataset.BitsStored, dataset.HighBit = bits, bits - 1
    dataset.save_as(path)
    np.testing.assert_array_equal(grey(path), np.rint(pixels / ((1 << bits) - 1) * 255))


@pytest.mark.parametrize("table", ["none", "basic", "extended"])
def test_frames_of_several_fragments_and_any_table_of_offsets(tmp_path: Path, table: str) -> None:
    path = jpeg_dicom(tmp_path / "a.dcm")
    expected = list(read_dicom_frames(path))
    dataset = pydicom.dcmread(path)
    from pydicom.encaps import encapsulate, encapsulate_extended, generate_frames

    frames = list(generate_frames(dataset.PixelData, number_of_frames=3))
    if table == "extended":
        dataset.PixelData, dataset.ExtendedOffsetTable, dataset.ExtendedOffsetTableLengths = encapsulate_extended(
            frames
        )
    else:
        dataset.PixelData = encapsulate(frames, fragments_per_frame=2, has_bot=table == "basic")
    dataset.save_as(path)
    np.testing.assert_array_equal(list(read_dicom_frames(path)), expected)


def test_jpeg_2000_in_its_boxes(tmp_path: Path) -> None:
    boxed = cv2.imencode(".jp2", ramp(), [cv2.IMWRITE_JPEG2000_COMPRESSION_X1000, 1000])[1].tobytes()
    path = save_compressed(tmp_path / "a.dcm", [boxed], "1.2.840.10008.1.2.4.90", ramp())
    np.testing.assert_array_equal(grey(path), ramp())


def jpeg_dicom(path: Path, syntax: str = "1.2.840.10008.1.2.4.50") -> Path:
    """A cine loop of three JPEG pictures, encapsulated by pydicom."""
    from pydicom.encaps import encapsulate

    pictures = [np.asarray(cv2.GaussianBlur(ramp(high=80 * (n + 1)), (0, 0), 2), np.uint8) for n in range(3)]
    save_dicom(path, np.stack(pictures), FrameTime=50)
    dataset = pydicom.dcmread(path)
    dataset.PixelData = encapsulate([cv2.imencode(".jpg", picture)[1].tobytes() for picture in pictures])
    dataset["PixelData"].VR = "OB"
    dataset.file_meta.TransferSyntaxUID = syntax
    dataset.save_as(path)
    return path


def test_jpeg_frames_are_what_opencv_decodes(tmp_path: Path) -> None:
    path = jpeg_dicom(tmp_path / "a.dcm")
    found = list(read_dicom_frames(path))
    from pydicom.encaps import generate_frames

    stored = generate_frames(pydicom.dcmread(path).PixelData, number_of_frames=3)
    expected = [cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR) for data in stored]
    assert len(found) == 3
    for one, other in zip(found, expected, strict=True):
        assert np.abs(one.astype(int) - other).max() <= 2  # another IDCT


# Bad input.


def failure(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        list(read_dicom_frames(path))
    text = str(caught.value)
    assert str(path) in text
    assert "\n" not in text
    for secret in (PATIENT, PATIENT_ID, BIRTH_DATE):
        assert secret not in text.replace(str(path), "")
    return text


def test_bad_files_are_one_line(tmp_path: Path) -> None:
    whole = save_dicom(tmp_path / "whole.dcm", moving())
    content = whole.read_bytes()
    for name, data, words in (
        ("short.dcm", content[:-100], "cut off or damaged"),
        ("header.dcm", content[:300], "no pixels"),
        ("preamble.dcm", content[:132], "no pixels"),
        ("empty.dcm", b"", "empty"),
        ("text.dcm", b"no DICOM at all" * 30, "is not DICOM"),
    ):
        (tmp_path / name).write_bytes(data)
        assert words in failure(tmp_path / name), name
    assert "no file" in failure(tmp_path / "absent.dcm")


def test_a_report_has_no_pixels(tmp_path: Path) -> None:
    path = save_dicom(tmp_path / "a.dcm", ramp())
    dataset = pydicom.dcmread(path)
    del dataset.PixelData, dataset.Rows, dataset.Columns, dataset.BitsAllocated
    dataset.save_as(path)
    assert "has no pixels" in failure(path)


def test_pixels_that_are_missing(tmp_path: Path) -> None:
    path = save_dicom(tmp_path / "a.dcm", ramp())
    dataset = pydicom.dcmread(path)
    del dataset.PixelData
    dataset.save_as(path)
    assert "damaged" in failure(path)


@pytest.mark.parametrize("frames", [6, 10**6, 10**9])
def test_more_frames_than_there_are(tmp_path: Path, frames: int) -> None:
    path = save_dicom(tmp_path / "a.dcm", moving(), NumberOfFrames=frames)
    assert "damaged" in failure(path)


def test_a_file_that_unpacks_to_any_size_is_refused(tmp_path: Path) -> None:
    path = save_dicom(tmp_path / "a.dcm", np.zeros((2000, 2000), np.uint8))
    dataset = pydicom.dcmread(path)
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.DeflatedExplicitVRLittleEndian
    dataset.save_as(path)
    assert path.stat().st_size < 20_000
    assert "the whole file is compressed" in failure(path)


def test_too_many_pixels_are_refused_before_decoding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save_dicom(tmp_path / "a.dcm", ramp())
    monkeypatch.setenv("ESPMEDSAM_MAX_PIXELS", "1000")
    assert "over the limit of 1000" in failure(path)


def jpeg_of(image: np.ndarray) -> bytes:
    return cv2.imencode(".jpg", image)[1].tobytes()


def jpeg_ls_of(image: np.ndarray) -> bytes:
    jpeg_ls = pytest.importorskip("jpeg_ls", reason="needs pyjpegls (extra dicom)")
    return bytes(jpeg_ls.encode_array(image))


@pytest.mark.parametrize(
    ("syntax", "codestream"),
    [
        ("1.2.840.10008.1.2.4.50", lambda: jpeg_of(np.zeros((5000, 5000), np.uint8))),
        ("1.2.840.10008.1.2.4.80", lambda: jpeg_ls_of(np.zeros((5000, 5000), np.uint8))),
        ("1.2.840.10008.1.2.4.70", lambda: bytes.fromhex("ffd8 ffc3000b08 1388 1388 01 011100")),
        ("1.2.840.10008.1.2.4.90", lambda: jpeg2000(5000, 5000)),
    ],
)
def test_compressed_data_of_another_size_are_refused_before_decoding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, syntax: str, codestream: Callable[[], bytes]
) -> None:
    """A decoder allocates what the codestream says: a gigapixel of zeros fits into 9 kB."""
    path = save_compressed(tmp_path / "a.dcm", [codestream()], syntax, ramp(64, 96))
    monkeypatch.setattr(decoding, "decode", None)  # calling either would be a TypeError, and "damaged"
    monkeypatch.setattr(decoding, "_decoder_process", type("NoDecoder", (), {"decode": None}))
    assert (
        "by its header a frame is 96x64 pixels of 1 sample, by its compressed data 5000x5000 pixels of 1 sample. "
        "Export it anew"
    ) in failure(path)


def test_compressed_data_of_another_number_of_samples_are_refused(tmp_path: Path) -> None:
    colour = np.repeat(ramp(64, 96)[..., None], 3, axis=2)
    path = save_compressed(tmp_path / "a.dcm", [jpeg_of(colour)], "1.2.840.10008.1.2.4.50", ramp(64, 96))
    assert "96x64 pixels of 1 sample, by its compressed data 96x64 pixels of 3 samples" in failure(path)


def test_data_that_crash_the_decoder_are_one_line(tmp_path: Path) -> None:
    """GDCM 3.2.6 throws past Python over a table that is missing, which ends its process."""
    pytest.importorskip("gdcm", reason="needs GDCM (extra dicom)")
    codestream = bytes.fromhex("ffd8 ffc3000b08 0040 0060 01 011100 ff0000 ffda0008010100010000 f2f52c8661c7fa1d0e8f45")
    path = save_compressed(tmp_path / "a.dcm", [codestream], "1.2.840.10008.1.2.4.70", ramp(64, 96))
    assert "damaged" in failure(path)


def test_rle_that_unpacks_to_far_more_is_refused(tmp_path: Path) -> None:
    segment = b"\x81\0" * 100_000  # 12.8 MB
    data = struct.pack("<16I", 1, 64, *[0] * 14) + segment
    assert "damaged" in failure(save_compressed(tmp_path / "a.dcm", [data], "1.2.840.10008.1.2.5", ramp(64, 96)))


def test_boxes_that_lead_nowhere_do_not_hang(tmp_path: Path) -> None:
    boxes = b"\0\0\0\x0cjP  \r\n\x87\n" + bytes(64)
    assert "damaged" in failure(save_compressed(tmp_path / "a.dcm", [boxes], "1.2.840.10008.1.2.4.90", ramp(64, 96)))


def test_the_extra_is_named_where_it_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = jpeg_dicom(tmp_path / "a.dcm")
    lossless = jpeg_dicom(tmp_path / "b.dcm", "1.2.840.10008.1.2.4.70")
    decoder = pydicom.pixels.get_decoder("1.2.840.10008.1.2.4.70")
    monkeypatch.setattr(decoder, "_available", {})
    assert "there is no decoder here for JPEG Lossless" in failure(lossless)
    assert "dicom]" in failure(lossless)
    monkeypatch.setattr(reading, "installed", lambda name: False)
    assert "needs pydicom" in failure(path)
    assert "dicom]" in failure(path)


def test_lossy_jpeg_of_12_bits_is_not_called_damaged(tmp_path: Path) -> None:
    if "pylibjpeg" in pydicom.pixels.get_decoder("1.2.840.10008.1.2.4.51").available_plugins:
        pytest.skip("pylibjpeg-libjpeg is installed, which decodes it")
    path = jpeg_dicom(tmp_path / "a.dcm", "1.2.840.10008.1.2.4.51")
    assert len(list(read_dicom_frames(path))) == 3  # of 8 bits
    dataset = pydicom.dcmread(path)
    dataset.BitsAllocated, dataset.BitsStored = 16, 12
    dataset.save_as(path)
    assert "no decoder here for JPEG Extended (Process 2 and 4) of 12 bits. Convert it" in failure(path)


def test_a_cut_loop_gives_what_there_is(tmp_path: Path) -> None:
    path = jpeg_dicom(tmp_path / "a.dcm")
    path.write_bytes(path.read_bytes()[:-300])
    with DicomCine(path) as source:
        frames = list(source)
    assert [frame.index for frame in frames] == [0, 1][: len(frames)]
    assert "damaged" in source.failures[0].message


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_mutated_files_are_read_or_refused(tmp_path: Path, data: st.DataObject) -> None:
    whole = tmp_path / "whole.dcm"
    if not whole.exists():
        jpeg_dicom(whole)
    content = bytearray(whole.read_bytes())
    for _ in range(data.draw(st.integers(1, 8))):
        content[data.draw(st.integers(128, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path / "mutated.dcm"
    path.write_bytes(bytes(content[: data.draw(st.integers(132, len(content)))]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        frames = []
        with contextlib.suppress(UserError):
            frames = list(read_dicom_frames(path))
    assert all(frame.dtype == np.uint8 and frame.shape[2] == 3 for frame in frames)


def test_nothing_of_the_patient_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = save_dicom(tmp_path / "a.dcm", moving(), FrameTime="33.3")
    broken = path.read_bytes().replace(BIRTH_DATE.encode(), b"31.12.56")  # a date that is not valid
    path.write_bytes(broken)
    with caplog.at_level(logging.DEBUG), warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        assert len(list(read_dicom_frames(path))) == 5
    for text in [*(record.getMessage() for record in caplog.records), *(str(item.message) for item in told)]:
        for secret in (PATIENT, PATIENT_ID, "31.12.56"):
            assert secret not in text


def test_is_dicom(tmp_path: Path) -> None:
    assert is_dicom(save_dicom(tmp_path / "noname", ramp()))
    assert not is_dicom(tmp_path)
    assert not is_dicom(tmp_path / "absent.dcm")
    assert cv2.imwrite(str(tmp_path / "a.png"), ramp())
    assert not is_dicom(tmp_path / "a.png")


@pytest.mark.data
def test_development_files_are_what_pydicom_shows(data_root: Path) -> None:
    found = {}
    for path in sorted((data_root / "dicom").glob("*.dcm")):
        header = read_dicom_header(path)
        frames = list(read_dicom_frames(path))
        assert len(frames) == header.frames
        assert {frame.shape for frame in frames} == {(header.height, header.width, 3)}
        assert frames[0].std() > 1
        found[path.stem] = (header, frames)
    assert len(found) == 5
    cine, frames = found["us_echo_cine_30f_jpegbaseline"]
    assert (cine.frames, float(cine.fps or 0)) == (30, pytest.approx(30, abs=0.01))
    assert cine.times[-1] == pytest.approx(29 * 0.033333, abs=1e-3)
    assert cine.spacing == pytest.approx((0.51049706,) * 2)
    # the same picture, compressed without loss and as it is
    np.testing.assert_array_equal(found["us_lymphnode_jpeg2000"][1][0], found["us_lymphnode_rgb_uncompressed"][1][0])
