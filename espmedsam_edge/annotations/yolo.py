"""YOLO segmentation: of each picture a text file with a line an object, its class and polygon relative to the size."""

from __future__ import annotations

import json

from espmedsam_edge.annotations.formats import Categories, FileEach, Picture
from espmedsam_edge.annotations.outlines import centre_outlines, hole_pixels, three_points

_WITHIN = 0.25  # of a pixel: readers that round and readers that cut off come to the same pixel
_DIGITS = 7


class YoloWriter(FileEach):
    """Each connected part is a line, its holes filled. ``data.yaml`` names the classes."""

    def __init__(self) -> None:
        self._categories = Categories()
        self._filled = self._pictures = 0

    def place(self, stem: str) -> str:
        return f"labels/{stem}.txt"

    def entry(self, picture: Picture) -> str:
        number = self._categories.number(picture.category)
        lines, filled = [], 0
        for shape in picture.shapes():
            filled += hole_pixels(shape.mask)
            for part in centre_outlines(shape.mask):
                points = three_points(part.outer + shape.offset) + _WITHIN
                values = (points / (picture.width, picture.height)).ravel()
                lines.append(" ".join([str(number), *(f"{value:.{_DIGITS}f}" for value in values)]) + "\n")
        self._filled += filled
        self._pictures += filled > 0
        return "".join(lines)

    @property
    def lost(self) -> str:  # type: ignore[override]
        if not self._filled:
            return ""
        where = "1 picture" if self._pictures == 1 else f"{self._pictures} pictures"
        return f"YOLO has no holes: {self._filled} pixels of holes in {where} are filled."

    def others(self) -> dict[str, str]:
        names = "".join(f"  {number}: {json.dumps(name)}\n" for number, name in enumerate(self._categories.names))
        return {"data.yaml": f"path: .\ntrain: images\nval: images\nnames:\n{names}"}
