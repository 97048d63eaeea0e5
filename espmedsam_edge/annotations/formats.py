"""The formats that results are written in for annotation tools: what each is, and who writes it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib import import_module

import numpy as np
from numpy.typing import NDArray

from espmedsam_edge.errors import UserError, nearest

Mask = NDArray[np.uint8]  # (H, W), 0 or not


@dataclass(frozen=True, eq=False)
class Shape:
    """One object of a picture.

    Attributes:
        mask: (h, w) uint8 of its box, not 0 where it is.
        x, y: the box's first column and row in the picture.
        probability: the mean over its pixels; None where that is not known.
    """

    mask: Mask
    x: int
    y: int
    probability: float | None = None

    @property
    def offset(self) -> tuple[int, int]:
        """(x, y)"""
        return self.x, self.y


@dataclass(frozen=True, eq=False)
class Picture:
    """A picture with its objects.

    Attributes:
        name: of its file, without the folder.
        width, height: in pixels.
        category: what its objects are, in words.
        color: (B, G, R), of what is drawn.
        labels: (H, W), each object's pixels with its number from 1, 0 elsewhere.
        probabilities: of the objects, in their order; empty where they are not known.
    """

    name: str
    width: int
    height: int
    category: str
    color: tuple[int, int, int]
    labels: NDArray[np.int32]
    probabilities: tuple[float | None, ...] = ()

    @property
    def stem(self) -> str:
        """The name without its ending."""
        return self.name.rpartition(".")[0]

    def shapes(self) -> Iterator[Shape]:
        """Each object."""
        from scipy.ndimage import find_objects

        for number, box in enumerate(find_objects(self.labels), 1):
            if box is not None:
                inside = np.asarray(self.labels[box] == number, np.uint8)
                known = self.probabilities[number - 1] if number <= len(self.probabilities) else None
                yield Shape(inside, box[1].start, box[0].start, known)


@dataclass
class Categories:
    """Numbers for categories, in the order in which they come."""

    first: int = 0
    names: list[str] = field(default_factory=list)

    def number(self, name: str) -> int:
        """Of a category, which is new or not."""
        if name not in self.names:
            self.names.append(name)
        return self.first + self.names.index(name)


class Writer(ABC):
    """Turns pictures, one after the other, into the text of files."""

    images = "images"
    """The folder of the pictures, below that of all files; "" for that itself."""

    lost = ""
    """What the format could not hold of the pictures so far, as a sentence; "" for nothing."""

    @abstractmethod
    def entry(self, picture: Picture) -> str:
        """A picture's part of the document, or its own file."""

    @abstractmethod
    def place(self, stem: str) -> str:
        """The path of the file with a picture's objects, by the picture's name without its ending."""

    def others(self) -> dict[str, str]:
        """Further files, once all pictures are in."""
        return {}


class OneDocument(Writer):
    """All pictures in one file."""

    document: str
    """Its name."""

    @abstractmethod
    def head(self) -> str:
        """How the document begins."""

    @abstractmethod
    def tail(self) -> str:
        """How the document ends."""

    def place(self, stem: str) -> str:
        return self.document


class FileEach(Writer):
    """A file a picture."""


FORMATS: dict[str, tuple[str, str]] = {
    "coco": ("espmedsam_edge.annotations.coco:CocoWriter", "COCO JSON: polygons, run lengths where there are holes"),
    "yolo": ("espmedsam_edge.annotations.yolo:YoloWriter", "YOLO segmentation: a text file a picture, without holes"),
    "labelme": ("espmedsam_edge.annotations.labelme:LabelMeWriter", "LabelMe: a JSON file beside each picture"),
    "cvat": ("espmedsam_edge.annotations.cvat:CvatWriter", "CVAT for images 1.1: one XML file"),
    "geojson": ("espmedsam_edge.annotations.geojson:GeoJsonWriter", "GeoJSON as QuPath opens it: a file a picture"),
}
"""By name: where the writer is, and what the format is."""


def check_format(name: str) -> str:
    """The name, if it is a format's.

    Raises:
        UserError: it is not; names the nearest.
    """
    if name not in FORMATS:
        raise UserError(f"no annotation format '{name}'.", nearest(name, FORMATS))
    return name


def writer(name: str) -> Writer:
    """What writes a format.

    Raises:
        UserError: as ``check_format``.
    """
    module, _, made = FORMATS[check_format(name)][0].partition(":")
    make: Callable[[], Writer] = getattr(import_module(module), made)
    return make()
