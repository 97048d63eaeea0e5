"""DICOM files to frames: single pictures and cine loops, decoded by pydicom, windowed, with their spacing and times.

Nothing but pixels, times and spacing leaves this module: no name, number or date of a patient.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from espmedsam_edge.errors import UserError
from espmedsam_edge.imaging.decode import MIN_SIDE, max_pixels
from espmedsam_edge.imaging.geometry import Frame
from espmedsam_edge.machine.installation import install_command, installed
from espmedsam_edge.runtime.dicom.codestreams import FrameSize, bare_codestream, check_rle, size_of
from espmedsam_edge.runtime.dicom.decoder_process import APART, DecoderProcess, decode
from espmedsam_edge.runtime.dicom.discretion import Dicom, discreet, read_dataset
from espmedsam_edge.runtime.dicom.display import displayed
from espmedsam_edge.runtime.dicom.extent import check_extent

SUFFIXES = frozenset({".dcm", ".dicom", ".ima"})
_PREAMBLE = 128
_DIRECTORY = "1.2.840.10008.1.3.10"  # Media Storage Directory: a DICOMDIR, which has no pixels
_DEFAULT_FPS = Fraction(25)
_MOST_FRAMES = 1_000_000
_FRAME_SECONDS = (0.001, 100.0)  # a time between frames outside of these is no time between frames
_CENTIMETRES, _TWO_DIMENSIONAL = 3, 1  # PhysicalUnitsXDirection, RegionSpatialFormat (PS3.3 C.8.5.5)
_SPACING = (1e-6, 1e4)  # millimetres: from a nanometre to ten metres; others are no distance between pixels
_REMEDY = "Copy it again, or export it anew from the archive."
# The order in which decoders are tried: first those that are tested most against damaged data.
_DECODERS = ("pillow", "gdcm", "pyjpegls", "pylibjpeg", "pydicom")
_decoder_process = DecoderProcess()
# All that is read of a header: of a patient's attributes none is even looked at.
_TAGS = (
    "SamplesPerPixel", "PhotometricInterpretation", "PlanarConfiguration", "NumberOfFrames", "Rows", "Columns",
    "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation",
    "ExtendedOffsetTable", "ExtendedOffsetTableLengths",
    "PixelSpacing", "SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence", "SequenceOfUltrasoundRegions",
    "FrameTime", "FrameTimeVector", "CineRate", "RecommendedDisplayFrameRate", "SeriesInstanceUID", "InstanceNumber",
    "WindowCenter", "WindowWidth", "VOILUTFunction", "VOILUTSequence", "ModalityLUTSequence", "RescaleSlope",
    "RescaleIntercept", "PresentationLUTShape",
    *(f"{colour}PaletteColorLookupTable{part}"
      for colour in ("Red", "Green", "Blue", "Alpha", "SegmentedRed", "SegmentedGreen", "SegmentedBlue")
      for part in ("Descriptor", "Data") if not (colour.startswith("Segmented") and part == "Descriptor")),
)  # fmt: skip


@dataclass(frozen=True)
class DicomHeader:
    """What is known of a DICOM file before its pixels are read.

    Attributes:
        frames: how many it holds, 1 or more.
        height, width: of each, in pixels.
        spacing: millimetres between rows and between columns; None where the file does not say.
        fps: frames a second of a cine loop; None for a single picture.
        times: seconds of each frame from the first; empty for a single picture.
        order: what single pictures of a folder are sorted by: the series, then the number in it.
    """

    frames: int
    height: int
    width: int
    spacing: tuple[float, float] | None
    fps: Fraction | None
    times: tuple[float, ...]
    order: tuple[str, int]


def is_dicom(path: Path) -> bool:
    """Whether a file is DICOM: by its mark, or where that is missing by its suffix."""
    if not path.is_file():
        return False
    try:
        with path.open("rb") as stream:
            start = stream.read(_PREAMBLE + 4)
    except OSError:
        return False
    return start[_PREAMBLE:] == b"DICM" or path.suffix.lower() in SUFFIXES


def read_dicom_header(path: Path) -> DicomHeader:
    """Read a DICOM file's header.

    Raises:
        UserError: pydicom is not installed, the file is cut off, damaged or has no pixels, or too many.
    """
    with _damage(path) as dicom:
        dicom.dataset = dataset = _read(path)
        return _header(path, dataset)


def read_dicom_frames(path: Path) -> Iterator[Frame]:
    """Decode a DICOM file's frames one by one, in order, (H, W, 3) uint8 BGR, as a viewer would first show them.

    Colour: palettes applied, YBR made RGB. Grey: rescale or modality table, then the file's (first) window or table,
    then inverted for MONOCHROME1. Without a window, 8 bits stay what they are, more bits are scaled by the range that
    they use as ``imaging.decode`` does, and signed values by their smallest and largest.

    Raises:
        UserError: as for ``read_dicom_header``, or there is no decoder for its compression.
    """
    with _damage(path) as dicom:
        dicom.dataset = dataset = _read(path)
        header = _header(path, dataset)
        plugin = _decoder(path, dataset)
        from pydicom.pixels import iter_pixels

        count = 0
        for pixels in _decoded(path, dataset, header, plugin) if plugin else iter_pixels(path):
            if pixels.shape[:2] != (header.height, header.width):
                raise ValueError("a frame is not of the size that the header names")
            yield displayed(np.asarray(pixels), dataset, count)
            count += 1
            if count == header.frames:
                return
        raise ValueError(f"it holds {count} of {header.frames} frames")


def _decoded(path: Path, dataset: Any, header: DicomHeader, plugin: str) -> Iterator[Any]:
    """Compressed frames, each decoded once its own header was found to fit the file's."""
    from pydicom.pixels import as_pixel_options

    options = as_pixel_options(dataset, number_of_frames=1)
    options.pop("extended_offsets", None)
    decode_frame = _decoder_process.decode if plugin in APART else decode
    for data in _compressed(path, dataset, header.frames):
        codestream = _fitting(path, data, dataset, header)
        yield decode_frame(codestream, dataset.file_meta.TransferSyntaxUID, plugin, options)


def _compressed(path: Path, dataset: Any, frames: int) -> Iterator[bytes]:
    from pydicom import dcmread
    from pydicom.encaps import generate_frames

    tables = None
    if "ExtendedOffsetTable" in dataset:
        tables = dataset.ExtendedOffsetTable, dataset.ExtendedOffsetTableLengths
    with path.open("rb") as stream:
        dcmread(stream, stop_before_pixels=True, specific_tags=[])
        stream.seek(12, 1)  # tag, VR and length: compressed files have explicit VRs
        yield from generate_frames(stream, number_of_frames=frames, extended_offsets=tables)


def _fitting(path: Path, data: bytes, dataset: Any, header: DicomHeader) -> bytes:
    """A frame's codestream, if it unpacks to what the file's header says and to no more."""
    from pydicom.uid import RLELossless

    if dataset.file_meta.TransferSyntaxUID == RLELossless:
        check_rle(data, header.height * header.width)
        return data
    codestream = bare_codestream(data)
    expected = FrameSize(header.width, header.height, int(dataset.get("SamplesPerPixel") or 1))
    found = size_of(codestream)
    if found != expected:
        raise UserError(
            f"cannot read {path}: by its header a frame is {expected}, by its compressed data {found}.",
            "Export it anew from the archive.",
            exit_code=1,
        )
    return codestream


def _damage(path: Path) -> AbstractContextManager[Dicom]:
    """Turn what pydicom and the decoders raise into one line about the file, which quotes nothing of it."""

    def told(fault: str) -> UserError:
        fault = fault or "its DICOM data are cut off or damaged"
        return UserError(f"cannot read {path}: {fault}.", _REMEDY, exit_code=1)

    return discreet(told)


def _read(path: Path) -> Any:
    """What is used of the header."""
    if not path.is_file():
        raise UserError(f"no file {path}.", "Check the name.", exit_code=1)
    if path.stat().st_size == 0:
        raise UserError(f"cannot read {path}: it is empty.", "Copy it again.", exit_code=1)
    if not installed("pydicom"):
        raise UserError(f"{path} is DICOM; it needs pydicom.", f"Install it: {install_command('dicom')}", exit_code=1)
    with _damage(path):
        from pydicom.errors import InvalidDicomError

        try:
            _check_syntax(path)
            return read_dataset(path, _TAGS)
        except InvalidDicomError:
            raise UserError(f"cannot read {path}: it is not DICOM.", "Name an image file.", exit_code=1) from None


def _check_syntax(path: Path) -> None:
    from pydicom.filereader import read_file_meta_info

    with path.open("rb") as stream:
        check_extent(stream)
    syntax = read_file_meta_info(path).get("TransferSyntaxUID")
    if syntax is not None and syntax.is_deflated:  # unpacked at once, to whatever size
        raise UserError(
            f"cannot read {path}: the whole file is compressed ({_name_of(syntax)}).",
            "Convert it to Explicit VR Little Endian.",
            exit_code=1,
        )


def _name_of(syntax: Any) -> str:
    """A transfer syntax in words; whatever else stands in its place is not quoted."""
    return "an unknown transfer syntax" if syntax.name == str(syntax) else str(syntax.name)


def _header(path: Path, dataset: Any) -> DicomHeader:
    if str(dataset.file_meta.get("MediaStorageSOPClassUID", "")) == _DIRECTORY:
        raise UserError(f"{path} is the index of a medium, without pixels.", "Name the files beside it.", exit_code=1)
    height, width = int(dataset.get("Rows") or 0), int(dataset.get("Columns") or 0)
    if not height or not width or not dataset.get("BitsAllocated"):
        raise UserError(f"{path} has no pixels.", "Name a DICOM image, not a report or a structure.", exit_code=1)
    if min(height, width) < MIN_SIDE:
        raise UserError(f"{path} is {width}x{height} pixels, too small to segment.", exit_code=1)
    if height * width > max_pixels():
        raise UserError(
            f"{path} has frames of {width}x{height} pixels, over the limit of {max_pixels()}.",
            "Raise ESPMEDSAM_MAX_PIXELS if memory allows.",
            exit_code=1,
        )
    frames = max(1, int(dataset.get("NumberOfFrames") or 1))
    if frames > min(path.stat().st_size, _MOST_FRAMES):
        raise ValueError("it names more frames than it can hold")
    fps, times = _times(dataset, frames) if frames > 1 else (None, ())
    order = (str(dataset.get("SeriesInstanceUID", "")), int(dataset.get("InstanceNumber") or 0))
    return DicomHeader(frames, height, width, _spacing(dataset), fps, times, order)


def _times(dataset: Any, frames: int) -> tuple[Fraction, tuple[float, ...]]:
    """Frames a second and each frame's time (PS3.3 C.7.6.5): a vector of increments, one increment, or a rate."""
    vector = [float(step) / 1000 for step in _several(dataset.get("FrameTimeVector"))]
    mean = sum(vector[1:]) / (frames - 1)
    if len(vector) == frames and all(step >= 0 for step in vector) and _plausible(mean):
        times = tuple(float(time) for time in np.cumsum([0.0, *vector[1:]]))
        return Fraction((frames - 1) / times[-1]).limit_denominator(1001), times
    seconds = float(dataset.get("FrameTime") or 0) / 1000
    if _plausible(seconds):
        fps = Fraction(1 / seconds).limit_denominator(1001)
    else:
        rate = float(dataset.get("CineRate") or dataset.get("RecommendedDisplayFrameRate") or 0)
        fps = Fraction(rate).limit_denominator(1001) if rate > 0 and _plausible(1 / rate) else _DEFAULT_FPS
        seconds = float(1 / fps)
    return fps, tuple(index * seconds for index in range(frames))


def _plausible(seconds: float) -> bool:
    return _FRAME_SECONDS[0] <= seconds <= _FRAME_SECONDS[1]


def _several(value: Any) -> list[Any]:
    if value is None:
        return []
    return [value] if isinstance(value, str | float | int) else list(value)


def _spacing(dataset: Any) -> tuple[float, float] | None:
    """Millimetres between rows and columns in the patient: not a detector's, which lies behind and sees more."""
    for holder in (dataset, *_measures(dataset)):
        values = [float(value) for value in _several(holder.get("PixelSpacing"))]
        if len(values) == 2 and all(_SPACING[0] <= value <= _SPACING[1] for value in values):
            return values[0], values[1]
    return _region_spacing(dataset)


def _measures(dataset: Any) -> Iterator[Any]:
    for group in dataset.get("SharedFunctionalGroupsSequence") or ():
        yield from group.get("PixelMeasuresSequence") or ()


def _region_spacing(dataset: Any) -> tuple[float, float] | None:
    """An ultrasound picture's calibration, where all of its two-dimensional regions agree (PS3.3 C.8.5.5)."""
    found = set()
    for region in dataset.get("SequenceOfUltrasoundRegions") or ():
        if region.get("RegionSpatialFormat") != _TWO_DIMENSIONAL:
            continue
        units = region.get("PhysicalUnitsXDirection"), region.get("PhysicalUnitsYDirection")
        if units != (_CENTIMETRES, _CENTIMETRES):
            return None
        deltas = [abs(float(region.get(name) or 0)) for name in ("PhysicalDeltaY", "PhysicalDeltaX")]
        found.add((round(10 * deltas[0], 9), round(10 * deltas[1], 9)))
    if len(found) != 1:
        return None
    rows, columns = found.pop()
    return (rows, columns) if all(_SPACING[0] <= side <= _SPACING[1] for side in (rows, columns)) else None


def _decoder(path: Path, dataset: Any) -> str:
    """Which of pydicom's decoders to use; "" for data that are not compressed."""
    from pydicom.pixels import get_decoder

    syntax = dataset.file_meta.TransferSyntaxUID
    if not syntax.is_compressed:
        return ""
    bits, remedy = int(dataset.get("BitsStored") or 0), "Convert it to an uncompressed transfer syntax."
    try:
        available = get_decoder(syntax).available_plugins
        remedy = remedy if available else f"Install them: {install_command('dicom')}"
    except NotImplementedError:
        available = ()
    for name in _DECODERS:
        if name in available and not _refused(name, syntax, bits):
            return name
    raise UserError(
        f"cannot read {path}: there is no decoder here for {_name_of(syntax)} of {bits} bits.", remedy, exit_code=1
    )


def _refused(plugin: str, syntax: str, bits: int | None) -> bool:
    """What a decoder has no part for: libjpeg more than 8 bits, and GDCM in pydicom JPEG-LS of 6 and 7."""
    from pydicom.uid import JPEGExtended12Bit, JPEGLSTransferSyntaxes

    if syntax == JPEGExtended12Bit:
        return plugin in ("pillow", "gdcm") and bits != 8
    return plugin == "gdcm" and syntax in JPEGLSTransferSyntaxes and bits in (6, 7)


def decoders() -> dict[str, bool]:
    """For each kind of compression whether a decoder is installed; empty without pydicom."""
    if not installed("pydicom"):
        return {}
    from pydicom.pixels import get_decoder
    from pydicom.uid import JPEG2000, JPEGBaseline8Bit, JPEGLosslessSV1, JPEGLSLossless, RLELossless

    kinds = {
        "JPEG": JPEGBaseline8Bit,
        "lossless JPEG": JPEGLosslessSV1,
        "JPEG-LS": JPEGLSLossless,
        "JPEG 2000": JPEG2000,
        "RLE": RLELossless,
    }
    return {name: get_decoder(syntax).is_available for name, syntax in kinds.items()}
