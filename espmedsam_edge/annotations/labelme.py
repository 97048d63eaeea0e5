"""LabelMe: a JSON file beside each picture."""

from __future__ import annotations

import base64
import json
from typing import Any

from espmedsam_edge.annotations.formats import FileEach, Picture, Shape
from espmedsam_edge.annotations.outlines import centre_outlines, three_points
from espmedsam_edge.imaging.encode import encode_image

_VERSION = "5.4.1"  # whose files have masks


class LabelMeWriter(FileEach):
    """Objects without holes as polygons through the centres of their outermost pixels, others as masks."""

    images = ""

    def place(self, stem: str) -> str:
        return f"{stem}.json"

    def entry(self, picture: Picture) -> str:
        shapes = [
            {"label": picture.category, "group_id": group, "description": "", "flags": {}, **fields}
            for number, shape in enumerate(picture.shapes(), 1)
            for group, fields in _fields(shape, number)
        ]
        value: dict[str, Any] = {
            "version": _VERSION,
            "flags": {},
            "shapes": shapes,
            "imagePath": picture.name,
            "imageData": None,
            "imageHeight": picture.height,
            "imageWidth": picture.width,
        }
        return json.dumps(value, indent=1, allow_nan=False) + "\n"


def _fields(shape: Shape, number: int) -> list[tuple[int | None, dict[str, Any]]]:
    """What an object is written as; of several polygons each with its group."""
    parts = centre_outlines(shape.mask)
    if any(part.holes for part in parts):
        height, width = shape.mask.shape
        corners = [[shape.x, shape.y], [shape.x + width - 1, shape.y + height - 1]]
        picture = base64.b64encode(encode_image(shape.mask, ".png")).decode()
        return [(None, {"shape_type": "mask", "points": corners, "mask": picture})]
    return [
        (
            number if len(parts) > 1 else None,
            {"shape_type": "polygon", "points": three_points(part.outer + shape.offset).tolist(), "mask": None},
        )
        for part in parts
    ]
