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
from espmedsam_edge.objects.separation import BAND, Labels, Mask, separated

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
    measured = tuple(measure(labels, probability, spacing)) if 0 < count <= MOST else ()
    return Instances(labels, count, measured, spacing)


def measure(
    labels: Labels, probability: NDArray[np.float32] | None = None, spacing: Spacing | None = None
) -> list[Instance]:
    """Measure every object of a label map whose numbers go from 1 without gaps; arguments as ``find_instances``."""
    from scipy.ndimage import find_objects  # half a second, which runs without objects need not wait for

    slices = find_objects(labels)
    if not slices:
        return []
    boxes = [(x.start, y.start, x.stop - x.start, y.stop - y.start) for y, x in slices]
    areas, across, down, products, means = _sums(labels, boxes, probability)
    eccentric = _eccentricities(products, spacing or (1.0, 1.0))
    edge, edge_of = _edge(labels)
    pixels = _sizes(labels, areas, edge, edge_of, (1.0, 1.0))
    physical = None if spacing is None else _sizes(labels, areas, edge, edge_of, spacing)
    return [
        Instance(
            index + 1,
            (float(across[index]), float(down[index])),
            boxes[index],
            float(eccentric[index]),
            None if probability is None else float(means[index]),
            pixels[index],
            None if physical is None else physical[index],
        )
        for index in range(len(areas))
    ]


def _sums(
    labels: Labels, boxes: list[tuple[int, int, int, int]], probability: NDArray[np.float32] | None
) -> tuple[NDArray[np.int64], Floats, Floats, tuple[Floats, Floats, Floats], Floats]:
    """Of each object the area, the centroid's x and y, the second central moments (xx, yy, xy), the mean probability.

    Places are counted from the object's box, so that the sums are whole numbers that a float holds.
    """
    height, width = labels.shape
    left, top = np.array([(0, 0), *(box[:2] for box in boxes)], np.int64).T
    totals = np.zeros((7, len(boxes) + 1))
    rows = max(1, BAND // width)
    for start in range(0, height, rows):
        y, x = np.nonzero(labels[start : start + rows])
        of = labels[start : start + rows][y, x]
        weights: list[Any] = [None, x - left[of], y + start - top[of]]
        weights += [weights[1] ** 2, weights[2] ** 2, weights[1] * weights[2]]
        weights += [] if probability is None else [probability[start : start + rows][y, x]]
        for total, weight in zip(totals, weights, strict=False):
            total += np.bincount(of, weight, minlength=len(total))
    areas = totals[0, 1:]
    x, y, xx, yy, xy, mean = totals[1:, 1:] / areas
    return areas.astype(np.int64), x + left[1:], y + top[1:], (xx - x * x, yy - y * y, xy - x * y), mean


def _eccentricities(products: tuple[Floats, Floats, Floats], spacing: Spacing) -> Floats:
    """From the eigenvalues of the second central moments."""
    aa, dd, da = products[0] * spacing[1] ** 2, products[1] * spacing[0] ** 2, products[2] * spacing[0] * spacing[1]
    middle, half = (dd + aa) / 2, np.hypot((dd - aa) / 2, da)
    large, small = middle + half, np.maximum(middle - half, 0)
    return np.asarray(np.sqrt(1 - np.divide(small, large, out=np.ones_like(large), where=large > 0)), np.float64)


def _edge(labels: Labels) -> tuple[NDArray[np.int64], Labels]:
    """(N, 2) row and column of the pixels beside which, not at a corner, is something else; and whose each is.

    They are sorted by object.
    """
    wide = np.pad(labels, 1)
    own = wide[1:-1, 1:-1]
    outer = np.zeros(labels.shape, bool)
    for other in (wide[:-2, 1:-1], wide[2:, 1:-1], wide[1:-1, :-2], wide[1:-1, 2:]):
        outer |= other != own
    at = np.argwhere(outer & (own > 0))
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
