"""Small DICOM files for tests, made up: the patient in them is nobody."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

PATIENT = {"PatientName": "Doe^Jane", "PatientID": "ID-4711", "PatientBirthDate": "19700102", "StudyDate": "20240506"}
"""What no output but a segmentation may hold."""

ULTRASOUND, ULTRASOUND_CINE = "1.2.840.10008.5.1.4.1.1.6.1", "1.2.840.10008.5.1.4.1.1.3.1"
CT, SECONDARY_CINE = "1.2.840.10008.5.1.4.1.1.2", "1.2.840.10008.5.1.4.1.1.7.2"
ENHANCED_CT = "1.2.840.10008.5.1.4.1.1.2.1"


def save_dicom(
    path: Path,
    size: tuple[int, int] = (48, 64),
    frames: int | None = None,
    sop_class: str | None = None,
    **values: object,
) -> Dataset:
    """An uncompressed grey image, or with ``frames`` a cine; further attributes by keyword, None leaves one out."""
    random = np.random.default_rng(0)
    data = Dataset()
    data.SOPClassUID = sop_class or (ULTRASOUND if frames is None else ULTRASOUND_CINE)
    data.SOPInstanceUID, data.StudyInstanceUID, data.SeriesInstanceUID = (generate_uid() for _ in range(3))
    data.Modality, data.StudyTime, data.AccessionNumber, data.StudyID = "US", "101112", "A1", "S1"
    data.PatientSex, data.ReferringPhysicianName = "O", "Roe^Richard"
    for keyword, value in PATIENT.items():
        setattr(data, keyword, value)
    data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
    data.Rows, data.Columns = size
    data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 8, 8, 7, 0
    if frames is not None:
        data.NumberOfFrames, data.FrameTime = frames, 40
    data.PixelData = random.integers(0, 256, (frames or 1) * size[0] * size[1], np.uint8).tobytes()
    for keyword, given in values.items():
        if given is None:
            delattr(data, keyword)
        else:
            setattr(data, keyword, given)
    data.file_meta = FileMetaDataset()
    data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data.file_meta.MediaStorageSOPClassUID = data.SOPClassUID
    data.file_meta.MediaStorageSOPInstanceUID = data.SOPInstanceUID
    path.parent.mkdir(parents=True, exist_ok=True)
    data.save_as(path, enforce_file_format=True)
    return data


def save_enhanced(path: Path, places: Sequence[int], size: tuple[int, int] = (48, 64)) -> Dataset:
    """An enhanced CT of a frame at each of these places along the patient, in that order."""
    measures = _item(PixelSpacing=[0.5, 0.5], SliceThickness=2)
    orientation = _item(ImageOrientationPatient=[1, 0, 0, 0, 1, 0])
    frames = [
        _item(
            PlanePositionSequence=[_item(ImagePositionPatient=[0, 0, place])],
            FrameContentSequence=[_item(StackID="1", InStackPositionNumber=number, DimensionIndexValues=[1, number])],
        )
        for number, place in enumerate(places, 1)
    ]
    return save_dicom(
        path,
        size,
        len(places),
        ENHANCED_CT,
        FrameOfReferenceUID="1.2.3",
        SharedFunctionalGroupsSequence=[
            _item(PixelMeasuresSequence=[measures], PlaneOrientationSequence=[orientation])
        ],
        PerFrameFunctionalGroupsSequence=frames,
        DimensionOrganizationSequence=[_item(DimensionOrganizationUID="1.2.3.4")],
    )


def _item(**values: object) -> Dataset:
    made = Dataset()
    for keyword, value in values.items():
        setattr(made, keyword, value)
    return made
