"""Annotations of other tools as something that ``prepare`` converts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection
from pathlib import Path

from espmedsam_edge.annotations.coco_reading import read_coco
from espmedsam_edge.annotations.labelme_reading import read_labelme
from espmedsam_edge.annotations.reading import AnnotationSet
from espmedsam_edge.annotations.yolo_reading import read_yolo
from espmedsam_edge.errors import UserError
from espmedsam_edge.imaging.dataset import composed
from espmedsam_edge.imaging.masks import Mask
from espmedsam_edge.training.data.layouts import Item, check_unique
from espmedsam_edge.training.data.pairs import patients_of
from espmedsam_edge.training.data.prepare import Found

READERS: dict[str, tuple[str, Callable[[Path, Path, Collection[str]], AnnotationSet]]] = {
    "coco": ("a JSON file, or a folder with some, and its pictures", read_coco),
    "labelme": ("a folder with JSON files and their pictures", read_labelme),
    "yolo": ("images/ and labels/, and data.yaml", read_yolo),
}
"""By name: what SRC is, and who reads it."""


def find_annotated(
    form: str,
    source: Path,
    *,
    images: Path | None = None,
    labels: Collection[str] = (),
    patient: str | None = None,
    modality: str | None = None,
    seed: int = 0,
) -> Found:
    """Read annotations with their pictures.

    Args:
        form: a name of ``READERS``.
        source: what it says there.
        images: the folder of the pictures; None: the source's.
        labels: those that are the target; empty: all.
        patient, modality, seed: as ``pairs.find_pairs``.

    Raises:
        UserError: nothing of that form is there.
    """
    expected, read = READERS[form]
    if not source.exists() or (form != "coco" and not source.is_dir()):
        raise UserError(f"there is no {source}.", f"Expected: {expected}.")
    folder = images or (source.parent if source.is_file() else source)
    if not folder.is_dir():
        raise UserError(f"no folder at {folder}.", "Name the folder of the pictures: --images FOLDER")
    found = read(source, folder, labels)
    problems = list(found.problems)
    stems = Counter(composed(one.image.stem) for one in found.pictures)
    patient_of = patients_of(patient)
    items, by_id = list[Item](), {}
    listed = all(one.part is not None for one in found.pictures)  # some names alone say nothing
    for one in sorted(found.pictures, key=lambda one: one.image):
        name = composed(one.image.stem)
        if stems[name] > 1:  # the same name in several folders: the folders become part of the id
            name = "-".join((*one.image.relative_to(folder).parent.parts, name))
        items.append(
            Item(name, one.image, (source,) if one.objects else (), patient_of(name), one.part if listed else None)
        )
        by_id[name] = one
    check_unique(items)
    if not items:
        raise UserError(f"{source} names no picture that is in {folder}.", _first(problems), exit_code=1)

    def mask_of(item: Item, size: tuple[int, int]) -> Mask:
        return by_id[item.id].mask(size, problems)

    return Found(
        items,
        source,
        f"{form} annotations",
        f"Expected: {expected}.",
        modality,
        mask_of=mask_of,
        failures=problems,
        seed=seed,
    )


def _first(problems: list[str]) -> str:
    return problems[0] if problems else "Name the folder of the pictures: --images FOLDER"
