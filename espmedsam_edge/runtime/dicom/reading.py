"""DICOM files to frames: single pictures and cine loops, decoded by pydicom, windowed, with their spacing and times.

Nothing but pixels, times and spacing leaves this module: no name, number or date of a patient.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from espmedsam_edge.errors import UserError
from espmedsam_edge.imaging.decode import MIN_SIDE, max_pixels
from espmedsam_edge.imaging.geometry import Frame
from espmedsam_edge.machine.installation import install_command, installed
from espmedsam_edge.runtime.dicom.decoding import FrameDecoder, syntax_name
from espmedsam_edge.runtime.dicom.discretion import Dicom, discreet, read_dataset
from espmedsam_edge.runtime.dicom.display import Scale, common_scale, displayed, needs_scale, own_scale
from espmedsam_edge.runtime.dicom.extent import check_extent, start_of
from espmedsam_edge.runtime.dicom.measures import frame_times, pixel_bytes, pixel_spacing
from espmedsam_edge.runtime.dicom.stored import check_colours, compressed_frames, frames_there, plain_frames

log = logging.getLogger(__name__)

SUFFIXES = frozenset({".dcm", ".dicom", ".ima"})
_PREAMBLE = 128
_DIRECTORY = "1.2.840.10008.1.3.10"  # Media Storage Directory: a DICOMDIR, which has no pixels
_VOLUMES = ("1.2.840.10008.5.1.4.1.1.6.2",)  # Enhanced US Volume Storage: pictures without "Image" in their name
_MOST_FRAMES = 1_000_000
_REMEDY = "Copy it again, or export it anew from the archive."
_NEEDED = ("SamplesPerPixel", "PhotometricInterpretation", "BitsStored", "PixelRepresentation")
# All that is read of a header: of a patient's attributes none is even looked at.
_TAGS = (
    "SamplesPerPixel", "PhotometricInterpretation", "PlanarConfiguration", "NumberOfFrames", "Rows", "Columns",
    "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation",
    "ExtendedOffsetTable", "ExtendedOffsetTableLengths",
    "PixelSpacing", "SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence", "SequenceOfUltrasoundRegions",
    "FrameTime", "FrameTimeVector", "CineRate", "RecommendedDisplayFrameRate", "SeriesInstanceUID", "InstanceNumber",
    "PixelPaddingValue", "PixelPaddingRangeLimit", "SOPClassUID",
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


class NoPicture(UserError):
    """A DICOM object that belongs to pictures and is none itself: a report, a dose, a segmentation."""

    def __init__(self, path: Path, kind: str) -> None:
        super().__init__(f"{path} is no picture but DICOM's {kind}.", "Name the picture's own file.", exit_code=1)
        self.kind = kind


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


def read_dicom_frames(path: Path, scale: Scale | None = None) -> Iterator[Frame]:
    """Decode a DICOM file's frames one by one, in order, (H, W, 3) uint8 BGR, as a viewer would first show them.

    Colour: palettes applied, YBR made RGB. Grey: rescale or modality table, then the file's (first) window or table,
    then inverted for MONOCHROME1; padding is black. Without a window, 8 bits stay what they are; 9 to 15 unsigned bits
    are scaled by their number; of others all frames share one scale, by the range that they use as ``imaging.decode``
    does, signed values by their smallest and largest.

    Args:
        path: the file.
        scale: of the files that belong together, from ``dicom_scale``; None: this file's own.

    Raises:
        UserError: as for ``read_dicom_header``, or there is no decoder for its compression.
    """
    with _damage(path) as dicom:
        dicom.dataset = dataset = _read(path)
        header = _header(path, dataset)
        there = frames_there(path, dataset)
        if there > header.frames:
            log.warning("%s holds %d frames, its header names %d; the others are left out.", path, there, header.frames)
        if scale is None and header.frames > 1 and needs_scale(dataset):
            stored = enumerate(_stored(path, dataset, header))
            scale = common_scale(own_scale(pixels, dataset, number) for number, pixels in stored)
        for number, pixels in enumerate(_stored(path, dataset, header)):
            yield displayed(pixels, dataset, number, scale)


def dicom_scale(path: Path) -> Scale | None:
    """What ``read_dicom_frames`` would scale a file by on its own; None where its window or its depth says it.

    Raises:
        UserError: as for ``read_dicom_frames``.
    """
    with _damage(path) as dicom:
        dicom.dataset = dataset = _read(path)
        header = _header(path, dataset)
        if not needs_scale(dataset):
            return None
        frames = enumerate(_stored(path, dataset, header))
        return common_scale(own_scale(pixels, dataset, number) for number, pixels in frames)


def _stored(path: Path, dataset: Any, header: DicomHeader) -> Iterator[NDArray[Any]]:
    """A file's frames as they are stored, all that its header names."""
    count = 0
    for pixels in _decoded(path, dataset, header):
        if pixels.shape[:2] != (header.height, header.width):
            raise ValueError("a frame is not of the size that the header names")
        yield np.asarray(pixels)
        count += 1
        if count == header.frames:
            return
    raise ValueError(f"it holds {count} of {header.frames} frames")


def _decoded(path: Path, dataset: Any, header: DicomHeader) -> Iterator[Any]:
    if not dataset.file_meta.TransferSyntaxUID.is_compressed:
        check_colours(path, dataset)
        yield from plain_frames(path, dataset)
        return
    decoder = FrameDecoder(path, dataset, (header.height, header.width))
    for data in compressed_frames(path, dataset, header.frames):
        yield decoder.decode(data)


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
            dataset = read_dataset(path, _TAGS)
        except InvalidDicomError:
            raise UserError(f"cannot read {path}: it is not DICOM.", "Name an image file.", exit_code=1) from None
        if "TransferSyntaxUID" not in dataset.file_meta:
            _assume_syntax(path, dataset)
        return dataset


def _assume_syntax(path: Path, dataset: Any) -> None:
    """For files that name no transfer syntax: uncompressed, written as their elements look."""
    from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian

    implicit, little = dataset.original_encoding
    length = pixel_bytes(dataset)
    if length is not None and path.stat().st_size < length:
        raise UserError(
            f"cannot read {path}: it names no transfer syntax, and its pixels are cut off or compressed.",
            _REMEDY,
            exit_code=1,
        )
    explicit = ExplicitVRLittleEndian if little else ExplicitVRBigEndian
    dataset.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian if implicit else explicit


def _check_syntax(path: Path) -> None:
    from pydicom.filereader import read_file_meta_info

    with path.open("rb") as stream:
        check_extent(stream)
        if start_of(stream) == 0:
            return
    syntax = read_file_meta_info(path).get("TransferSyntaxUID")
    if syntax is None:
        return
    fault = ""
    if not syntax.is_transfer_syntax:  # newer than pydicom, or a maker's own
        fault = f"its pixels are stored in {syntax_name(syntax)}"
    elif syntax.is_deflated:  # unpacked at once, to whatever size
        fault = f"the whole file is compressed ({syntax_name(syntax)})"
    if fault:
        raise UserError(f"cannot read {path}: {fault}.", "Convert it to Explicit VR Little Endian.", exit_code=1)


def _header(path: Path, dataset: Any) -> DicomHeader:
    if str(dataset.file_meta.get("MediaStorageSOPClassUID", "")) == _DIRECTORY:
        raise UserError(f"{path} is the index of a medium, without pixels.", "Name the files beside it.", exit_code=1)
    kind = _other_than_picture(dataset)
    if kind:
        raise NoPicture(path, kind)
    height, width = int(dataset.get("Rows") or 0), int(dataset.get("Columns") or 0)
    if not height or not width or not dataset.get("BitsAllocated"):
        raise UserError(f"{path} has no pixels.", "Name a DICOM image, not a report or a structure.", exit_code=1)
    missing = [name for name in _NEEDED if dataset.get(name) in (None, "")]
    if missing and int(dataset.BitsAllocated) <= 16:  # floating-point pixels have fewer
        raise UserError(f"cannot read {path}: {', '.join(missing)}: missing.", _REMEDY, exit_code=1)
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
    fps, times = frame_times(dataset, frames) if frames > 1 else (None, ())
    order = (str(dataset.get("SeriesInstanceUID", "")), int(dataset.get("InstanceNumber") or 0))
    return DicomHeader(frames, height, width, pixel_spacing(dataset), fps, times, order)


def _other_than_picture(dataset: Any) -> str:
    """What kind of object it is by the standard's own name for its class, if that is not one of images; else ""."""
    from pydicom.uid import UID

    kind = UID(str(dataset.get("SOPClassUID") or dataset.file_meta.get("MediaStorageSOPClassUID") or ""))
    name = "" if kind.is_private or not kind.is_valid else kind.name
    if not name.endswith(" Storage") or is_picture_class(kind):
        return ""
    return name.removesuffix(" Storage")


def is_picture_class(uid: str) -> bool:
    """Whether the standard names a class of objects as one of images."""
    from pydicom.uid import UID

    kind = UID(uid)
    return kind in _VOLUMES or (kind.is_valid and not kind.is_private and "Image" in kind.name)
