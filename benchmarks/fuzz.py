"""Damaged images, stacks, videos and DICOM files: reading them must neither crash, hang nor fill the memory.

    python benchmarks/fuzz.py --name fuzz-MACHINE [--inputs 5000] [--seed 0]

Small files of every kind are generated, mutated by a seeded generator (flipped bits, extreme numbers, cut, repeated,
removed and foreign pieces) and read by a process of its own as `infer` reads them. A finding is: the process dies; it
takes over ten seconds for a file; it comes to need more than 2 GB; it raises anything but a UserError, or one that
quotes the patient of a DICOM header. Findings are
listed by kind and seed, so that each can be made again.
"""

from __future__ import annotations

import io
import random
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import cv2
import fuzzing
import numpy as np
from fuzzing import PATIENT, Reader, Tally, mutated

from espmedsam_edge.runtime.sources.live import LiveOptions
from espmedsam_edge.runtime.sources.opening import open_sources


def read(name: str) -> str:
    """Read a file as `infer` does."""
    sources, failures = open_sources([name], LiveOptions())
    frames = 0
    for source in sources:
        with source:
            for _ in source:
                frames += 1
                if frames == 200:
                    return "read"
        failures += source.failures
    outcome = fuzzing.told([failure.message for failure in failures])
    return "refused" if not frames and outcome == "partly" else outcome


def seeds() -> dict[str, bytes]:
    """Whole files by kind: the key's part behind the last point is their suffix."""
    made = {**dict(_images()), **dict(_stacks()), **dict(_videos())}
    try:
        made |= dict(_dicoms())
    except ImportError:
        print("DICOM is left out: the extra dicom is not installed", file=sys.stderr)
    return made


def _picture(number: int = 0) -> np.ndarray:
    coarse = np.random.default_rng(number).integers(0, 256, (6, 8, 3), np.uint8)
    return np.asarray(cv2.resize(coarse, (96, 64), interpolation=cv2.INTER_CUBIC), np.uint8)


def _images() -> Iterator[tuple[str, bytes]]:
    colour = _picture()
    grey = colour[..., 0]
    variants: dict[str, tuple[np.ndarray, list[int]]] = {
        "colour.png": (colour, []),
        "deep.png": (grey.astype(np.uint16) * 257, []),
        "alpha.png": (np.dstack([colour, grey]), []),
        "colour.jpg": (colour, []),
        "progressive.jpg": (colour, [cv2.IMWRITE_JPEG_PROGRESSIVE, 1]),
        "grey.jpg": (grey, []),
        "colour.bmp": (colour, []),
        "deep.tiff": (colour.astype(np.uint16) * 257, []),
        "colour.webp": (colour, []),
    }
    for name, (image, parameters) in variants.items():
        done, data = cv2.imencode(Path(name).suffix, image, parameters)
        assert done, name
        yield name, data.tobytes()


def _stacks() -> Iterator[tuple[str, bytes]]:
    pages = [_picture(number) for number in range(4)]
    deep = [page[..., 0].astype(np.uint16) * 257 for page in pages]
    for name, stack in (("stack.tiff", pages), ("deep-stack.tiff", deep)):
        done, data = cv2.imencodemulti(".tiff", stack)
        assert done, name
        yield name, data.tobytes()
    if hasattr(cv2, "imencodeanimation"):
        animation = cv2.Animation()
        animation.frames, animation.durations = pages, np.array([40] * len(pages))
        for name in ("animated.png", "animated.webp"):
            done, data = cv2.imencodeanimation(Path(name).suffix, animation)
            assert done, name
            yield name, data.tobytes()
    if find_spec("tifffile") is not None:
        import tifffile

        described: dict[str, dict[str, Any]] = {
            "imagej.tif": {"imagej": True, "metadata": {"axes": "TYX", "finterval": 0.1}},
            "stack.ome.tif": {"ome": True, "metadata": {"axes": "ZYX", "PhysicalSizeZ": 2.0}},
            "big-stack.tif": {"bigtiff": True, "photometric": "minisblack", "compression": "zlib"},
        }
        for name, options in described.items():
            stream = io.BytesIO()
            tifffile.imwrite(stream, np.stack(deep), **options)
            yield name, stream.getvalue()


def _videos() -> Iterator[tuple[str, bytes]]:
    from fractions import Fraction

    from espmedsam_edge.runtime.video.writing import open_writer

    with tempfile.TemporaryDirectory() as folder:
        for name, code in (("motion-jpeg.avi", "MJPG"), ("mpeg4.mp4", "mp4v")):
            writer = cv2.VideoWriter(f"{folder}/{name}", cv2.VideoWriter.fourcc(*code), 10, (96, 64))
            for number in range(8):
                writer.write(_picture(number))
            writer.release()
        for name in ("recording.mp4", "recording.mkv"):
            recording = open_writer(Path(folder) / name, (64, 96), Fraction(10))
            for number in range(8):
                recording.write(_picture(number), number / 10)
            recording.finish()
            recording.close()
        for file in sorted(Path(folder).iterdir()):
            yield file.name, file.read_bytes()


def _dicoms() -> Iterator[tuple[str, bytes]]:
    from pydicom.encaps import encapsulate
    from pydicom.uid import (
        ExplicitVRLittleEndian,
        JPEG2000Lossless,
        JPEGBaseline8Bit,
        JPEGLosslessSV1,
        JPEGLSLossless,
        RLELossless,
    )

    colour = np.ascontiguousarray(_picture()[..., ::-1])
    grey = colour[..., 2:]
    cine = np.stack([_picture(number)[..., :1] for number in range(4)])
    yield "grey.dcm", _dicom(grey, ExplicitVRLittleEndian)
    yield "colour.dcm", _dicom(colour, ExplicitVRLittleEndian)
    yield "ybr.dcm", _dicom(colour, ExplicitVRLittleEndian, interpretation="YBR_FULL")
    yield "palette.dcm", _dicom(grey, ExplicitVRLittleEndian, interpretation="PALETTE COLOR", **_palette())
    yield "cine.dcm", _dicom(cine, ExplicitVRLittleEndian)
    jpeg = [cv2.imencode(".jpg", frame)[1].tobytes() for frame in cine]
    yield "jpeg-cine.dcm", _dicom(cine, JPEGBaseline8Bit, encapsulate(jpeg))
    jpeg = [cv2.imencode(".jpg", colour[..., ::-1])[1].tobytes()]
    yield "jpeg-ybr.dcm", _dicom(colour, JPEGBaseline8Bit, encapsulate(jpeg), "YBR_FULL_422")
    yield "jpeg-lossless.dcm", _dicom(grey, JPEGLosslessSV1, encapsulate([_lossless_jpeg(grey)]))
    yield "rle.dcm", _dicom(grey, RLELossless)
    for name, syntax in (("jpeg-ls", JPEGLSLossless), ("jpeg-2000", JPEG2000Lossless)):
        yield f"{name}.dcm", _dicom(grey, syntax)
        yield f"{name}-colour.dcm", _dicom(colour, syntax)


def _palette() -> dict[str, Any]:
    entries = np.random.default_rng(0).integers(0, 256, (3, 256), np.uint8)
    elements: dict[str, Any] = {}
    for name, channel in zip(("Red", "Green", "Blue"), entries, strict=True):
        elements[f"{name}PaletteColorLookupTableDescriptor"] = [256, 0, 8]
        elements[f"{name}PaletteColorLookupTableData"] = channel.tobytes()
    return elements


def _lossless_jpeg(grey: np.ndarray) -> bytes:
    """(H, W, 1) uint8 by GDCM, the only encoder of it: through files, as its Python interface goes."""
    import gdcm
    from pydicom import dcmread
    from pydicom.encaps import generate_frames
    from pydicom.uid import ExplicitVRLittleEndian

    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/a.dcm"
        Path(path).write_bytes(_dicom(grey, ExplicitVRLittleEndian))
        reader, change, writer = gdcm.ImageReader(), gdcm.ImageChangeTransferSyntax(), gdcm.ImageWriter()
        reader.SetFileName(path)
        done = reader.Read()
        change.SetTransferSyntax(gdcm.TransferSyntax(gdcm.TransferSyntax.JPEGLosslessProcess14_1))
        change.SetInput(reader.GetImage())
        done = done and change.Change()
        writer.SetFileName(path)
        writer.SetFile(reader.GetFile())
        writer.SetImage(change.GetOutput())
        assert done
        assert writer.Write()
        return next(generate_frames(dcmread(path).PixelData, number_of_frames=1))


def _dicom(
    pixels: np.ndarray, syntax: Any, encapsulated: bytes | None = None, interpretation: str = "", **elements: Any
) -> bytes:
    """A file of ([frames,] H, W, samples) uint8."""
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, UltrasoundMultiFrameImageStorage, generate_uid

    data = Dataset()
    data.SOPClassUID, data.SOPInstanceUID = UltrasoundMultiFrameImageStorage, generate_uid(entropy_srcs=["fuzz"])
    data.StudyInstanceUID = data.SeriesInstanceUID = generate_uid(entropy_srcs=["fuzz series"])
    data.Rows, data.Columns, data.SamplesPerPixel = pixels.shape[-3:]
    data.PhotometricInterpretation = interpretation or ("RGB" if data.SamplesPerPixel == 3 else "MONOCHROME2")
    if data.SamplesPerPixel == 3:
        data.PlanarConfiguration = 0
    if pixels.ndim == 4:
        data.NumberOfFrames, data.FrameTime = len(pixels), 40
    data.PatientName, data.PatientID, data.PatientBirthDate = f"DOE^{PATIENT}", f"{PATIENT}-1", "19700101"
    data.StudyDescription = data.SeriesDescription = data.InstitutionName = PATIENT
    data.PixelSpacing, data.WindowCenter, data.WindowWidth = [0.5, 0.5], 128, 200
    data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 8, 8, 7, 0
    for name, value in elements.items():
        setattr(data, name, value)
    data.file_meta = FileMetaDataset()
    data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian if encapsulated is None else syntax
    data.file_meta.MediaStorageSOPClassUID = data.SOPClassUID
    data.file_meta.MediaStorageSOPInstanceUID = data.SOPInstanceUID
    data.PixelData = pixels.tobytes() if encapsulated is None else encapsulated
    if encapsulated is not None:
        data["PixelData"].is_undefined_length = True
    elif syntax.is_compressed:
        data.compress(syntax, generate_instance_uid=False)
    stream = io.BytesIO()
    data.save_as(stream, enforce_file_format=True)
    return stream.getvalue()


def fuzz(inputs: int, seed: int, tell: Callable[[str], None] = print) -> Tally:
    """Read that many mutated files."""
    whole = seeds()
    with tempfile.TemporaryDirectory() as folder:

        def made(kind: str, chance: random.Random) -> str:
            path = Path(folder) / f"mutated{Path(kind).suffix}"
            path.write_bytes(mutated(whole[kind], chance.randrange(1 << 30)))
            return str(path)

        kinds = {kind: partial(made, kind) for kind in sorted(whole)}
        return fuzzing.count(Reader("fuzz"), kinds, inputs, seed, tell)


if __name__ == "__main__":
    fuzzing.main(__doc__, "fuzz", lambda inputs, seed: fuzz(inputs, seed).to_dict())
