"""LabelMe's JSON files, read."""

from __future__ import annotations

import base64
from collections.abc import Collection
from functools import partial
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import cv2
import numpy as np

from espmedsam_edge.annotations.drawing import Mask, by_pillow, checked
from espmedsam_edge.annotations.reading import Annotated, AnnotationSet, Pictures, check_wanted, part_of, whole
from espmedsam_edge.errors import UserError
from espmedsam_edge.imaging.header_errors import HeaderError
from espmedsam_edge.imaging.headers import bare_png, read_header


def read_labelme(source: Path, images: Path, labels: Collection[str]) -> AnnotationSet:
    """Read all files below a folder.

    Args:
        source: the folder.
        images: the folder of the pictures.
        labels: those that are the target; empty: all.

    Raises:
        UserError: there is no such file, or no shape of such a label.
    """
    files = sorted(path for path in source.rglob("*.json") if path.is_file())
    if not files:
        raise UserError(f"{source} holds no JSON file.", "LabelMe writes one beside each picture.")
    found, pictures, known = AnnotationSet(), Pictures(images), list[str]()
    taken: set[Path] = set()
    for file in files:
        try:
            value = found.load(file, left_out="imageData")
            if not isinstance(value, dict) or not isinstance(value.get("shapes"), list):
                raise ValueError("it has no list 'shapes', as LabelMe's have")
            annotated = _picture(value, file, pictures)
        except ValueError as error:
            found.tell(f"{file}: {error}; it is left out.")
            continue
        if annotated.image in taken:
            found.tell(f"{file}: {annotated.image.name} has two files; the second is left out.")
            continue
        taken.add(annotated.image)
        annotated.part = part_of(file.parent, source)
        for number, shape in enumerate(value["shapes"], 1):
            label = str(shape.get("label", ""))[:200] if isinstance(shape, dict) else ""
            known.append(label)
            if not labels or label in labels:
                annotated.objects.append((f"shape {number}", partial(_draw, shape)))
        found.pictures.append(annotated)
    check_wanted(labels, list(dict.fromkeys(known)))
    return found


def _picture(value: dict[str, Any], file: Path, pictures: Pictures) -> Annotated:
    named = str(value.get("imagePath") or "")
    name = (PureWindowsPath(named) if "\\" in named else PurePosixPath(named)).name
    height, width = whole(value.get("imageHeight")), whole(value.get("imageWidth"))
    return Annotated(pictures.find(name, file), size=(height, width) if height and width else None)


def _draw(shape: Any, canvas: Mask) -> int:
    if not isinstance(shape, dict):
        raise ValueError("it is none")
    kind = str(shape.get("shape_type") or "polygon")
    size = (canvas.shape[0], canvas.shape[1])
    if kind == "mask":
        return _draw_mask(shape, canvas)
    least = {"rectangle": 2, "circle": 2, "oriented_rectangle": 4}.get(kind, 3 if kind == "polygon" else 1)
    return by_pillow(kind, checked(shape.get("points"), size, least), canvas)


def _draw_mask(shape: dict[str, Any], canvas: Mask) -> int:
    """A small picture between two corners, which both belong to it."""
    corners = checked(shape.get("points"), (canvas.shape[0], canvas.shape[1]), 2)
    left, top, right, bottom = (int(value) for value in corners[:2].ravel())
    try:
        data = base64.b64decode(shape.get("mask") or "", validate=True)
        header = read_header(data)
    except (TypeError, ValueError, HeaderError):
        raise ValueError("its mask cannot be read") from None
    if header.format != "PNG":
        raise ValueError("its mask is no PNG")
    inside = canvas[max(top, 0) : bottom + 1, max(left, 0) : right + 1]
    if top < 0 or left < 0 or inside.shape != (header.height, header.width):
        raise ValueError("its mask is not of its corners' size")
    flags = cv2.IMREAD_GRAYSCALE | cv2.IMREAD_IGNORE_ORIENTATION
    part: Any = cv2.imdecode(np.frombuffer(bare_png(data), np.uint8), flags)
    if part is None or part.shape != inside.shape:
        raise ValueError("its mask cannot be read")
    inside[part > 0] = 255
    return int(inside.size) + len(data)
