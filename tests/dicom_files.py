"""Small DICOM files for tests, written by pydicom: what each shows, and its dummy patient, are known."""

from __future__ import annotations

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


def ramp(height: int = 40, width: int = 60, low: int = 0, high: int = 255, dtype: type = np.uint8) -> np.ndarray:
    """A picture whose values rise from left to right."""
    return np.tile(np.linspace(low, high, width), (height, 1)).astype(dtype)
