"""Slides made up for tests: a picture of blobs, tiled TIFF and DICOM of it."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest

SIZE = (600, 904)


def tissue_picture(size: tuple[int, int] = SIZE, seed: int = 0) -> np.ndarray:
    """(H, W, 3) RGB: blobs of a few to a few hundred pixels, so that some lie across regions."""
    noise = np.random.default_rng(seed).normal(size=(*size, 3)).astype(np.float32)
    smooth = sum(cv2.GaussianBlur(noise, (0, 0), sigma) * sigma for sigma in (6, 14))
    return np.asarray(np.clip(128 + 60 * smooth, 0, 255), np.uint8)


def save_slide(path: Path, picture: np.ndarray, levels: int = 3, **options: object) -> Path:
    tifffile = pytest.importorskip("tifffile", reason="needs tifffile (extra slide)")
    with tifffile.TiffWriter(path, bigtiff=True) as file:
        common = {"photometric": "rgb", "tile": (128, 128), "compression": "zlib", **options}
        file.write(picture, subifds=levels - 1, **common)
        for level in range(1, levels):
            file.write(np.ascontiguousarray(picture[:: 2**level, :: 2**level]), subfiletype=1, **common)
    return path


def save_dicom_level(
    path: Path, picture: np.ndarray, *, kind: str = "VOLUME", sparse: bool = False, jpeg: bool = True
) -> None:
    """One level of a DICOM slide, 128x128 a frame; ``sparse``: frames lie anywhere and one is missing."""
    pydicom = pytest.importorskip("pydicom", reason="needs pydicom (extra dicom)")
    height, width = picture.shape[:2]
    frames, places = [], []
    for y in range(0, height, 128):
        for x in range(0, width, 128):
            tile = np.full((128, 128, 3), 255, np.uint8)
            inside = picture[y : y + 128, x : x + 128]
            tile[: inside.shape[0], : inside.shape[1]] = inside
            frames.append(tile)
            places.append((x + 1, y + 1))
    if sparse:
        frames, places = frames[:0:-1], places[:0:-1]  # backwards, without the first
    dataset = pydicom.Dataset()
    dataset.SOPClassUID, dataset.SOPInstanceUID = "1.2.840.10008.5.1.4.1.1.77.1.6", pydicom.uid.generate_uid()
    dataset.SeriesInstanceUID, dataset.ImageType = "1.2.3.4", ["DERIVED", "PRIMARY", kind, "NONE"]
    dataset.Rows = dataset.Columns = 128
    dataset.TotalPixelMatrixRows, dataset.TotalPixelMatrixColumns = height, width
    dataset.NumberOfFrames, dataset.SamplesPerPixel = len(frames), 3
    dataset.BitsAllocated = dataset.BitsStored = 8
    dataset.HighBit, dataset.PixelRepresentation, dataset.PlanarConfiguration = 7, 0, 0
    measures = pydicom.Dataset()
    measures.PixelSpacing = [0.00025 * 904 / width] * 2
    shared = pydicom.Dataset()
    shared.PixelMeasuresSequence = [measures]
    dataset.SharedFunctionalGroupsSequence = [shared]
    dataset.DimensionOrganizationType = "TILED_SPARSE" if sparse else "TILED_FULL"
    if sparse:
        groups = []
        for column, row in places:
            position, group = pydicom.Dataset(), pydicom.Dataset()
            position.ColumnPositionInTotalImagePixelMatrix, position.RowPositionInTotalImagePixelMatrix = column, row
            group.PlanePositionSlideSequence = [position]
            groups.append(group)
        dataset.PerFrameFunctionalGroupsSequence = groups
    dataset.file_meta = pydicom.dataset.FileMetaDataset()
    if jpeg:
        dataset.PhotometricInterpretation = "YBR_FULL_422"
        encoded = [
            cv2.imencode(".jpg", frame[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 98])[1].tobytes() for frame in frames
        ]
        dataset.PixelData = pydicom.encaps.encapsulate([one + b"\0" * (len(one) % 2) for one in encoded])
        dataset.file_meta.TransferSyntaxUID = pydicom.uid.JPEGBaseline8Bit
    else:
        dataset.PhotometricInterpretation = "RGB"
        dataset.PixelData = np.stack(frames).tobytes()
        dataset.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    dataset.save_as(path, enforce_file_format=True)
