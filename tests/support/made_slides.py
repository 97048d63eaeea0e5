"""Slides made up for tests: a picture of blobs, tiled TIFF and DICOM of it."""

from __future__ import annotations

import re
import struct
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


def save_ndpi(path: Path, picture: np.ndarray, levels: int = 3) -> list[np.ndarray]:
    """A slide as Hamamatsu's scanners write it, and what JPEG makes of its levels, RGB.

    Each level is one JPEG whose restart intervals, of 128x8 pixels, are listed; offsets have 64 bits, in two halves.
    The last picture is the macro, which is no level.
    """
    data, link, made = bytearray(b"II*\0" + bytes(8)), 4, []
    pages = [(np.ascontiguousarray(picture[:: 2**level, :: 2**level]), 20 / 2**level) for level in range(levels)]
    for pixels, magnification in [*pages, (np.full((64, 192, 3), 200, np.uint8), -1.0)]:
        options = [cv2.IMWRITE_JPEG_QUALITY, 95, cv2.IMWRITE_JPEG_RST_INTERVAL, 16]
        options += [cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444]
        jpeg = cv2.imencode(".jpg", np.ascontiguousarray(pixels[..., ::-1]), options)[1].tobytes()
        made.append(np.asarray(cv2.imdecode(np.frombuffer(jpeg, np.uint8), cv2.IMREAD_COLOR)[..., ::-1], np.uint8))
        scan = jpeg.index(b"\xff\xda") + 2
        scan += int.from_bytes(jpeg[scan : scan + 2], "big")
        starts = [scan, *(scan + mark.end() for mark in re.finditer(rb"\xff[\xd0-\xd7]", jpeg[scan:]))]
        height, width = pixels.shape[:2]
        tags: list[tuple[int, int, int, bytes]] = [
            (256, 4, 1, struct.pack("<I", width)), (257, 4, 1, struct.pack("<I", height)),
            (258, 3, 3, struct.pack("<3H", 8, 8, 8)), (259, 3, 1, struct.pack("<H", 7)),
            (262, 3, 1, struct.pack("<H", 6)), (271, 2, 10, b"Hamamatsu\0"),
            (273, 4, 1, struct.pack("<I", len(data))), (277, 3, 1, struct.pack("<H", 3)),
            (278, 4, 1, struct.pack("<I", height)), (279, 4, 1, struct.pack("<I", len(jpeg))),
            (282, 5, 1, struct.pack("<2I", 20_000, 1)), (283, 5, 1, struct.pack("<2I", 20_000, 1)),
            (296, 3, 1, struct.pack("<H", 3)), (65420, 4, 1, struct.pack("<I", 1)),
            (65421, 11, 1, struct.pack("<f", magnification)),
        ]  # fmt: skip
        if magnification > 0:
            tags.append((65426, 4, len(starts), struct.pack(f"<{len(starts)}I", *starts)))
        data += jpeg + bytes(len(jpeg) % 2)
        table = b""
        for tag, kind, count, value in tags:
            if len(value) > 4:
                data, value = data + value, struct.pack("<I", len(data))
            table += struct.pack("<HHI", tag, kind, count) + value.ljust(4, b"\0")
        data += bytes(len(data) % 2)
        data[link : link + 8] = struct.pack("<Q", len(data))
        data += struct.pack("<H", len(tags)) + table
        link = len(data)
        data += bytes(8 + 4 * len(tags))  # the next directory's offset, and the upper halves of the values
    path.write_bytes(data)
    return made[:-1]
