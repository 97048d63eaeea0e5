"""Which images calibrate and which are held out for the gate: found, sampled evenly, hashed, read one at a time."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import TypeVar

from espmedsam_edge.errors import UserError
from espmedsam_edge.files import sha256_file
from espmedsam_edge.imaging.dataset import IMAGES, SPLIT, DatasetFolder, Split, composed, list_files
from espmedsam_edge.imaging.geometry import Frame
from espmedsam_edge.runtime.dicom.reading import is_dicom
from espmedsam_edge.runtime.sources.files import DicomCine, ImageFiles, VideoFile
from espmedsam_edge.runtime.sources.opening import open_sources
from espmedsam_edge.runtime.sources.source import Failure, Source

DEFAULT_IMAGES = 128
"""Enough for ranges to settle; more cost time in proportion."""

DEFAULT_HELD_OUT = 16

FEW_IMAGES = 32
"""Fewer calibration images than this give a warning: a rare bright or dark image may be missing."""

_Item = TypeVar("_Item")


@dataclass(frozen=True)
class Picture:
    """One image file, DICOM among them, or one frame of a video or a DICOM cine loop.

    Attributes:
        path: the file.
        index: the frame's number in a video; None for a file of one picture.
        mask: the file of its ground-truth mask, where there is one.
    """

    path: Path
    index: int | None = None
    mask: Path | None = None


@dataclass
class CalibrationImages:
    """The pictures to measure ranges on, those held out for the gate, and what could not be read so far."""

    calibration: list[Picture]
    held_out: list[Picture]
    failures: list[Failure] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def content_hash(self) -> str:
        """Hex SHA-256 over the content of the calibration pictures; names and order do not count."""
        digests: dict[Path, str] = {}
        for picture in self.calibration:
            if picture.path not in digests:
                try:
                    digests[picture.path] = sha256_file(picture.path)
                except OSError as error:
                    reason = error.strerror or str(error)
                    raise UserError(f"cannot read {picture.path}: {reason}.", "Check it.", exit_code=1) from error
        parts = sorted(f"{digests[picture.path]}:{picture.index}" for picture in self.calibration)
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def read(self, pictures: Sequence[Picture]) -> Iterator[tuple[Picture, Frame]]:
        """Decode pictures one at a time, as the runtime does; what cannot be read goes to ``failures``.

        Args:
            pictures: those of one video together and in its order.

        Returns:
            Each with its frame, (H, W, 3) uint8 BGR.
        """
        for path, group in groupby(pictures, key=lambda picture: picture.path):
            wanted = {picture.index or 0: picture for picture in group}
            source = _source(next(iter(wanted.values())))
            try:
                with source:
                    for frame in source:
                        if frame.index in wanted:
                            yield wanted.pop(frame.index), frame.image
                        if not wanted:
                            break
                found = source.failures
            except UserError as error:
                found = [Failure(source.name, str(error))]
            if wanted and not found:
                found = [Failure(source.name, f"{path} ended before frame {next(iter(wanted)) + 1}. Copy it again.")]
            self.failures += [failure for failure in found if failure not in self.failures]


def _source(picture: Picture) -> Source:
    """What reads a picture: its file's own source, as ``infer`` would open it."""
    if picture.index is None:
        return ImageFiles([picture.path])
    return DicomCine(picture.path) if is_dicom(picture.path) else VideoFile(picture.path)


def find_images(
    specifications: Sequence[str],
    *,
    count: int = DEFAULT_IMAGES,
    held_out: int = DEFAULT_HELD_OUT,
    masks: Path | None = None,
) -> CalibrationImages:
    """Find and divide the images of files, DICOM among them, folders, globs, videos and dataset folders.

    Of a dataset folder with a split, the train list calibrates and the valid list is held out (its masks/ are the
    ground truth); its test list is never used. Of everything else, and of a train list without a valid list, evenly
    spaced pictures are held out and no picture is in both parts.

    Args:
        specifications: what the user named.
        count: at most so many calibrate, sampled evenly over all there are.
        held_out: at most so many are held out.
        masks: a folder of masks, one a picture, of the picture's name.

    Raises:
        UserError: no image at all, or a dataset folder or folder of masks that cannot be used.
    """
    if count < 1 or held_out < 1:
        raise UserError(f"{min(count, held_out)} images asked for.", "Use at least 1.")
    train: list[Picture] = []
    valid: list[Picture] = []
    others: list[str] = []
    for specification in specifications:
        if (Path(specification) / IMAGES).is_dir():
            first, second = _dataset_pictures(specification)
            train += first
            valid += second
        else:
            others.append(specification)
    sources, failures = open_sources(others)
    loose: list[Picture] = []
    for source in sources:
        try:
            loose += _frames(source) if source.kind == "video" else _files(source)
        except UserError as error:
            failures.append(Failure(source.name, str(error)))
        failures += source.failures
    if not valid:  # nothing says which to hold out, so the pictures of all sources are divided
        train, loose = [], train + loose
    spare = min(held_out, max(1, len(loose) // 5)) if len(loose) > 1 else 0
    pool = evenly(loose, count + spare)
    chosen = set(evenly(range(len(pool)), spare))
    images = CalibrationImages(
        calibration=evenly(train + [p for i, p in enumerate(pool) if i not in chosen], count),
        held_out=evenly(valid + [p for i, p in enumerate(pool) if i in chosen], held_out),
        failures=failures,
    )
    if not images.calibration:
        reason = f": {failures[0].message}" if failures else "."
        raise UserError(
            f"no image to calibrate with{reason}",
            "Give images of the kind that the device will see; never random ones.",
        )
    if not images.held_out:
        images.held_out = list(images.calibration)
        images.notes.append("There is a single image, so the gate runs on the one that calibrated: it proves little.")
    if len(images.calibration) < FEW_IMAGES:
        images.notes.append(
            f"Only {len(images.calibration)} images calibrate; give at least {FEW_IMAGES}, as varied as in use."
        )
    if masks is not None:
        _attach_masks(images, masks)
    return images


def evenly(items: Sequence[_Item], count: int) -> list[_Item]:
    """At most ``count`` items, evenly spaced, in order."""
    if len(items) <= count:
        return list(items)
    return [items[int((position + 0.5) * len(items) / count)] for position in range(count)]


def _dataset_pictures(specification: str) -> tuple[list[Picture], list[Picture]]:
    """The pictures that calibrate and those held out (none: the first are to be divided); never the test list's."""
    folder = DatasetFolder.open(specification)

    def pictures(split: str) -> list[Picture]:
        return [Picture(folder.image_files[id_], None, folder.mask_files.get(id_)) for id_ in folder.ids(split)]

    split = folder.split or Split()
    if split.train and split.valid:
        return pictures("train"), pictures("valid")
    if split.train or split.valid:
        return pictures("train" if split.train else "valid"), []
    if split.test:
        raise UserError(
            f"{folder.path / SPLIT} lists test images only.",
            f"Give others; to calibrate on these, name {folder.path / IMAGES}.",
        )
    return pictures("all"), []


def _files(source: Source) -> list[Picture]:
    for file in source.files:
        if not file.is_file():
            raise UserError(f"no file {file}.", "Check the name.", exit_code=1)
    return [Picture(file) for file in source.files]


def _frames(source: Source) -> list[Picture]:
    """A video's frames, counted by decoding it: the length that a file announces is an estimate."""
    with source:
        count = sum(1 for _ in source)
    return [Picture(source.files[0], index) for index in range(count)]


def _attach_masks(images: CalibrationImages, folder: Path) -> None:
    if not folder.is_dir():
        raise UserError(f"no folder of masks at {folder}.", "Name a folder of masks called like their images.")
    files = list_files(folder)

    def with_mask(picture: Picture) -> Picture:
        mask = files.get(composed(picture.path.stem)) if picture.index is None else None
        return Picture(picture.path, picture.index, mask or picture.mask)

    images.held_out = [with_mask(picture) for picture in images.held_out]
    if not any(picture.mask for picture in images.held_out):
        raise UserError(
            f"no mask in {folder} is named like one of the {len(images.held_out)} held-out images.",
            f"The first wants '{images.held_out[0].path.stem}' and an image's ending.",
        )
