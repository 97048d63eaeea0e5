"""Damaged images, videos and DICOM files: reading them must neither crash, hang nor fill the memory.

    python benchmarks/fuzz.py --name fuzz-MACHINE [--mutations 5000] [--seed 0]

Small files of every kind are generated, mutated by a seeded generator (flipped bits, extreme numbers, cut, repeated,
removed and foreign pieces) and read by a process of its own as `infer` reads them. A finding is: the process dies; it
takes over ten seconds for a file; it comes to need more than 2 GB; it raises anything but a UserError, or one that
quotes the patient of a DICOM header. Findings are
listed by kind and seed, so that each can be made again.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from espmedsam_edge.files import atomic_write
from espmedsam_edge.machine.environment import collect_environment

RESULTS = Path(__file__).parent / "results"
SECONDS = 10.0
MEMORY = 2 << 30
_PIXELS = b"\xe0\x7f\x10\x00"  # the tag of pixels in DICOM; with it 32 bytes at most stand before the first frame

_READER = """
import resource, sys, traceback
from pathlib import Path
from espmedsam_edge.errors import UserError
from espmedsam_edge.machine.environment import process_memory
from espmedsam_edge.runtime.sources.live import LiveOptions
from espmedsam_edge.runtime.sources.opening import open_sources

def read(name):
    sources, failures = open_sources([name], LiveOptions())
    frames = 0
    for source in sources:
        with source:
            for frame in source:
                frames += 1
                if frames == 200:
                    return "read"
        failures += source.failures
    return "read" if frames and not failures else "partly" if frames else "refused"

print("ready", flush=True)
for line in sys.stdin:
    try:
        outcome = read(line.rstrip("\\n"))
    except UserError as error:
        outcome = "quotes the header" if "JANE" in str(error) else "refused"
    except BaseException as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        text = " ".join(str(error).split())[:150]
        outcome = f"{type(error).__name__}: {text} ({Path(place.filename).name}, {place.name})"
    own = process_memory()[1] or 0  # not getrusage's, which begins with what the parent held when it forked
    children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    print(max(own, children), outcome, flush=True)
"""


@dataclass(frozen=True)
class Finding:
    """What went wrong, and how to make the file again: ``mutated(seeds()[kind], seed)``."""

    kind: str
    seed: int
    what: str


class Reader:
    """A process that reads files, started again after each that kills it.

    Args:
        script: says "ready", then for each line with a path the most memory needed so far, a space and the outcome.
    """

    def __init__(self, script: str = _READER) -> None:
        self._script = script
        self._process: subprocess.Popen[str] | None = None

    def read(self, path: Path) -> tuple[str, int]:
        """Read a file: the outcome, and the most bytes that the process has needed so far."""
        process = self._running()
        assert process.stdin is not None
        assert process.stdout is not None
        hung = threading.Event()

        def stop() -> None:
            hung.set()
            process.kill()

        timer = threading.Timer(SECONDS, stop)
        timer.start()
        try:
            process.stdin.write(f"{path}\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except BrokenPipeError:
            line = ""
        finally:
            timer.cancel()
        if line:
            memory, _, outcome = line.rstrip("\n").partition(" ")
            return outcome, int(memory)
        self.close()
        return (f"hangs over {SECONDS:g} s" if hung.is_set() else f"dies with code {process.returncode}"), 0

    def _running(self) -> subprocess.Popen[str]:
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, "-c", self._script],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
            assert self._process.stdout is not None
            self._process.stdout.readline()  # ready: starting does not count
        return self._process

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None


def mutated(content: bytes, seed: int) -> bytes:
    """One to four random changes; the same for the same seed.

    Of a DICOM file every second time in its pixels only: decoders do not see much of a file with a damaged header.
    """
    chance = random.Random(seed)
    start = content.find(_PIXELS) + 32 if _PIXELS in content and chance.random() < 0.5 else 0
    data = bytearray(content[start:])
    changes: list[Callable[[bytearray, random.Random], None]] = [_flip, _extreme, _cut, _repeat, _remove, _foreign]
    if chance.random() < 0.1:
        changes.append(_very_many)
    for _ in range(chance.randint(1, 4)):
        if data:
            chance.choice(changes)(data, chance)
    return content[:start] + bytes(data)


def _place(data: bytearray, chance: random.Random) -> int:
    """Half of the time in the first 512 bytes, where headers are."""
    return chance.randrange(min(len(data), 512) if chance.random() < 0.5 else len(data))


def _flip(data: bytearray, chance: random.Random) -> None:
    for _ in range(chance.randint(1, 16)):
        data[_place(data, chance)] ^= 1 << chance.randrange(8)


def _extreme(data: bytearray, chance: random.Random) -> None:
    place, size = _place(data, chance), chance.choice((1, 2, 4, 8))
    value = chance.choice((0, 1, (1 << (8 * size - 1)) - 1, 1 << (8 * size - 1), (1 << (8 * size)) - 1))
    data[place : place + size] = value.to_bytes(size, chance.choice(("big", "little")))


def _cut(data: bytearray, chance: random.Random) -> None:
    del data[_place(data, chance) :]


def _repeat(data: bytearray, chance: random.Random) -> None:
    place = _place(data, chance)
    piece = data[place : place + chance.randint(1, 256)]
    data[place:place] = piece * chance.randint(1, 20)


def _very_many(data: bytearray, chance: random.Random) -> None:
    """A small piece, a hundred thousand times: an element, an item, a chunk, a segment."""
    place = _place(data, chance)
    data[place:place] = bytes(data[place : place + chance.randint(2, 24)]) * 100_000


def _remove(data: bytearray, chance: random.Random) -> None:
    place = _place(data, chance)
    del data[place : place + chance.randint(1, 64)]


def _foreign(data: bytearray, chance: random.Random) -> None:
    place = _place(data, chance)
    piece = chance.randbytes(chance.randint(1, 64))
    data[place : place + len(piece)] = piece


def seeds() -> dict[str, bytes]:
    """Whole files by kind: the key's part behind the last point is their suffix."""
    made = {**dict(_images()), **dict(_videos())}
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
    data.PatientName, data.PatientID, data.PatientBirthDate = "DOE^JANE", "JANE-1", "19700101"
    data.StudyDescription = data.SeriesDescription = data.InstitutionName = "JANE"
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


def fuzz(mutations: int, seed: int, tell: Callable[[str], None] = print) -> tuple[Counter[str], list[Finding], int]:
    """Read that many mutated files: how often which outcome, the findings, and the most memory needed.

    Outcomes are "read" (all of it), "partly" (some of it, with a line about the rest) and "refused" (one line).
    """
    whole = seeds()
    kinds = sorted(whole)
    outcomes: Counter[str] = Counter()
    findings: list[Finding] = []
    most = 0
    reader = Reader()
    with tempfile.TemporaryDirectory() as folder:
        for number in range(mutations):
            kind = kinds[number % len(kinds)]
            path = Path(folder) / f"mutated{Path(kind).suffix}"
            path.write_bytes(mutated(whole[kind], seed + number))
            outcome, memory = reader.read(path)
            if outcome not in ("read", "partly", "refused"):
                findings.append(Finding(kind, seed + number, outcome))
                outcome = "finding"
            elif memory > MEMORY:
                findings.append(Finding(kind, seed + number, f"needs {memory / 1e9:.1f} GB"))
                outcome = "finding"
                reader.close()  # the most is remembered: a fresh process for what follows
            if outcome == "finding":
                tell(str(findings[-1]))
            outcomes[outcome] += 1
            most = max(most, memory)
    reader.close()
    return outcomes, findings, most


def main() -> None:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--name", required=True, help="of the file in benchmarks/results/, without its ending")
    parser.add_argument("--mutations", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    environment = collect_environment()
    outcomes, findings, most = fuzz(arguments.mutations, arguments.seed)
    result = {
        "schema": 1,
        "kind": "fuzz",
        "environment": environment,
        "mutations": arguments.mutations,
        "seed": arguments.seed,
        "kinds": sorted(seeds()),
        "outcomes": dict(outcomes),
        "most_memory_bytes": most,
        "findings": [vars(finding) for finding in findings],
    }
    atomic_write(RESULTS / f"{arguments.name}.json", json.dumps(result, indent=1) + "\n")
    print(json.dumps({key: value for key, value in result.items() if key != "environment"}, indent=1))


if __name__ == "__main__":
    main()
