"""DICOM as scanners, archives and converters leave it: padding, series, odd headers, odd codestreams, study folders."""

from __future__ import annotations

import io
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from dicom_files import ramp, save_compressed, save_dicom

from espmedsam_edge.errors import UserError
from espmedsam_edge.runtime.dicom.reading import NoPicture, dicom_scale, read_dicom_frames, read_dicom_header
from espmedsam_edge.runtime.sources.opening import open_sources

pydicom = pytest.importorskip("pydicom", reason="needs pydicom (extra dicom)")


def grey(path: Path) -> list[np.ndarray]:
    return [frame[..., 0] for frame in read_dicom_frames(path)]


def run(*places: Path) -> dict[str, np.ndarray]:
    """What a run over these reads: the last frame of each file's, by the file's name."""
    sources, failures = open_sources([str(place) for place in places])
    assert not failures
    found = {}
    for source in sources:
        with source:
            found.update({frame.path.name: frame.image[..., 0] for frame in source})
        assert not source.failures
    return found


def bordered(inside: np.ndarray, value: int) -> np.ndarray:
    return np.pad(inside, ((0, 0), (9, 9)), constant_values=value)


WIDE = ramp(high=4080, dtype=np.uint16)
SIGNED = ramp(low=-1000, high=1040, dtype=np.int16)


@pytest.mark.parametrize(
    ("inside", "value", "elements"),
    [
        (WIDE, 65535, {"PixelPaddingValue": 65535}),
        (WIDE, 65535, {"PixelPaddingValue": 65000, "PixelPaddingRangeLimit": 65535}),
        (SIGNED, -32768, {"PixelPaddingValue": -32768}),
        (SIGNED, -2000, {"PixelPaddingValue": 63536, "RescaleSlope": 1, "RescaleIntercept": -24}),  # as if unsigned
        (4095 - WIDE, 0, {"PixelPaddingValue": 0, "PhotometricInterpretation": "MONOCHROME1"}),
        (WIDE, 4095, {"PixelPaddingValue": 4095, "WindowCenter": 2040, "WindowWidth": 4080}),
    ],
)
def test_padding_is_black_and_no_part_of_the_scale(
    tmp_path: Path, inside: np.ndarray, value: int, elements: dict[str, Any]
) -> None:
    bare = {name: element for name, element in elements.items() if "Padding" not in name}
    (expected,) = grey(save_dicom(tmp_path / "bare.dcm", inside, **bare))
    path = save_dicom(tmp_path / "padded.dcm", bordered(inside, value))
    dataset = pydicom.dcmread(path)
    for name, element in elements.items():
        kind = "SS" if "Padding" in name and element < 0 else "US" if "Padding" in name else None
        if kind:
            dataset.add_new(name, kind, element)
        else:
            setattr(dataset, name, element)
    dataset.save_as(path)
    (found,) = grey(path)
    assert np.array_equal(found[:, 9:-9], expected)
    assert not found[:, :9].any()
    assert not found[:, -9:].any()


@pytest.mark.parametrize("stored", [12, 16])
def test_a_cine_has_one_scale(tmp_path: Path, stored: int) -> None:
    field = ramp(high=1000, dtype=np.uint16)
    frames = np.stack([field] * 4)
    frames[1, 2, 2], frames[3, 2, 2] = 1100, 4000
    found = grey(save_dicom(tmp_path / "cine.dcm", frames, BitsStored=stored, HighBit=stored - 1, FrameTime="40"))
    for frame, values in zip(found, frames, strict=True):
        assert np.abs(frame - values / 4095 * 255).max() <= 0.51


@pytest.mark.parametrize("dtype", [np.uint16, np.int16])
def test_a_series_has_one_scale_and_a_window_goes_before_it(tmp_path: Path, dtype: type) -> None:
    low = 0 if dtype is np.uint16 else -500
    for number, high in enumerate((1000, 3000, 1000)):
        pixels = ramp(low=low, high=high, dtype=dtype)
        save_dicom(tmp_path / f"{number}.dcm", pixels, SeriesInstanceUID="1.2.3", InstanceNumber=number)
    other = save_dicom(tmp_path / "other.dcm", ramp(high=900, dtype=np.uint16), SeriesInstanceUID="1.2.4")
    window = {"WindowCenter": 500.5, "WindowWidth": 1001, "SeriesInstanceUID": "1.2.3"}
    save_dicom(tmp_path / "windowed.dcm", ramp(high=1000, dtype=np.uint16), **window)
    assert dicom_scale(tmp_path / "windowed.dcm") is None
    found = run(tmp_path)
    top, bottom = (4095, 0) if dtype is np.uint16 else (3000, -500)
    for number, high in enumerate((1000, 3000, 1000)):
        values = ramp(low=low, high=high, dtype=dtype).astype(float)
        assert np.abs(found[f"{number}.dcm"] - (values - bottom) / (top - bottom) * 255).max() <= 0.51
    assert np.array_equal(found["other.dcm"], grey(other)[0])
    assert found["windowed.dcm"].max() == 255


def test_a_folder_of_16_bit_pictures_has_one_scale_which_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    field = ramp(high=1000, dtype=np.uint16)
    for number, speck in enumerate((1000, 1100, 4200)):
        picture = field.copy()
        picture[2, 2] = speck
        cv2.imwrite(str(tmp_path / f"t{number}.{'png' if number else 'tif'}"), picture)
    cv2.imwrite(str(tmp_path / "eight.png"), ramp())
    with caplog.at_level(logging.INFO):
        found = run(tmp_path)
    for number in range(3):
        name = f"t{number}.{'png' if number else 'tif'}"
        assert np.abs(found[name][5:] - field[5:] / 16383 * 255).max() <= 0.51
    assert np.array_equal(found["eight.png"], ramp())
    lines = [record.getMessage() for record in caplog.records]
    assert lines == [f"The pictures of more than 8 bits in {tmp_path} are shown on one scale, 0 to 16383."]
    assert run(tmp_path / "t1.png")["t1.png"][5:].max() == round(1000 / 4095 * 255)  # alone, its own


def without_syntax(path: Path) -> None:
    data = path.read_bytes()
    at = data.index(b"\x02\0\x10\0UI")
    length = 8 + int.from_bytes(data[at + 6 : at + 8], "little")
    group = data.index(b"\x02\0\0\0UL") + 8
    size = (int.from_bytes(data[group : group + 4], "little") - length).to_bytes(4, "little")
    path.write_bytes(data[:group] + size + data[group + 4 : at] + data[at + length :])


def without_meta(path: Path) -> None:
    dataset = pydicom.Dataset(pydicom.dcmread(path))
    pydicom.dcmwrite(path, dataset, implicit_vr=True, little_endian=True)


@pytest.mark.parametrize(
    "spoil", [without_syntax, lambda path: path.write_bytes(path.read_bytes()[132:]), without_meta],
    ids=["no syntax", "no preamble", "no meta information"],
)  # fmt: skip
def test_files_without_their_first_parts_are_read(tmp_path: Path, spoil: Callable[[Path], Any]) -> None:
    pixels = np.stack([ramp(), 255 - ramp()])
    path = save_dicom(tmp_path / "a.dcm", pixels, FrameTime="40")
    spoil(path)
    assert read_dicom_header(path).frames == 2
    assert np.array_equal(np.stack(grey(path)), pixels)


def test_a_compressed_file_without_syntax_is_refused_with_the_reason(tmp_path: Path) -> None:
    codestream = cv2.imencode(".jpg", ramp(200, 200))[1].tobytes()
    path = save_compressed(tmp_path / "a.dcm", [codestream], pydicom.uid.JPEGBaseline8Bit, ramp(200, 200))
    without_syntax(path)
    with pytest.raises(UserError, match="names no transfer syntax, and its pixels are cut off or compressed"):
        grey(path)


@pytest.mark.parametrize(
    "elements",
    [
        {"RescaleSlope": "", "RescaleIntercept": ""}, {"RescaleSlope": 1}, {"WindowCenter": "", "WindowWidth": ""},
        {"WindowCenter": 2040, "WindowWidth": 0}, {"WindowCenter": [2047.5, 40], "WindowWidth": [4096, 400]},
        {"WindowCenter": 2047.5, "WindowWidth": 4096, "VOILUTFunction": ""},
    ],
)  # fmt: skip
def test_empty_values_are_none(tmp_path: Path, elements: dict[str, Any]) -> None:
    path = save_dicom(tmp_path / "a.dcm", WIDE, BitsStored=12, HighBit=11, **elements)
    assert np.abs(grey(path)[0] - WIDE / 4095 * 255).max() <= 1


def test_values_at_the_upper_end_of_their_words_are_read(tmp_path: Path) -> None:
    path = save_dicom(tmp_path / "a.dcm", (WIDE << 4).astype(np.uint16), BitsStored=12, HighBit=15)
    assert np.abs(grey(path)[0] - WIDE / 4095 * 255).max() <= 0.51


@pytest.mark.parametrize(("entries", "bits"), [(256, 8), (4096, 12), (0, 16)])
def test_tables_of_any_depth_are_applied(tmp_path: Path, entries: int, bits: int) -> None:
    count = entries or 1 << 16
    values = ((1 << bits) - 1 - np.linspace(0, (1 << bits) - 1, count)).astype(np.uint16)
    table = pydicom.Dataset()
    table.LUTDescriptor = [entries, 0, bits]
    table.add_new("LUTData", "OW", (values.astype(np.uint8) if bits == 8 else values.astype("<u2")).tobytes())
    pixels = ramp(high=count - 1, dtype=np.uint8 if bits == 8 else np.uint16)
    path = save_dicom(tmp_path / "a.dcm", pixels, VOILUTSequence=[table])
    assert np.abs(grey(path)[0] - (255 - pixels / (count - 1) * 255)).max() <= 1


def signed_codestream(path: Path, syntax: str, *, contradicting: bool) -> np.ndarray:
    """12 bits, signed; or unsigned ones under a header that says signed, as archives make it."""
    values = ramp(100, 100, low=-1000, high=1040, dtype=np.int16)
    window = {"WindowCenter": 20.5, "WindowWidth": 2041, "BitsStored": 12, "HighBit": 11}
    stored = (values & 0xFFF).astype(np.uint16) if contradicting else values
    dataset = pydicom.dcmread(save_dicom(path, stored, **window))
    dataset.compress(syntax, generate_instance_uid=False)
    dataset.PixelRepresentation = 1
    dataset.save_as(path)
    return values


@pytest.mark.parametrize("contradicting", [False, True])
@pytest.mark.parametrize("syntax", ["JPEGLSLossless", "JPEG2000Lossless", "RLELossless"])
def test_signed_values_are_read_by_whichever_decoder_can(tmp_path: Path, syntax: str, contradicting: bool) -> None:
    path = tmp_path / "a.dcm"
    try:
        values = signed_codestream(path, getattr(pydicom.uid, syntax), contradicting=contradicting)
    except (NotImplementedError, RuntimeError, ValueError) as error:
        pytest.skip(f"pydicom cannot write it here: {error}")
    reference = pydicom.dcmread(path).pixel_array
    if not np.array_equal(reference, values):
        pytest.skip("pydicom reads other values itself")
    assert np.abs(grey(path)[0] - (values + 1000) / 2040 * 255).max() <= 1


@pytest.mark.parametrize("marker", [True, False])
def test_rgb_in_jpeg_is_read_with_and_without_its_marker(tmp_path: Path, marker: bool) -> None:
    Image = pytest.importorskip("PIL.Image")
    picture = np.stack([ramp(64, 64), ramp(64, 64).T, 255 - ramp(64, 64)], 2)
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "jpeg", quality=95, keep_rgb=True)
    data = buffer.getvalue()
    if not marker:
        at = data.index(b"\xff\xee")
        data = data[:at] + data[at + 2 + int.from_bytes(data[at + 2 : at + 4], "big") :]
    path = save_compressed(tmp_path / "a.dcm", [data], pydicom.uid.JPEGBaseline8Bit, picture, "RGB")
    (found,) = read_dicom_frames(path)
    assert np.abs(found[..., ::-1].astype(int) - picture).mean() < 2


def test_what_lies_in_a_study_beside_pictures_is_passed_over_and_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from pydicom import uid

    save_dicom(tmp_path / "picture.dcm", ramp())
    others = {
        "seg": uid.SegmentationStorage, "dose": uid.RTDoseStorage, "dose-2": uid.RTDoseStorage,
        "structures": uid.RTStructureSetStorage, "report": uid.ComprehensiveSRStorage,
        "shown": uid.GrayscaleSoftcopyPresentationStateStorage, "key": uid.KeyObjectSelectionDocumentStorage,
    }  # fmt: skip
    for name, kind in others.items():
        path = save_dicom(tmp_path / f"{name}.dcm", ramp())
        dataset = pydicom.dcmread(path)
        dataset.SOPClassUID = dataset.file_meta.MediaStorageSOPClassUID = kind
        dataset.save_as(path)
    with caplog.at_level(logging.INFO):
        assert list(run(tmp_path)) == ["picture.dcm"]
    assert [record.getMessage() for record in caplog.records] == [
        "DICOM objects that are no pictures are passed over: 1 Comprehensive SR, "
        "1 Grayscale Softcopy Presentation State, 1 Key Object Selection Document, 2 RT Dose, 1 RT Structure Set, "
        "1 Segmentation."
    ]
    with pytest.raises(NoPicture, match="is no picture but DICOM's RT Dose"):
        read_dicom_header(tmp_path / "dose.dcm")
    for kind in (uid.CTImageStorage, uid.RTImageStorage, uid.EnhancedUSVolumeStorage, "1.2.3.4"):
        dataset = pydicom.dcmread(tmp_path / "picture.dcm")
        dataset.SOPClassUID = kind
        dataset.save_as(tmp_path / "picture.dcm")
        assert read_dicom_header(tmp_path / "picture.dcm").frames == 1


COLOURS = np.stack([ramp(), ramp()[:, ::-1], np.full((40, 60), 90, np.uint8)], axis=-1)


def changed(path: Path, **elements: Any) -> Path:
    dataset = pydicom.dcmread(path)
    for name, value in elements.items():
        setattr(dataset, name, value)
    dataset.save_as(path)
    return path


def colours(path: Path) -> np.ndarray:
    (frame,) = read_dicom_frames(path)
    return frame[..., ::-1]


@pytest.mark.parametrize("planes", [0, 1])
@pytest.mark.parametrize("name", ["JPEG", "JPEG2000"])
def test_compressed_colours_are_read_whatever_the_header_says_of_planes(tmp_path: Path, name: str, planes: int) -> None:
    Image = pytest.importorskip("PIL.Image")
    stream, jpeg = io.BytesIO(), name == "JPEG"
    Image.fromarray(COLOURS).save(stream, name, **({"quality": 97, "subsampling": 0} if jpeg else {"mct": 1}))
    syntax = pydicom.uid.JPEGBaseline8Bit if jpeg else pydicom.uid.JPEG2000Lossless
    # JPEG 2000 that was told to make RGB of itself is RGB, even under a header that names another model.
    for model in ("YBR_FULL_422", "YBR_FULL", "RGB") if jpeg else ("YBR_RCT", "YBR_FULL", "RGB"):
        path = save_compressed(tmp_path / "a.dcm", [stream.getvalue()], syntax, COLOURS, model)
        changed(path, PlanarConfiguration=planes)
        assert np.abs(colours(path).astype(int) - COLOURS).max() <= (3 if jpeg else 0)


def test_colours_of_which_nothing_was_left_out_are_read_under_a_header_that_says_so(tmp_path: Path) -> None:
    Image = pytest.importorskip("PIL.Image")
    whole = np.asarray(Image.fromarray(COLOURS).convert("YCbCr"))
    path = save_dicom(tmp_path / "a.dcm", whole, "YBR_FULL_422")
    assert np.abs(colours(path).astype(int) - COLOURS).max() <= 3
    halved = np.concatenate([whole[:, ::2, :1], whole[:, 1::2, :1], whole[:, ::2, 1:]], axis=-1)
    changed(path, PixelData=halved.tobytes())
    assert np.abs(colours(path).astype(int) - COLOURS).max() <= 8  # neighbours share their colour


@pytest.mark.parametrize("model", ["HSV", "CMYK", "ARGB", "YBR_PARTIAL_422", "DOE^JANE"])
def test_colour_models_that_are_not_read_are_named_and_nothing_else_quoted(tmp_path: Path, model: str) -> None:
    path = save_dicom(tmp_path / "a.dcm", COLOURS, "RGB")
    changed(path, PhotometricInterpretation=model)
    shown = "of an unknown model" if "^" in model else model
    with pytest.raises(UserError, match=f"its colours are {shown}"):
        list(read_dicom_frames(path))


def test_the_first_window_that_is_one_counts_and_a_slope_of_0_is_none(tmp_path: Path) -> None:
    window = {"WindowCenter": 2000, "WindowWidth": 4000}
    (expected,) = grey(save_dicom(tmp_path / "one.dcm", WIDE, **window))
    path = save_dicom(tmp_path / "list.dcm", WIDE, RescaleSlope=0, RescaleIntercept=0)
    dataset = pydicom.dcmread(path)
    for name, value in window.items():
        dataset.add_new(name, "DS", ["", str(value), "7"])
    dataset.save_as(path)
    assert np.array_equal(grey(path)[0], expected)
    for name in window:
        dataset.add_new(name, "DS", ["", ""])
    dataset.save_as(path)
    assert np.array_equal(grey(path)[0], grey(save_dicom(tmp_path / "bare.dcm", WIDE))[0])


def test_a_picture_of_one_bit_is_black_and_white(tmp_path: Path) -> None:
    bits = ramp() > 128
    path = save_dicom(tmp_path / "a.dcm", ramp())
    packed = np.packbits(bits.ravel(), bitorder="little").tobytes()
    changed(path, BitsAllocated=1, BitsStored=1, HighBit=0, PixelData=packed)
    assert np.array_equal(grey(path)[0], bits * 255)


@pytest.mark.parametrize("name", ["SamplesPerPixel", "PhotometricInterpretation", "BitsStored", "PixelRepresentation"])
def test_what_a_header_lacks_is_named(tmp_path: Path, name: str) -> None:
    path = save_dicom(tmp_path / "a.dcm", WIDE)
    dataset = pydicom.dcmread(path)
    del dataset[name]
    dataset.save_as(path)
    with pytest.raises(UserError, match=f"a.dcm: {name}: missing"):
        list(read_dicom_frames(path))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("low", "high"), [(-2, 3), (0, 1), (0.2, 0.7), (0, 300.5)])
def test_floating_point_pixels_are_shown_from_their_smallest_to_their_largest(
    tmp_path: Path, dtype: type, low: float, high: float
) -> None:
    values = np.linspace(low, high, WIDE.size, dtype=dtype).reshape(WIDE.shape)
    path = save_dicom(tmp_path / "a.dcm", WIDE)
    dataset = pydicom.dcmread(path)
    for name in ("PixelData", "BitsStored", "HighBit", "PixelRepresentation"):
        delattr(dataset, name)
    dataset.BitsAllocated = 8 * values.itemsize
    setattr(dataset, "FloatPixelData" if dtype is np.float32 else "DoubleFloatPixelData", values.tobytes())
    dataset.save_as(path)
    assert np.abs(grey(path)[0] - (values - low) / (high - low) * 255).max() <= 0.51


def test_values_that_are_parts_of_one_after_their_slope_are_shown_from_0_to_the_largest(tmp_path: Path) -> None:
    path = changed(save_dicom(tmp_path / "a.dcm", WIDE), RescaleSlope="0.00001", RescaleIntercept="0")
    assert np.abs(grey(path)[0] - WIDE / WIDE.max() * 255).max() <= 0.51


@pytest.mark.parametrize("syntax", ["HTJ2KLossless", "HTJ2KLosslessRPCL", "HTJ2K"])
@pytest.mark.parametrize("bits", [8, 16])
def test_high_throughput_jpeg_2000_is_read_as_pydicom_reads_it(tmp_path: Path, syntax: str, bits: int) -> None:
    codecs = pytest.importorskip("imagecodecs", reason="writes HTJ2K")
    pixels = ramp(high=(1 << bits) - 1, dtype=np.uint8 if bits == 8 else np.uint16)
    dataset = pydicom.dcmread(save_dicom(tmp_path / "a.dcm", pixels))
    dataset.file_meta.TransferSyntaxUID = getattr(pydicom.uid, syntax)
    code = bytes(codecs.htj2k_encode(pixels, reversible=True))
    dataset.PixelData = pydicom.encaps.encapsulate([code])
    dataset["PixelData"].VR = "OB"
    dataset.save_as(tmp_path / "a.dcm")
    assert np.array_equal(pydicom.dcmread(tmp_path / "a.dcm").pixel_array, pixels)
    (frame,) = grey(tmp_path / "a.dcm")
    assert np.abs(frame - pixels * (255 / ((1 << bits) - 1))).max() <= 1
    (tmp_path / "cut.dcm").write_bytes((tmp_path / "a.dcm").read_bytes()[: -len(code) // 2])
    with pytest.raises(UserError, match=r"cut\.dcm: its DICOM data are cut off or damaged"):
        grey(tmp_path / "cut.dcm")


@pytest.mark.parametrize("syntax", ["1.2.840.10008.1.2.4.110", "1.2.333.44444.1.2.4.201"])
def test_a_transfer_syntax_that_is_not_known_is_no_damage(tmp_path: Path, syntax: str) -> None:
    """JPEG XL is younger than pydicom 3.0, which pynetdicom teaches its name; others are a maker's own."""
    path = save_compressed(tmp_path / "a.dcm", [b"codestream"], pydicom.uid.HTJ2KLossless, ramp())
    content, known = path.read_bytes(), pydicom.uid.HTJ2KLossless.encode()
    assert content.count(known) == 1
    assert len(known) == len(syntax)
    path.write_bytes(content.replace(known, syntax.encode()))
    with pytest.raises(UserError, match=r"(an unknown transfer syntax|no decoder here for JPEG XL .*)\. Convert it to"):
        grey(path)


@pytest.mark.parametrize("stated", [None, 1, 2, 3])
@pytest.mark.parametrize("compressed", [False, True])
def test_frames_that_the_header_does_not_name_are_told_of(
    tmp_path: Path, stated: int | None, compressed: bool, caplog: pytest.LogCaptureFixture
) -> None:
    pixels = np.stack([ramp() // number for number in (1, 2, 3)])
    dataset = pydicom.dcmread(save_dicom(tmp_path / "a.dcm", pixels))
    if compressed:
        dataset.compress(pydicom.uid.RLELossless)
    dataset.NumberOfFrames = stated
    dataset.save_as(tmp_path / "a.dcm")
    frames = grey(tmp_path / "a.dcm")
    assert len(frames) == (stated or 1)
    assert all(np.array_equal(frame, pixels[number]) for number, frame in enumerate(frames))
    told = f"{tmp_path / 'a.dcm'} holds 3 frames, its header names {stated or 1}; the others are left out."
    assert [record.getMessage() for record in caplog.records] == [told] * (stated != 3)


@pytest.mark.parametrize("function", ["LINEAR", "LINEAR_EXACT", "SIGMOID"])
@pytest.mark.parametrize("seed", range(6))
def test_windows_of_any_depth_slope_and_sign_are_what_pydicom_gives(tmp_path: Path, function: str, seed: int) -> None:
    from pydicom.pixels import apply_modality_lut, apply_windowing

    rng = np.random.default_rng(seed)
    bits, signed = int(rng.integers(9, 17)), bool(seed % 2)
    lowest, highest = (-(1 << bits - 1), (1 << bits - 1) - 1) if signed else (0, (1 << bits) - 1)
    pixels = rng.integers(lowest, highest + 1, (40, 50)).astype(np.int16 if signed else np.uint16)
    slope, intercept = float(rng.choice([0.25, 1, 2.5])), float(rng.integers(-2000, 2000))
    low, high = lowest * slope + intercept, highest * slope + intercept
    center, width = round(rng.uniform(low, high), 2), round(rng.uniform(2, high - low), 2)
    elements = {
        "BitsStored": bits, "HighBit": bits - 1, "RescaleSlope": slope, "RescaleIntercept": intercept,
        "WindowCenter": center, "WindowWidth": width, "VOILUTFunction": function,
    }  # fmt: skip
    path = save_dicom(tmp_path / "a.dcm", pixels, **elements)
    dataset = pydicom.dcmread(path)
    shown = apply_windowing(apply_modality_lut(dataset.pixel_array, dataset), dataset)
    expected = (shown - low) / (high - low) * 255  # pydicom shows in the range that rescaled samples can have
    assert np.abs(grey(path)[0] - expected).max() <= 0.51
