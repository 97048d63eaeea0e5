"""COCO JSON, read: as CVAT, Roboflow, Label Studio and this program write it."""

from __future__ import annotations

from collections.abc import Collection
from functools import partial
from pathlib import Path
from typing import Any

from espmedsam_edge.annotations.drawing import Mask, by_centres, checked
from espmedsam_edge.annotations.reading import Annotated, AnnotationSet, Pictures, check_wanted, part_of, whole
from espmedsam_edge.annotations.rle import draw_rle
from espmedsam_edge.errors import UserError

Lists = dict[str, list[dict[str, Any]]]


def read_coco(source: Path, images: Path, labels: Collection[str]) -> AnnotationSet:
    """Read a file, or all below a folder; lists are told by the files' and folders' names (train, val, test).

    Args:
        source: a JSON file, or a folder with some.
        images: the folder of the pictures.
        labels: the categories that are the target; empty: all.

    Raises:
        UserError: there is no such file, or no object of such a category.
    """
    files = [source] if source.is_file() else sorted(path for path in source.rglob("*.json") if path.is_file())
    if not files:
        raise UserError(f"{source} holds no JSON file.", "Name the file of the annotations, or its folder.")
    found, pictures = AnnotationSet(), Pictures(images)
    known: list[str] = []
    taken: dict[Path, Annotated] = {}
    for file in files:
        try:
            value = _document(found.load(file))
        except ValueError as error:
            found.tell(f"cannot read {file}: {error}.")
            continue
        below = file.parent if file == source else source
        one = _File(file, value, set(labels), found)
        known += one.categories.values()
        for annotated in one.pictures(pictures):
            annotated.part = part_of(file, below)
            if annotated.image in taken:
                found.tell(f"{file}: {annotated.image.name} is there twice; the second is left out.")
            else:
                taken[annotated.image] = annotated
    check_wanted(labels, known)
    found.pictures = list(taken.values())
    return found


def _document(value: Any) -> Lists:
    """Its three lists, of what are objects in them."""
    if not isinstance(value, dict) or not all(isinstance(value.get(name), list) for name in ("images", "annotations")):
        raise ValueError("it has no lists 'images' and 'annotations', as COCO's have")
    kinds = value.get("categories")
    lists = {name: value[name] for name in ("images", "annotations")} | {
        "categories": kinds if isinstance(kinds, list) else []
    }
    return {name: [entry for entry in entries if isinstance(entry, dict)] for name, entries in lists.items()}


class _File:
    """One document."""

    def __init__(self, file: Path, value: Lists, labels: set[str], found: AnnotationSet) -> None:
        self._file, self._value, self._labels, self._found = file, value, labels, found
        self.categories = {_key(entry.get("id")): str(entry.get("name", ""))[:200] for entry in value["categories"]}

    def pictures(self, pictures: Pictures) -> list[Annotated]:
        """Those that are there, with their objects."""
        by_id: dict[str, Annotated | None] = {}
        for entry in self._value["images"]:
            key = _key(entry.get("id"))
            if key in by_id:
                self._tell(f"two pictures have the id {key}; the second is left out.")
                continue
            by_id[key] = None
            try:
                image = pictures.find(str(entry.get("file_name", "")), self._file)
            except ValueError as error:
                self._tell(f"{error}; its objects are left out.")
                continue
            height, width = whole(entry.get("height")), whole(entry.get("width"))
            by_id[key] = Annotated(image, size=(height, width) if height and width else None)
        self._add_objects(by_id)
        return [one for one in by_id.values() if one is not None]

    def _add_objects(self, by_id: dict[str, Annotated | None]) -> None:
        seen: set[str] = set()
        strangers: dict[str, int] = {}
        for number, entry in enumerate(self._value["annotations"], 1):
            key, picture = _key(entry.get("id", f"number {number}")), _key(entry.get("image_id"))
            if self._labels and self.categories.get(_key(entry.get("category_id"))) not in self._labels:
                continue
            if key in seen:
                self._tell(f"two objects have the id {key}; the second is left out.")
                continue
            seen.add(key)
            if picture not in by_id:
                strangers[picture] = strangers.get(picture, 0) + 1
                continue
            annotated = by_id[picture]
            if annotated is not None:
                annotated.objects.append((f"object {key}", partial(_draw, entry.get("segmentation"))))
        for picture, count in strangers.items():
            self._tell(f"{count} objects are of a picture {picture} that is not listed; they are left out.")

    def _tell(self, line: str) -> None:
        self._found.tell(f"{self._file}: {line}")


def _key(value: Any) -> str:
    return str(value)[:80]


def _draw(segmentation: Any, canvas: Mask) -> int:
    size = (canvas.shape[0], canvas.shape[1])
    if isinstance(segmentation, dict):
        counts = segmentation.get("counts")
        if segmentation.get("size") != list(size) or not isinstance(counts, (str, list)):
            raise ValueError("its run lengths are not of the picture's size")
        try:
            return draw_rle(counts, canvas)
        except (OverflowError, TypeError):
            raise ValueError("its run lengths are no whole numbers") from None
    if not isinstance(segmentation, list) or not segmentation:
        raise ValueError("it has no outline")
    polygons = segmentation if isinstance(segmentation[0], list) else [segmentation]
    return by_centres([checked(polygon, size) for polygon in polygons], canvas)
