"""One object of a mask, as it was measured, and all of a picture's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from espmedsam_edge.objects.separation import Labels

Spacing = tuple[float, float]
"""Millimetres between rows and between columns."""

Unit = Literal["mm", "um"]

MICROSCOPIC = 0.01
"""Millimetres from pixel to pixel below which lengths are told in micrometres."""


def unit_of(spacing: Spacing) -> Unit:
    """What lengths are told in: micrometres where pixels lie closer than ``MICROSCOPIC``, else millimetres."""
    return "um" if min(spacing) < MICROSCOPIC else "mm"


@dataclass(frozen=True)
class Size:
    """An object's lengths and its area, in pixels or in millimetres.

    Attributes:
        area: of its pixels.
        equivalent_diameter: of a circle of that area.
        longest, shortest: the largest and smallest distance between two parallel lines that it fits between (Feret's
            diameters), from edge to edge of its pixels.
        perimeter: the line through the centres of its outermost pixels, holes included, as scikit-image measures it; in
            millimetres None where pixels are not square, for which that is not defined.
    """

    area: float
    equivalent_diameter: float
    longest: float
    shortest: float
    perimeter: float | None

    def to_dict(self, factor: float = 1.0) -> dict[str, float]:
        """Plain numbers, lengths times ``factor``; what is not known is left out."""
        names = ("equivalent_diameter", "longest", "shortest", "perimeter")
        known = {name: value for name in names if (value := getattr(self, name)) is not None}
        return {
            "area": significant(factor * factor * self.area),
            **{name: significant(factor * value) for name, value in known.items()},
        }


def significant(value: float) -> float:
    """A measure with the seven digits that may mean something, whatever its unit."""
    return float(f"{value:.7g}")


@dataclass(frozen=True)
class Instance:
    """One object.

    Attributes:
        id: its number in the label map, from 1.
        centroid: (x, y), the mean of its pixels' centres.
        box: (x, y, width, height) in pixels.
        eccentricity: of the ellipse with its second moments, 0 (a circle) to 1 (a line); between true lengths where
            the spacing is known.
        probability: the mean over its pixels; None where no probabilities were given.
        pixels: its size in pixels.
        physical: its size in millimetres; None where the spacing is not known.
        gap: of an object that is followed, how many frames it was not seen in before this one.
    """

    id: int
    centroid: tuple[float, float]
    box: tuple[int, int, int, int]
    eccentricity: float
    probability: float | None
    pixels: Size
    physical: Size | None = None
    gap: int = 0

    @property
    def area(self) -> int:
        """In pixels."""
        return int(self.pixels.area)

    def to_dict(self, spacing: Spacing | None = None) -> dict[str, Any]:
        """Plain numbers for a line of JSON: pixels, and where the spacing is known the same in ``unit_of`` it."""
        fields: dict[str, Any] = {
            "id": self.id,
            "centroid": [round(value, 2) for value in self.centroid],
            "bounding_box": list(self.box),
            "eccentricity": round(self.eccentricity, 4),
        }
        if self.gap:
            fields["gap"] = self.gap
        if self.probability is not None:
            fields["probability"] = round(self.probability, 4)
        fields |= self.pixels.to_dict() | {"area": self.area}
        if self.physical is not None and spacing is not None:
            unit = unit_of(spacing)
            fields[unit] = self.physical.to_dict(1000.0 if unit == "um" else 1.0)
        return fields


@dataclass(frozen=True, eq=False)
class Instances:
    """The objects of one picture.

    Attributes:
        labels: (H, W) int32, each object's pixels with its id, 0 elsewhere.
        count: how many there are.
        measured: each of them by id; empty where there are more than ``measures.MOST``.
        spacing: of the pixels; None where it is not known.
    """

    labels: Labels
    count: int
    measured: tuple[Instance, ...] = ()
    spacing: Spacing | None = None

    @property
    def label_map(self) -> np.ndarray[Any, np.dtype[np.uint16]] | np.ndarray[Any, np.dtype[np.uint32]]:
        """The labels as files hold them: uint16 where they fit, else uint32."""
        last = int(self.labels.max(initial=0))  # over the count where numbers are kept from frame to frame
        return self.labels.astype(np.uint16) if last <= np.iinfo(np.uint16).max else self.labels.astype(np.uint32)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers for a line of JSON: how many, and each where they were measured."""
        fields: dict[str, Any] = {"objects": self.count}
        if len(self.measured) == self.count:
            fields["instances"] = [one.to_dict(self.spacing) for one in self.measured]
        return fields
