"""COCO JSON: one document of pictures, categories and objects."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from espmedsam_edge.annotations.formats import Categories, OneDocument, Picture, Shape
from espmedsam_edge.annotations.outlines import edge_outlines
from espmedsam_edge.annotations.rle import encode_rle
from espmedsam_edge.marks import MARK


class CocoWriter(OneDocument):
    """Objects without holes as polygons along the edges of their pixels, others as run lengths: both are exact."""

    document = "annotations.json"

    def __init__(self) -> None:
        self._categories = Categories(first=1)
        self._pictures: list[dict[str, Any]] = []
        self._objects = 0

    def head(self) -> str:
        return f'{{"info":{{"description":"{MARK}"}},"licenses":[],"annotations":['

    def entry(self, picture: Picture) -> str:
        number = len(self._pictures) + 1
        entry = {"id": number, "file_name": picture.name, "width": picture.width, "height": picture.height}
        self._pictures.append(entry)
        lines = []
        for shape in picture.shapes():
            self._objects += 1
            comma = "," if self._objects > 1 else ""
            lines.append(comma + "\n" + _text(self._object(shape, picture, number)))
        return "".join(lines)

    def _object(self, shape: Shape, picture: Picture, number: int) -> dict[str, Any]:
        outlines = edge_outlines(shape.mask)
        height, width = shape.mask.shape
        fields: dict[str, Any] = {
            "id": self._objects,
            "image_id": number,
            "category_id": self._categories.number(picture.category),
            "iscrowd": 0,
            "area": int(np.count_nonzero(shape.mask)),
            "bbox": [shape.x, shape.y, width, height],
        }
        if any(part.holes for part in outlines):
            fields["segmentation"] = encode_rle(shape.mask, shape.offset, (picture.height, picture.width))
        else:
            fields["segmentation"] = [(part.outer + shape.offset).ravel().tolist() for part in outlines]
        return fields if shape.probability is None else fields | {"score": round(shape.probability, 4)}

    def tail(self) -> str:
        kinds = [{"id": number, "name": name} for number, name in enumerate(self._categories.names, 1)]
        return f'\n],\n"categories":{_text(kinds)},\n"images":{_text(self._pictures)}}}\n'


def _text(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), allow_nan=False)
