"""Small DICOM files for tests, written by pydicom: what each shows, and its dummy patient, are known."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

PATIENT = "DOE^JANE"
PATIENT_ID = "ID-774411"
BIRTH_DATE = "19561231"


def save_dicom(path: Path, pixels: np.ndarray, interpretation: str = "MONOCHROME2", **elements: Any) -> Path:
    """Write pixels, ([frames,] H, W[, 3]) of 8 or 16 bits, as an uncompressed secondary capture."""
    pytest.importorskip("pydicom", reason="needs pydicom (extra dicom)")
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, UltrasoundMultiFrameImageStorage, generate_uid

    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = UltrasoundMultiFrameImageStorage
    meta.MediaStorageSOPInstanceUID = generate_uid()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset: Any = FileDataset(path, {}, file_meta=meta, preamble=b"\0" * 128)
    dataset.SOPClassUID, dataset.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    dataset.PatientName, dataset.PatientID, dataset.PatientBirthDate = PATIENT, PATIENT_ID, BIRTH_DATE
    dataset.StudyInstanceUID, dataset.SeriesInstanceUID = generate_uid(), generate_uid()
    colour = pixels.shape[-1] == 3
    multi = pixels.ndim == (4 if colour else 3)
    dataset.Rows, dataset.Columns = pixels.shape[-3:-1] if colour else pixels.shape[-2:]
    dataset.SamplesPerPixel = 3 if colour else 1
    if colour:
        dataset.PlanarConfiguration = 0
    if multi:
        dataset.NumberOfFrames = pixels.shape[0]
    dataset.PhotometricInterpretation = interpretation
    dataset.BitsAllocated = dataset.BitsStored = 8 * pixels.dtype.itemsize
    dataset.HighBit = dataset.BitsStored - 1
    dataset.PixelRepresentation = int(pixels.dtype.kind == "i")
    dataset.add_new(0x7FE00010, "OB" if pixels.dtype.itemsize == 1 else "OW", pixels.tobytes())
    for name, value in elements.items():
        setattr(dataset, name, value)
    dataset.save_as(path, enforce_file_format=True)
    return path


def save_compressed(
    path: Path, codestreams: list[bytes], syntax: str, pixels: np.ndarray, interpretation: str = "MONOCHROME2"
) -> Path:
    """Write a file whose header describes ``pixels`` and whose frames are these codestreams, whatever they hold."""
    save_dicom(path, pixels, interpretation)
    from pydicom import dcmread
    from pydicom.encaps import encapsulate

    dataset = dcmread(path)
    dataset.PixelData = encapsulate(codestreams)
    dataset["PixelData"].VR = "OB"
    dataset.file_meta.TransferSyntaxUID = syntax
    dataset.save_as(path)
    return path


def jpeg2000(
    width: int,
    height: int,
    *,
    tile: tuple[int, int] | None = None,
    samples: int = 1,
    layers: int = 1,
    levels: int = 0,
    precincts: int | None = None,
    in_tile: bool = False,
) -> bytes:
    """A JPEG 2000 codestream (ISO/IEC 15444-1, A) without data: what a decoder allocates for it is in its headers.

    ``precincts`` is the exponent of both sides, the same for all resolutions; ``in_tile`` gives the coding once more,
    in the tile's header, and in the main header without ``layers`` and ``precincts``.
    """

    def segment(marker: int, body: bytes) -> bytes:
        return struct.pack(">BBH", 0xFF, marker, len(body) + 2) + body

    def coding(layers: int, precincts: int | None) -> bytes:
        own = b"" if precincts is None else bytes([precincts * 17]) * (levels + 1)
        return segment(0x52, struct.pack(">BBHB", bool(own), 0, layers, 0) + bytes([levels, 4, 4, 0, 1]) + own)

    sides = (width, height, 0, 0, *(tile or (width, height)), 0, 0)
    size = struct.pack(">H8IH", 0, *sides, samples) + bytes([7, 1, 1]) * samples
    asked = coding(layers, precincts)
    inner = asked if in_tile else b""
    return (
        b"\xff\x4f"
        + segment(0x51, size)
        + (coding(1, None) if in_tile else asked)
        + segment(0x5C, b"\x40" + b"\x40" * (3 * levels + 1))
        + segment(0x90, struct.pack(">HIBB", 0, 14 + len(inner), 0, 1))
        + inner
        + b"\xff\x93\xff\xd9"
    )


def ramp(height: int = 40, width: int = 60, low: int = 0, high: int = 255, dtype: type = np.uint8) -> np.ndarray:
    """A picture whose values rise from left to right."""
    return np.tile(np.linspace(low, high, width), (height, 1)).astype(dtype)
