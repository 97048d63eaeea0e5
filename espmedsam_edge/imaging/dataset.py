"""A dataset folder on disk: images/, masks/ and split.json, read lazily and without torch. Format: ``docs/data.md``."""

from __future__ import annotations

import errno
import os
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from pydantic import BaseModel, Field, ValidationError

from espmedsam_edge.bundle import Name
from espmedsam_edge.errors import UserError, nearest
from espmedsam_edge.files import read_json, read_regular
from espmedsam_edge.imaging.decode import file_header, read_image
from espmedsam_edge.imaging.geometry import Frame
from espmedsam_edge.imaging.headers import IMAGE_SUFFIXES
from espmedsam_edge.imaging.masks import Mask, read_mask

IMAGES, MASKS, SPLIT = "images", "masks", "split.json"
SPLITS = ("train", "valid", "test")
ALL = "all"
_MAX_SPLIT_BYTES = 256 << 20


class Split(BaseModel, extra="allow", frozen=True):
    """The contents of ``split.json``; keys it does not name are kept.

    Attributes:
        origin: "official" for lists that the data's publisher or the paper made, "derived" for lists made from the ids.
        train, valid, test: image ids, which are file names without the last extension.
        modality: what the images are, where the folder's place does not say it.
        patient: id to patient, so that no patient is in two lists.
    """

    origin: str = "derived"
    train: list[str] = []
    valid: list[str] = []
    test: list[str] = []
    modality: Name | None = None
    patient: dict[str, str] = Field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Sample:
    """One image and its mask.

    Attributes:
        id: the image's id.
        image: (H, W, 3) uint8 BGR.
        mask: (H, W) uint8, 0 or 255.
        note: what had to be assumed to read the mask, or "".
    """

    id: str
    image: Frame
    mask: Mask
    note: str = ""


class DatasetFolder:
    """A folder with ``images/``, ``masks/`` and ``split.json``; file names are listed once, pixels read on demand."""

    def __init__(self, path: Path, split: Split | None) -> None:
        self.path = path
        self.split = split

    @classmethod
    def open(cls, path: str | Path) -> DatasetFolder:
        """Open a folder; ``masks/`` may be missing (unlabelled images), and ``split.json`` (then only "all" is known).

        Raises:
            UserError: no such folder, no ``images/`` in it, or a ``split.json`` that is not valid.
        """
        path = Path(path)
        if not path.is_dir():
            raise UserError(f"no dataset folder at {path}.", "Name the folder that holds images/ and masks/.")
        if not (path / IMAGES).is_dir():
            raise UserError(
                f"{path} is not a dataset folder: it has no {IMAGES}/.",
                "Convert the publisher's files first: espmedsam-edge data prepare --help",
            )
        file = path / SPLIT
        return cls(path, read_split(file) if file.exists() else None)

    @property
    def name(self) -> str:
        """The folder's own name."""
        return self.path.resolve().name

    @cached_property
    def image_files(self) -> dict[str, Path]:
        """The image file of every id, sorted by id."""
        return list_files(self.path / IMAGES)

    @cached_property
    def mask_files(self) -> dict[str, Path]:
        """The mask file of every id that has one, sorted by id."""
        folder = self.path / MASKS
        return list_files(folder) if folder.is_dir() else {}

    def files(self) -> list[Path]:
        """All that it is read from, there or not."""
        return [*self.image_files.values(), *self.mask_files.values(), self.path / SPLIT]

    def ids(self, split: str = ALL) -> list[str]:
        """The image ids of a split: "train", "valid", "test" or "all" (every image, listed in a split or not).

        Raises:
            UserError: unknown split, an empty one, or ids whose image is missing.
        """
        if split != ALL and split not in SPLITS:
            raise UserError(f"unknown split '{split}'.", nearest(split, (*SPLITS, ALL)))
        if split == ALL:
            ids = list(self.image_files)
            if not ids:
                raise UserError(f"{self.path / IMAGES} holds no image.", _SUFFIX_HINT, exit_code=1)
            return ids
        if self.split is None:
            raise UserError(
                f"{self.path} has no {SPLIT}, so its {split} images are unknown.",
                f"Have them dealt (data prepare pairs {self.path / IMAGES} {self.path / MASKS} DST), or write one "
                "(docs/data.md); evaluate alone can do without: --split all.",
            )
        ids = list(getattr(self.split, split))
        if not ids:
            raise UserError(f"the {split} list in {self.path / SPLIT} is empty.", "Choose another split.")
        missing = [id_ for id_ in ids if id_ not in self.image_files]
        if missing:
            raise UserError(
                f"{len(missing)} of {len(ids)} {split} ids of {self.path} have no image, the first: '{missing[0]}'.",
                "Copy the folder again, or run: espmedsam-edge data check",
                exit_code=1,
            )
        return ids

    def load_image(self, id_: str) -> Frame:
        """The image, (H, W, 3) uint8 BGR.

        Raises:
            UserError: no such id, or its file cannot be read.
        """
        if id_ not in self.image_files:
            raise UserError(f"{self.path / IMAGES} has no image '{id_}'.", nearest(id_, self.image_files), exit_code=1)
        return read_image(self.image_files[id_])

    def load(self, id_: str) -> Sample:
        """The image and its mask.

        Raises:
            UserError: no such id, a file is missing or cannot be read, or the mask's size is not the image's.
        """
        image = self.load_image(id_)
        file = self.mask_files.get(id_)
        if file is None:
            raise UserError(
                f"{self.image_files[id_]} has no mask in {self.path / MASKS}.",
                "Add it, or take the id out of the split.",
                exit_code=1,
            )
        mask, grey = read_mask(file)
        if mask.shape != image.shape[:2]:
            raise UserError(
                f"{file} is {mask.shape[1]}x{mask.shape[0]} pixels but its image is {image.shape[1]}x{image.shape[0]}.",
                "Find the mask that belongs to it (drawn on the photograph as stored, while its Exif tag turns it?), "
                "or take the id out of the split."
                if turned_apart(self.image_files[id_], file)
                else "Find the mask that belongs to it, or take the id out of the split.",
                exit_code=1,
            )
        notes = [f"{file.name}: {grey} grey pixels were cut at half"] if grey else []
        if turned_apart(self.image_files[id_], file):
            notes.append(f"{self.image_files[id_].name} is turned by its Exif tag, {file.name} is not")
        return Sample(id_, image, mask, "; ".join(notes))


def turned_apart(image: Path, mask: Path) -> bool:
    """Whether an Exif tag turns the image and nothing turns its mask alike: it may be drawn on the pixels as stored.

    Raises:
        UserError: a file cannot be read.
    """
    orientation = file_header(image).orientation
    return orientation != 1 and file_header(mask).orientation != orientation


def read_split(file: Path) -> Split:
    """Read and validate a ``split.json``.

    Raises:
        UserError: not JSON, not of that form, or an id listed twice.
    """
    try:
        split = _composed(Split.model_validate(read_json(read_regular(file, _MAX_SPLIT_BYTES), edited=True)))
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"]) or "the whole"
        raise UserError(f"{file}: {field}: {first['msg']}.", _SPLIT_HINT) from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is not JSON: {error}.", _SPLIT_HINT) from error
    except OSError as error:
        if error.errno == errno.EFBIG:
            raise UserError(f"{file} is over 256 MiB; no list of ids is that large.", "Name another file.") from error
        raise UserError(f"cannot read {file}: {error.strerror}.", "Check the name and its permissions.") from error
    seen: dict[str, str] = {}
    for name in SPLITS:
        for id_ in getattr(split, name):
            if id_ in seen:
                raise UserError(f"{file} lists '{id_}' in {seen[id_]} and in {name}.", "List every id once.")
            seen[id_] = name
    return split


def _composed(split: Split) -> Split:
    lists = {name: [composed(id_) for id_ in getattr(split, name)] for name in SPLITS}
    return split.model_copy(update={**lists, "patient": {composed(id_): who for id_, who in split.patient.items()}})


def composed(id_: str) -> str:
    """An id in Unicode's composed form: file systems and lists differ in how they write a letter with its accents."""
    return unicodedata.normalize("NFC", id_)


def list_files(folder: Path) -> dict[str, Path]:
    """The image files of a folder by id: the file name without its last extension (ids may hold dots and spaces).

    Hidden files and other file types are passed over.

    Raises:
        UserError: two files of one id, or the folder cannot be read.
    """
    files: dict[str, Path] = {}
    try:
        names = sorted(entry.name for entry in os.scandir(folder))
    except OSError as error:
        raise UserError(f"cannot read {folder}: {error.strerror}.", "Check that it is there.", exit_code=1) from error
    for name in names:
        stem, suffix = os.path.splitext(name)
        stem = composed(stem)
        if name.startswith(".") or suffix.lower() not in IMAGE_SUFFIXES:
            continue
        if stem in files:
            raise UserError(f"{folder} holds both {files[stem].name} and {name}.", "Keep one file an id.", exit_code=1)
        files[stem] = folder / name
    return dict(sorted(files.items()))


def infer_modality(folder: DatasetFolder, modalities: Sequence[str], where: str) -> str:
    """As ``stated_modality``, which must be there.

    Raises:
        UserError: it is none of ``modalities``, or nothing says it.
    """
    if (found := stated_modality(folder, modalities, where)) is None:
        known = ", ".join(modalities)
        raise UserError(f"cannot tell the modality of {folder.path}; {where} has {known}.", "Say it: --modality NAME.")
    return found


def stated_modality(folder: DatasetFolder, modalities: Sequence[str], where: str) -> str | None:
    """Which of a model's modalities a dataset folder is; None: nothing says it.

    The folder's ``split.json`` may say it; else the name of the folder it lies in (``.../fundus/drive``), else its own.

    Raises:
        UserError: what is stated is not among ``modalities``; ``where`` names the model in the message.
    """
    stated = folder.split.modality if folder.split else None
    path = folder.path.resolve()
    for name in (stated,) if stated else (path.parent.name, path.name):
        if name in modalities:
            return name
    if stated:
        raise UserError(
            f"{folder.path} is {stated}, and {where} has no modality '{stated}'.", nearest(stated, modalities)
        )
    return None


_SUFFIX_HINT = f"Images end in {', '.join(sorted(IMAGE_SUFFIXES))}."
_SPLIT_HINT = 'It needs "train", "valid" and "test", each a list of ids.'
