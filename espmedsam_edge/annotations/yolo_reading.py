"""YOLO's text files of segmentation, read."""

from __future__ import annotations

import re
from collections.abc import Collection
from functools import partial
from pathlib import Path

import numpy as np

from espmedsam_edge.annotations.drawing import Mask, by_pixels, checked
from espmedsam_edge.annotations.reading import Annotated, AnnotationSet, Pictures, check_wanted, part_of
from espmedsam_edge.errors import UserError
from espmedsam_edge.files import read_regular

_BOX = 5  # values of a line that is a box


def read_yolo(source: Path, images: Path, labels: Collection[str]) -> AnnotationSet:
    """Read the files ``labels/**/NAME.txt`` beside ``images/**``, or beside each picture.

    Args:
        source: the folder of the data set.
        images: the folder of the pictures.
        labels: the classes that are the target, by number, or by name as ``data.yaml`` has them; empty: all.

    Raises:
        UserError: there are no such files, or no such class.
    """
    names = _names(source)
    numbers = {str(number) for number, name in names.items() if name in labels} | {
        label for label in labels if label.isdigit()
    }
    check_wanted([label for label in labels if not label.isdigit()], list(names.values()))
    found, pictures = AnnotationSet(), Pictures(images)
    by_place: dict[tuple[str, ...], Path] = {}
    for image in pictures.files:
        by_place.setdefault(_place(image, images), image)
    files = [path for path in sorted(source.rglob("*.txt")) if path.is_file() and not _is_list(path)]
    if not files:
        raise UserError(
            f"{source} holds no text files of labels.", "Expected: images/ and labels/, NAME.txt a picture."
        )
    annotated = {image: Annotated(image, part=part_of(image.parent, images)) for image in pictures.files}
    for file in files:
        place = by_place.get(_place(file, source))
        if place is None:
            found.tell(f"{file}: there is no picture {file.stem!r}; it is left out.")
            continue
        try:
            lines = found.lines(file)
        except ValueError as error:
            found.tell(f"cannot read {file}: {error}.")
            continue
        for number, line in enumerate(lines, 1):
            kind = line.split(maxsplit=1)[:1]
            if kind and (not numbers or kind[0] in numbers):
                annotated[place].objects.append((f"line {number}", partial(_draw, line)))
    found.pictures = list(annotated.values())
    return found


def _is_list(path: Path) -> bool:
    """Whether a text file lists pictures or classes, or is for people."""
    return path.stem.lower() in ("train", "val", "valid", "test", "classes", "readme", "obj", "notes") or (
        path.name.lower().startswith("readme")
    )


def _place(path: Path, below: Path) -> tuple[str, ...]:
    """A path below a folder without ``images`` or ``labels`` and the ending."""
    return tuple(name for name in path.relative_to(below).with_suffix("").parts if name not in ("images", "labels"))


def _names(source: Path) -> dict[int, str]:
    """The classes of ``data.yaml``: ``names: [a, b]``, or lines ``0: a`` or ``- a``."""
    for file in sorted([*source.glob("*.yaml"), *source.glob("*.yml")]):
        try:
            text = read_regular(file, 1 << 20).decode("utf-8", "replace")
        except OSError:
            continue
        place = re.search("^names:", text, re.M)
        after = "" if place is None else text[place.end() :].strip()
        if after.startswith("["):
            return {number: _bare(name) for number, name in enumerate(after[1:].partition("]")[0].split(","))}
        lines = [line.strip() for line in after.splitlines()]  # each looked at once, whatever it holds
        pairs = [(number, name) for number, colon, name in (line.partition(":") for line in lines) if colon]
        if numbered := {int(number): _bare(name) for number, name in pairs if re.fullmatch("[0-9]{1,9}", number)}:
            return numbered
        if dashed := [line[2:] for line in lines if line.startswith("- ")]:
            return {number: _bare(name) for number, name in enumerate(dashed)}
    return {}


def _bare(name: str) -> str:
    return name.strip().strip("\"'")


def _draw(line: str, canvas: Mask) -> int:
    words = line.split()
    if len(words) <= _BOX:
        raise ValueError("it is a box, not an outline" if len(words) == _BOX else "it has too few values")
    try:
        values = np.array(words[1:], np.float64)
    except ValueError:
        raise ValueError("its values are no numbers") from None
    if len(values) % 2:
        raise ValueError("it has an odd number of coordinates")
    height, width = canvas.shape
    return by_pixels(checked(values.reshape(-1, 2) * (width, height), (height, width)), canvas)
