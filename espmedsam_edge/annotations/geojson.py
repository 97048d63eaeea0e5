"""GeoJSON as QuPath opens it: features with polygons in a picture's pixels, their holes as inner rings."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from espmedsam_edge.annotations.formats import FileEach, Picture, Shape
from espmedsam_edge.annotations.outlines import Outline, simple_outlines
from espmedsam_edge.marks import MARK

HEAD = f'{{"type":"FeatureCollection","generator":"{MARK}","features":['
TAIL = "\n]}\n"


class GeoJsonWriter(FileEach):
    """Outlines along the edges of pixels, with their holes; what meets at corners alone are polygons of one object."""

    def place(self, stem: str) -> str:
        return f"objects/{stem}.geojson"

    def entry(self, picture: Picture) -> str:
        return HEAD + ",".join("\n" + _object(shape, picture) for shape in picture.shapes()) + TAIL


def _object(shape: Shape, picture: Picture) -> str:
    parts = [_closed(part, shape) for part in simple_outlines(shape.mask)]
    measured = {"Area px": int(np.count_nonzero(shape.mask))}
    if shape.probability is not None:
        measured |= {"Probability": round(shape.probability, 4)}  # type: ignore[dict-item]
    return feature(parts, picture.category, picture.color[::-1], measured)


def _closed(part: Outline, shape: Shape) -> list[list[list[int]]]:
    return [[*ring, ring[0]] for ring in ((one + shape.offset).tolist() for one in (part.outer, *part.holes))]


def feature(
    polygons: Sequence[Any], name: str, colour: Sequence[int], measurements: dict[str, int] | dict[str, float]
) -> str:
    """An object.

    Args:
        polygons: its parts: each closed rings of (x, y), the outer one first.
        name: of its class.
        colour: RGB.
        measurements: what is known of it.
    """
    kind, coordinates = ("Polygon", polygons[0]) if len(polygons) == 1 else ("MultiPolygon", list(polygons))
    value = {
        "type": "Feature",
        "geometry": {"type": kind, "coordinates": coordinates},
        "properties": {
            "objectType": "detection",
            "classification": {"name": name, "color": list(colour)},
            "measurements": measurements,
        },
    }
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False)
