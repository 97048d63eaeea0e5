"""CVAT for images 1.1: one XML document, which CVAT imports into a task with these pictures."""

from __future__ import annotations

from xml.sax.saxutils import escape, quoteattr  # nosec B406 (they write, nothing is parsed)

from espmedsam_edge.annotations.formats import OneDocument, Picture, Shape
from espmedsam_edge.annotations.outlines import Ring, edge_outlines
from espmedsam_edge.annotations.rle import run_lengths
from espmedsam_edge.errors import printable
from espmedsam_edge.modalities import PAPER_MODALITIES, target_of


class CvatWriter(OneDocument):
    """Objects without holes as polygons along the edges of their pixels, others as masks: both are exact."""

    document = "annotations.xml"

    def __init__(self) -> None:
        self._pictures = 0
        self._groups = 0

    def head(self) -> str:
        return '<?xml version="1.0" encoding="utf-8"?>\n<annotations>\n<version>1.1</version>\n'

    def entry(self, picture: Picture) -> str:
        name = quoteattr(printable(picture.name))
        size = f'width="{picture.width}" height="{picture.height}"'
        label = f'label={quoteattr(picture.category)} source="auto" occluded="0"'
        lines = ["" if self._pictures else _labels(picture.category)]
        lines.append(f'<image id="{self._pictures}" name={name} {size}>\n')
        self._pictures += 1
        for shape in picture.shapes():
            lines += self._shape(shape, label)
        return "".join([*lines, "</image>\n"])

    def _shape(self, shape: Shape, label: str) -> list[str]:
        parts = edge_outlines(shape.mask)
        if any(part.holes for part in parts):
            height, width = shape.mask.shape
            runs = ", ".join(str(length) for length in run_lengths(shape.mask).tolist())
            box = f'left="{shape.x}" top="{shape.y}" width="{width}" height="{height}"'
            return [f'<mask {label} rle="{runs}" {box} z_order="0"></mask>\n']
        group = ""
        if len(parts) > 1:
            self._groups += 1
            group = f' group_id="{self._groups}"'
        return [
            f'<polygon {label} points="{_points(part.outer + shape.offset)}" z_order="0"{group}></polygon>\n'
            for part in parts
        ]

    def tail(self) -> str:
        return "</annotations>\n"


def _labels(category: str) -> str:
    """Which there may be: readers want them before the pictures, of which only the first is known then."""
    names = dict.fromkeys([category, *(target_of(name) for name in PAPER_MODALITIES)])
    listed = "".join(f"<label><name>{escape(name)}</name><attributes></attributes></label>" for name in names)
    return f"<meta><task><labels>{listed}</labels></task></meta>\n"


def _points(ring: Ring) -> str:
    return ";".join(f"{x},{y}" for x, y in ring.tolist())
