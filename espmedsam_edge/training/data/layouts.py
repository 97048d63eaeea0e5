"""The layouts in which publishers ship their data sets: which files are an image, which its masks, who the patient is.

A layout only lists files; nothing is read here. Where archives unpack into folders of folders, the ones that matter
are found by name at any depth, so either the archive's own folder or the one around it can be given.
"""

from __future__ import annotations

import csv
import io
import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from espmedsam_edge.errors import UserError, nearest
from espmedsam_edge.files import read_regular
from espmedsam_edge.imaging.headers import IMAGE_SUFFIXES

Part = Literal["train", "valid", "test"]
_MAX_TABLE_BYTES = 64 << 20


@dataclass(frozen=True)
class Item:
    """One image as published.

    Attributes:
        id: what it will be called; file names are made from it.
        image: its file.
        masks: files whose union is its mask; none for photographs and for cases without a finding.
        patient: images of one patient (or video, or slide) stay in one list.
        part: the list that the publisher put it in.
    """

    id: str
    image: Path
    masks: tuple[Path, ...] = ()
    patient: str | None = None
    part: Part | None = None


@dataclass(frozen=True)
class Layout:
    """A data set that can be converted.

    Attributes:
        name: for the command line.
        title: the data set's own name.
        modality: None for photographs.
        form: the folders and files expected, in a line.
        items: lists a source folder; raises UserError where it is not this layout.
    """

    name: str
    title: str
    modality: str | None
    form: str
    items: Callable[[Path], list[Item]]


_EXTRA_SUFFIXES = frozenset({".gif", ".ppm", ".pgm"})


def is_image(path: Path) -> bool:
    """Whether a file is a picture by its name."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] == ".gz":
        suffixes.pop()
    return bool(suffixes) and suffixes[-1] in IMAGE_SUFFIXES | _EXTRA_SUFFIXES and not path.name.startswith(".")


def _images(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_file() and is_image(path))


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]", "", name.lower())


def _folders(source: Path, *names: str) -> list[Path]:
    """Folders at any depth called one of ``names``, whatever the case, spaces, hyphens and underscores."""
    wanted = {_plain(name) for name in names}
    found = [source, *(path for path in source.rglob("*") if path.is_dir() and path.name != "__MACOSX")]
    return sorted(path for path in found if _plain(path.name) in wanted and "__MACOSX" not in path.parts)


def _folder(source: Path, form: str, *names: str) -> Path:
    found = _folders(source, *names)
    if not found:
        raise UserError(f"{source} holds no folder '{names[0]}'.", f"Expected: {form}.")
    if len(found) > 1:
        raise UserError(f"{source} holds both {found[0]} and {found[1]}.", "Name the folder of one data set.")
    return found[0]


def stem_of(path: Path) -> str:
    """A file's name without its ending."""
    name = path.name[: -len(".gz")] if path.name.lower().endswith(".gz") else path.name
    return unicodedata.normalize("NFC", Path(name).stem)


def _by_stem(folder: Path) -> dict[str, Path]:
    return {stem_of(path): path for path in _images(folder)}


_ISIC = "ISIC2018_Task1-2_{Training,Validation,Test}_Input/ and ISIC2018_Task1_{...}_GroundTruth/"


def _isic2018(source: Path) -> list[Item]:
    items: list[Item] = []
    parts: tuple[tuple[str, Part], ...] = (("Training", "train"), ("Validation", "valid"), ("Test", "test"))
    for name, part in parts:
        inputs = _folders(source, f"ISIC2018_Task1-2_{name}_Input")
        if not inputs:
            continue
        truths = _by_stem(_folder(source, _ISIC, f"ISIC2018_Task1_{name}_GroundTruth"))
        for image in _images(inputs[0]):
            mask = truths.get(f"{stem_of(image)}_segmentation")
            items.append(Item(stem_of(image), image, (mask,) if mask else (), part=part))
    return items


_MONTGOMERY = "MontgomerySet/CXR_png/ and MontgomerySet/ManualMask/{leftMask,rightMask}/"


def _montgomery(source: Path) -> list[Item]:
    left = _by_stem(_folder(source, _MONTGOMERY, "leftMask"))
    right = _by_stem(_folder(source, _MONTGOMERY, "rightMask"))
    return [
        # Both lungs or nothing: half a mask would teach that the other lung is background.
        Item(stem, image, (left[stem], right[stem]) if stem in left and stem in right else (), stem.rsplit("_", 1)[0])
        for stem, image in _by_stem(_folder(source, _MONTGOMERY, "CXR_png")).items()
    ]


_SHENZHEN = "ChinaSet_AllFiles/CXR_png/ and, from the separate archive of masks, mask/CHNCXR_*_mask.png"


def _shenzhen(source: Path) -> list[Item]:
    masks = {
        stem_of(path).removesuffix("_mask"): path
        for path in sorted(source.rglob("CHNCXR_*_mask.png"))
        if "__MACOSX" not in path.parts
    }
    if not masks:
        raise UserError(f"{source} holds no CHNCXR_*_mask.png.", f"Expected: {_SHENZHEN}.")
    images = {stem: path for stem, path in _by_stem(_folder(source, _SHENZHEN, "CXR_png")).items() if "CHNCXR" in stem}
    return [
        Item(stem, image, (masks[stem],) if stem in masks else (), stem.rsplit("_", 1)[0])
        for stem, image in images.items()
    ]


_DRIVE = "training/{images,1st_manual}/ and test/{images,1st_manual}/"


def _drive(source: Path) -> list[Item]:
    items: list[Item] = []
    parts: tuple[tuple[str, Part], ...] = (("training", "train"), ("test", "test"))
    for name, part in parts:
        for folder in _folders(source, name):
            if not (folder / "images").is_dir():
                continue
            manual = folder / "1st_manual"
            # 21_training.tif and 21_manual1.gif: the number is what they share.
            masks = {stem_of(path).split("_")[0]: path for path in _images(manual)} if manual.is_dir() else {}
            for image in _images(folder / "images"):
                mask = masks.get(stem_of(image).split("_")[0])
                items.append(Item(stem_of(image), image, (mask,) if mask else (), part=part))
    return items


_STARE = "im0001.ppm[.gz] ... and im0001.ah.ppm[.gz] ... (first observer; vk, the second, is not used), in any folders"


def _stare(source: Path) -> list[Item]:
    files = [path for path in sorted(source.rglob("im*")) if path.is_file() and is_image(path)]
    masks = {stem_of(path).removesuffix(".ah"): path for path in files if stem_of(path).endswith(".ah")}
    images = {stem_of(path): path for path in files if re.fullmatch(r"im\d{4}", stem_of(path))}
    if not masks:
        raise UserError(f"{source} holds no im*.ah.ppm.", f"Expected: {_STARE}.")
    # Only 20 of STARE's 400 pictures have vessels drawn: the others are not part of the set.
    return [Item(stem, image, (masks[stem],)) for stem, image in images.items() if stem in masks]


_CLINICDB = "Original/ and Ground Truth/, and metadata.csv (frame_id, sequence_id) where there is one"


def _clinicdb(source: Path) -> list[Item]:
    originals, truths = _folders(source, "Original"), _folders(source, "Ground Truth")
    if len(originals) > 1:  # some archives hold every picture as TIF/ and as PNG/
        originals = [path for path in originals if "PNG" in path.parts] or originals
        truths = [path for path in truths if "PNG" in path.parts] or truths
    if not originals or not truths:
        raise UserError(f"{source} holds no Original/ or no Ground Truth/.", f"Expected: {_CLINICDB}.")
    masks, sequences = _by_stem(truths[0]), _sequences(source)
    return [
        Item(stem, image, (masks[stem],) if stem in masks else (), sequences.get(stem))
        for stem, image in _by_stem(originals[0]).items()
    ]


def _sequences(source: Path) -> dict[str, str]:
    """Frame to video sequence, from metadata.csv; empty without it."""
    for file in sorted(source.rglob("metadata.csv")):
        try:
            rows = csv.DictReader(io.StringIO(read_regular(file, _MAX_TABLE_BYTES).decode("utf-8-sig"), newline=""))
            if {"frame_id", "sequence_id"} <= set(rows.fieldnames or ()):
                return {_cell(row, "frame_id"): f"sequence {_cell(row, 'sequence_id')}" for row in rows}
        except (OSError, ValueError, csv.Error) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise UserError(f"cannot read {file}: {reason}.", "Unpack the archive again.", exit_code=1) from error
    return {}


def _cell(row: dict[str, str | None], column: str) -> str:
    return (row[column] or "").strip()  # None where a row ends early


_UDIAT = "original/ and GT/"


def _udiat(source: Path) -> list[Item]:
    masks = _by_stem(_folder(source, _UDIAT, "GT"))
    return [
        Item(stem, image, (masks[stem],) if stem in masks else ())
        for stem, image in _by_stem(_folder(source, _UDIAT, "original")).items()
    ]


_BUSI = "benign/, malignant/ (and normal/), each with 'benign (1).png', 'benign (1)_mask.png', 'benign (1)_mask_1.png'"
_BUSI_MASK = re.compile(r"(.+)_mask(_\d+)?")


def _busi(source: Path) -> list[Item]:
    items: list[Item] = []
    for folder in _folders(source, "benign", "malignant", "normal"):
        files, masks = _images(folder), dict[str, list[Path]]()
        for file in files:
            if found := _BUSI_MASK.fullmatch(stem_of(file)):
                masks.setdefault(found[1], []).append(file)
        items += [
            Item(stem_of(file), file, tuple(masks.get(stem_of(file), ())))
            for file in files
            if not _BUSI_MASK.fullmatch(stem_of(file))
        ]
    return items


_DSB = "stage1_train/<id>/images/<id>.png and stage1_train/<id>/masks/*.png, one an instance"


def _dsb2018(source: Path) -> list[Item]:
    items: list[Item] = []
    for images in _folders(source, "images"):
        if (images.parent / "masks").is_dir():
            masks = tuple(_images(images.parent / "masks"))
            items += [Item(stem_of(image), image, masks) for image in _images(images)]
    return items


_TNBC = "Slide_01/ ... and GT_01/ ..., the same file names in both"


def _tnbc(source: Path) -> list[Item]:
    items: list[Item] = []
    for folder in (path for path in source.rglob("Slide_*") if path.is_dir() and "__MACOSX" not in path.parts):
        truth = folder.parent / folder.name.replace("Slide_", "GT_")
        masks = _by_stem(truth) if truth.is_dir() else {}
        items += [
            Item(stem, image, (masks[stem],) if stem in masks else (), folder.name)
            for stem, image in _by_stem(folder).items()
        ]
    return items


def _photographs(source: Path) -> list[Item]:
    files = sorted(path for path in source.rglob("*") if path.is_file() and is_image(path))
    files = [path for path in files if "__MACOSX" not in path.parts]
    stems = [stem_of(path) for path in files]
    if len(set(stems)) < len(stems):  # the same name in several folders: the folders become part of the id
        stems = ["-".join((*path.relative_to(source).parent.parts, stem_of(path))) for path in files]
    return [Item(stem, path) for stem, path in zip(stems, files, strict=True)]


LAYOUTS: dict[str, Layout] = {
    layout.name: layout
    for layout in (
        Layout("isic2018", "ISIC-2018 task 1", "dermoscopy", _ISIC, _isic2018),
        Layout("montgomery", "Montgomery County CXR Set", "xray", _MONTGOMERY, _montgomery),
        Layout("shenzhen", "Shenzhen Hospital CXR Set", "xray", _SHENZHEN, _shenzhen),
        Layout("drive", "DRIVE", "fundus", _DRIVE, _drive),
        Layout("stare", "STARE", "fundus", _STARE, _stare),
        Layout("clinicdb", "CVC-ClinicDB", "colonoscopy", _CLINICDB, _clinicdb),
        Layout("udiat", "UDIAT (BUS, data set B)", "ultrasound", _UDIAT, _udiat),
        Layout("busi", "BUSI", "ultrasound", _BUSI, _busi),
        Layout("dsb2018", "2018 Data Science Bowl, stage 1", "microscopy", _DSB, _dsb2018),
        Layout("tnbc", "TNBC", "histopathology", _TNBC, _tnbc),
        Layout("photographs", "SA-1B, or any folder of photographs", None, "images, in any folders", _photographs),
    )
}


def layout(name: str) -> Layout:
    """A layout by name.

    Raises:
        UserError: unknown; names the nearest.
    """
    if name not in LAYOUTS:
        raise UserError(f"unknown data set '{name}'.", nearest(name, LAYOUTS))
    return LAYOUTS[name]


def list_items(layout: Layout, source: Path) -> list[Item]:
    """What a source folder holds, checked.

    Raises:
        UserError: no such folder, not this layout, or two images of one id.
    """
    if not source.is_dir():
        raise UserError(f"no folder at {source}.", "Name the folder of the unpacked archive.")
    items = layout.items(source)
    if not items:
        raise UserError(f"{source} holds no images of {layout.title}.", f"Expected: {layout.form}.")
    check_unique(items)
    return sorted(items, key=lambda item: item.id)


def check_unique(items: Iterable[Item]) -> None:
    """Raise UserError where two images have one id."""
    seen: dict[str, Sequence[Path]] = {}
    for item in items:
        if item.id in seen:
            raise UserError(
                f"two images are called '{item.id}': {seen[item.id][0]} and {item.image}.", "Name one folder of them."
            )
        seen[item.id] = (item.image,)
