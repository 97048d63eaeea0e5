"""Size, place and shape of every object of a label map, in pixels and in millimetres.

All objects at once, pixel by pixel, as scikit-image's ``regionprops`` measures them one by one (the tests hold each
against it); only the outlines' hulls are taken object by object.
"""

from __future__ import annotations

import math
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from espmedsam_edge.objects.instance import Instance, Instances, Size, Spacing
from espmedsam_edge.objects.separation import Labels, Mask, separated

MOST = 50_000
"""Objects of one picture that are measured; of more only the number is given."""

Floats = NDArray[np.float64]

# The length that a pixel of an outline stands for, by its neighbours in the outline: 1 + 2 for each beside it + 10 for
# each at a corner (Benkrid and Crookes 2000, as scikit-image has it).
_LENGTHS: Floats = np.zeros(50)
_LENGTHS[[5, 7, 15, 17, 25, 27]] = 1
_LENGTHS[[21, 33]] = math.sqrt(2)
_LENGTHS[[13, 23]] = (1 + math.sqrt(2)) / 2


def find_instances(
    mask: Mask,
    probability: NDArray[np.float32] | None = None,
    spacing: Spacing | None = None,
    *,
    split: bool = True,
) -> Instances:
    """The objects of a mask, numbered and measured.

    Args:
        mask: (H, W) uint8, 0 or 255.
        probability: (H, W) float32, of the foreground.
        spacing: millimetres between rows and between columns.
        split: whether objects that touch are taken apart.

    Raises:
        UserError: scikit-image is missing, and ``split`` was asked for.

    Examples:
        >>> import numpy as np
        >>> from espmedsam_edge.objects.measures import find_instances
        >>> mask = np.zeros((20, 30), np.uint8)
        >>> mask[2:6, 3:13] = mask[10:15, 20:25] = 255
        >>> found = find_instances(mask, spacing=(0.5, 0.5), split=False)
        >>> [(one.id, one.area, one.centroid, one.physical.area) for one in found.measured]
        [(1, 40, (7.5, 3.5), 10.0), (2, 25, (22.0, 12.0), 6.25)]
    """
    return instances_of(separated(mask, split=split), probability, spacing)


def instances_of(
    labels: Labels, probability: NDArray[np.float32] | None = None, spacing: Spacing | None = None
) -> Instances:
    """The objects of a label map whose numbers go from 1 without gaps; arguments as ``find_instances``."""
    count = int(labels.max(initial=0))
    return Instances(labels, count, () if count > MOST else tuple(measure(labels, probability, spacing)), spacing)


def measure(
    labels: Labels, probability: NDArray[np.float32] | None = None, spacing: Spacing | None = None
) -> list[Instance]:
    """Measure every object of a label map whose numbers go from 1 without gaps; arguments as ``find_instances``."""
    where = np.flatnonzero(labels)
    if not where.size:
        return []
    of = labels.ravel()[where]
    rows, columns = np.divmod(where, labels.shape[1])
    areas = np.bincount(of)[1:]
    down, across = (np.bincount(of, weights=place)[1:] / areas for place in (rows, columns))
    eccentric = _eccentricities(of, rows - down[of - 1], columns - across[of - 1], areas, spacing or (1.0, 1.0))
    means = None if probability is None else np.bincount(of, weights=probability.ravel()[where])[1:] / areas
    boxes = _boxes(of, rows, columns, len(areas))
    edge, edge_of = _edge(labels)
    pixels = _sizes(labels, areas, edge, edge_of, (1.0, 1.0))
    physical = None if spacing is None else _sizes(labels, areas, edge, edge_of, spacing)
    return [
        Instance(
            index + 1,
            (float(across[index]), float(down[index])),
            boxes[index],
            float(eccentric[index]),
            None if means is None else float(means[index]),
            pixels[index],
            None if physical is None else physical[index],
        )
        for index in range(len(areas))
    ]


def _eccentricities(of: Labels, down: Floats, across: Floats, areas: NDArray[Any], spacing: Spacing) -> Floats:
    """From the eigenvalues of the second central moments."""
    down, across = down * spacing[0], across * spacing[1]
    dd, aa, da = (np.bincount(of, weights=product)[1:] / areas for product in (down**2, across**2, down * across))
    middle, half = (dd + aa) / 2, np.hypot((dd - aa) / 2, da)
    large, small = middle + half, np.maximum(middle - half, 0)
    return np.asarray(np.sqrt(1 - np.divide(small, large, out=np.ones_like(large), where=large > 0)), np.float64)


def _boxes(of: Labels, rows: NDArray[Any], columns: NDArray[Any], count: int) -> list[tuple[int, int, int, int]]:
    ends = []
    for places in (columns, rows):
        low, high = np.full(count, np.iinfo(np.int64).max), np.full(count, -1)
        np.minimum.at(low, of - 1, places)
        np.maximum.at(high, of - 1, places)
        ends += [low, high + 1 - low]
    x, width, y, height = (end.tolist() for end in ends)
    return list(zip(x, y, width, height, strict=True))


def _edge(labels: Labels) -> tuple[NDArray[np.int64], Labels]:
    """(N, 2) row and column of the pixels beside which, not at a corner, is something else; and whose each is.

    They are sorted by object.
    """
    wide = np.pad(labels, 1)
    own = wide[1:-1, 1:-1]
    beside = (wide[:-2, 1:-1], wide[2:, 1:-1], wide[1:-1, :-2], wide[1:-1, 2:])
    at = np.argwhere((own > 0) & np.any([other != own for other in beside], axis=0))
    of = labels[at[:, 0], at[:, 1]]
    order = np.argsort(of, kind="stable")
    return at[order], of[order]


def _sizes(
    labels: Labels,
    areas: NDArray[Any],
    edge: NDArray[np.int64],
    edge_of: Labels,
    spacing: Spacing,
) -> list[Size]:
    """Each object's size in the unit of ``spacing``."""
    square = areas * (spacing[0] * spacing[1])
    around: list[float | None] = [None] * len(areas)
    if math.isclose(spacing[0], spacing[1], rel_tol=1e-3):
        around = (_perimeters(labels.shape, edge, edge_of) * math.sqrt(spacing[0] * spacing[1])).tolist()
    ends = np.searchsorted(edge_of, np.arange(1, len(areas) + 2))
    sizes = []
    for index, (area, perimeter) in enumerate(zip(square.tolist(), around, strict=True)):
        longest, shortest = diameters(edge[ends[index] : ends[index + 1]], spacing)
        sizes.append(Size(area, math.sqrt(4 * area / math.pi), longest, shortest, perimeter))
    return sizes


def _perimeters(size: tuple[int, ...], edge: NDArray[np.int64], edge_of: Labels) -> Floats:
    """Each object's perimeter in pixels."""
    width = size[1] + 2
    outline = np.zeros((size[0] + 2) * width, np.int32)
    at = (edge[:, 0] + 1) * width + edge[:, 1] + 1
    outline[at] = edge_of
    kinds = np.ones(len(at), np.int64)
    for step, weight in ((1, 2), (width, 2), (width - 1, 10), (width + 1, 10)):
        for place in (at - step, at + step):
            kinds += weight * (outline[place] == edge_of)
    return np.asarray(np.bincount(edge_of, weights=_LENGTHS[kinds])[1:], np.float64)


def diameters(edge: NDArray[np.int64], spacing: Spacing = (1.0, 1.0)) -> tuple[float, float]:
    """The longest and the shortest diameter of an object, by the sides of its convex hull.

    Args:
        edge: (N, 2) row and column of its outermost pixels.
        spacing: of rows and columns.
    """
    sides = np.array([[1, 0], [-1, 0], [0, 1], [0, -1]])
    doubled = (2 * edge[:, None] + sides).reshape(-1, 2).astype(np.int32)  # the middles of the pixels' sides
    hull: Any = cv2.convexHull(doubled)
    corners = np.asarray(hull, np.float64).reshape(-1, 2) * (np.array(spacing) / 2)
    apart = np.hypot(*(corners[:, None] - corners[None]).transpose(2, 0, 1))
    along = np.roll(corners, -1, axis=0) - corners
    normal = np.stack([-along[:, 1], along[:, 0]], axis=1) / np.hypot(along[:, 0], along[:, 1])[:, None]
    heights = normal @ corners.T
    return float(apart.max()), float((heights.max(axis=1) - heights.min(axis=1)).min())
