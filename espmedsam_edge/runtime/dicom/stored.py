"""DICOM pixels as they are stored, uncompressed or as codestreams, and which colour models are read at all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from espmedsam_edge.errors import UserError
from espmedsam_edge.runtime.dicom.extent import start_of

_COLOURS = frozenset({"RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT"})
_OTHER_COLOURS = frozenset({"YBR_PARTIAL_422", "YBR_PARTIAL_420", "HSV", "ARGB", "CMYK"})


def check_colours(path: Path, dataset: Any) -> None:
    """Refuse colour models that nothing here turns into RGB; of JPEG and its kin the decoders do it."""
    syntax = dataset.file_meta.TransferSyntaxUID
    stored = str(dataset.get("PhotometricInterpretation", ""))
    named = stored if stored in _OTHER_COLOURS else "of an unknown model"
    if int(dataset.get("SamplesPerPixel") or 1) > 1 and stored not in _COLOURS:
        if syntax.is_compressed and syntax.name.startswith("JPEG") and stored.startswith("YBR_PARTIAL"):
            return
        raise UserError(
            f"cannot read {path}: its colours are {named}.", "Convert it to RGB, or export it anew.", exit_code=1
        )


def plain_frames(path: Path, dataset: Any) -> Iterator[Any]:
    """Uncompressed frames."""
    from pydicom import dcmread  # noqa: TID251 (to find the pixels, after the header was checked)
    from pydicom.pixels import iter_pixels

    high, stored = int(dataset.get("HighBit") or 0), int(dataset.get("BitsStored") or 0)
    options: dict[str, Any] = {}
    if high + 1 > stored:  # else pydicom cuts off what lies above
        options["correct_unused_bits"] = False
    if dataset.get("PhotometricInterpretation") == "YBR_FULL_422" and _pixel_length(path, dataset) >= _samples(dataset):
        options["photometric_interpretation"] = "YBR_FULL"  # nothing was left out
    with path.open("rb") as stream:
        bare = start_of(stream) == 0
    if not bare and "TransferSyntaxUID" in dcmread(path, stop_before_pixels=True, specific_tags=[]).file_meta:
        yield from iter_pixels(path, **options)
        return
    whole = dcmread(path, force=True)
    whole.file_meta.TransferSyntaxUID = dataset.file_meta.TransferSyntaxUID
    yield from iter_pixels(whole, **options)


def compressed_frames(path: Path, dataset: Any, frames: int) -> Iterator[bytes]:
    """The codestreams of so many frames."""
    from pydicom.encaps import generate_frames

    tables = None
    if "ExtendedOffsetTable" in dataset:
        tables = dataset.ExtendedOffsetTable, dataset.ExtendedOffsetTableLengths
    with _at_compressed_pixels(path) as stream:
        yield from generate_frames(stream, number_of_frames=frames, extended_offsets=tables)


def frame_table(path: Path, dataset: Any, frames: int) -> list[tuple[int, int]]:
    """Where in the file the fragments of each frame start, and how many bytes they take with their marks.

    Raises:
        UserError: the file does not tell, or what it tells cannot be.
    """
    from pydicom.encaps import parse_basic_offsets, parse_fragments

    size = path.stat().st_size
    with _at_compressed_pixels(path) as stream:
        basic = parse_basic_offsets(stream)
        start = stream.tell()
        if "ExtendedOffsetTable" in dataset:
            basic = list(np.frombuffer(dataset.ExtendedOffsetTable, "<u8").tolist())
        elif not basic:
            fragments, places = parse_fragments(stream)
            if fragments != frames and frames != 1:
                raise _without_table(path)
            basic = [place - start for place in places[: 1 if frames == 1 else None]]
    places = [*(start + offset for offset in basic), size]
    if len(basic) != frames or any(not after - before >= 0 for before, after in pairwise(places)):
        raise _without_table(path)
    return [(before, after - before) for before, after in pairwise(places)]


def _without_table(path: Path) -> UserError:
    return UserError(
        f"cannot read {path}: no table tells where its frames start, or a wrong one.",
        "Export it anew from the archive.",
        exit_code=1,
    )


def frames_there(path: Path, dataset: Any) -> int:
    """How many whole frames a file holds, whatever its header says; 0 where that cannot be told without decoding."""
    from pydicom.encaps import parse_basic_offsets

    if not dataset.file_meta.TransferSyntaxUID.is_compressed:
        length, frames = _pixel_length(path, dataset), max(1, int(dataset.get("NumberOfFrames") or 1))
        stated = _samples(dataset) * int(dataset.BitsAllocated) // 8
        if dataset.get("PhotometricInterpretation") == "YBR_FULL_422" and length < stated:
            stated = stated * 2 // 3
        return min(length, path.stat().st_size) * frames // stated
    if "ExtendedOffsetTable" in dataset:
        return len(dataset.ExtendedOffsetTable) // 8
    with _at_compressed_pixels(path) as stream:
        return len(parse_basic_offsets(stream))


@contextmanager
def _at_compressed_pixels(path: Path) -> Iterator[BinaryIO]:
    from pydicom import dcmread  # noqa: TID251 (to find the pixels, after the header was checked)

    with path.open("rb") as stream:
        dcmread(stream, stop_before_pixels=True, specific_tags=[])
        stream.seek(12, 1)  # tag, VR and length: compressed files have explicit VRs
        yield stream


def _pixel_length(path: Path, dataset: Any) -> int:
    """The bytes of uncompressed pixels, as their element states them."""
    from pydicom import dcmread  # noqa: TID251 (to find the pixels, after the header was checked)

    syntax = dataset.file_meta.TransferSyntaxUID
    with path.open("rb") as stream:
        dcmread(stream, stop_before_pixels=True, specific_tags=[], force=True)
        stream.seek(4 if syntax.is_implicit_VR else 8, 1)
        return int.from_bytes(stream.read(4), "little" if syntax.is_little_endian else "big")


def _samples(dataset: Any) -> int:
    sides = (dataset.get(name) or 1 for name in ("NumberOfFrames", "Rows", "Columns", "SamplesPerPixel"))
    return prod(int(side) for side in sides)
