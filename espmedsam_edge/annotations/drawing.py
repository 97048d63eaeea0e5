"""Polygons into masks, by each tool's own rules, whatever the polygons are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from espmedsam_edge.errors import UserError
from espmedsam_edge.machine.installation import why_missing

Mask = NDArray[np.uint8]  # (H, W), 0 or 255
Points = NDArray[np.float64]  # (n, 2) of (x, y)

_LONGEST = 1 << 20
"""Pixels of an outline's way from point to point, each counted as one at least; tools take time and memory by them."""
_A_STEP = 64
"""Pixels of a mask that one along an outline counts as, by the time that it takes."""


def checked(points: Any, size: tuple[int, int], least: int = 3) -> Points:
    """Points from outside.

    Args:
        points: what should be pairs of numbers, or one list of them.
        size: (H, W) of the picture.
        least: how many there must be.

    Raises:
        ValueError: says in a few words what is wrong with them.
    """
    try:
        found = np.asarray(points, np.float64).reshape(-1, 2)
    except (TypeError, ValueError, OverflowError):
        raise ValueError("its points are not pairs of numbers") from None
    if len(found) < least:
        raise ValueError(f"it has {len(found)} points, fewer than {least}")
    if not np.isfinite(found).all():
        raise ValueError("its coordinates are not finite")
    height, width = size
    (left, top), (right, bottom) = found.min(axis=0), found.max(axis=0)
    if right < 0 or bottom < 0 or left > width or top > height:
        raise ValueError("it lies outside the picture")
    if left < -width or top < -height or right > 2 * width or bottom > 2 * height:
        raise ValueError("it reaches far outside the picture")
    if _way(found) > _LONGEST:
        raise ValueError("its outline is far longer than any object's")
    return found


def _way(points: Points) -> int:
    """Pixels from point to point and back to the first, each counted as one at least."""
    ways = np.abs(np.diff(points, axis=0, append=points[:1])).max(axis=1)
    return int(np.maximum(ways, 1).sum())


def box_around(points: Points, canvas: Mask) -> tuple[slice, slice]:
    """The rows and columns of a mask that points reach into. Moving them by whole pixels to there shifts nothing."""
    left, top = (max(0, int(least)) for least in points.min(axis=0))
    right, bottom = (min(end, int(most) + 2) for most, end in zip(points.max(axis=0), canvas.shape[::-1], strict=True))
    return slice(top, max(top, bottom)), slice(left, max(left, right))


def by_centres(polygons: Sequence[Points], canvas: Mask) -> int:
    """Into a mask, as COCO's and CVAT's tools fill: coordinates count from a pixel's corner; of several the union.

    Returns:
        How many pixels it took, see ``reading.Draw``.

    Raises:
        UserError: pycocotools is missing.
    """
    if (reason := why_missing("pycocotools", "annotations")) is not None:
        raise UserError(f"cannot draw polygons: {reason}")
    from pycocotools import mask as tools

    rows, columns = box_around(np.concatenate(polygons), canvas)
    inside = canvas[rows, columns]  # a large picture may have thousands
    if inside.size:
        moved = [(one - (columns.start, rows.start)).ravel().tolist() for one in polygons]
        packed = tools.frPyObjects(moved, *inside.shape)
        inside |= 255 * np.asarray(tools.decode(tools.merge(packed)), np.uint8)
    return inside.size + _A_STEP * sum(map(_way, polygons))


def by_pixels(polygon: Points, canvas: Mask) -> int:
    """Into a mask, as YOLO's readers fill: coordinates are cut off to pixels, and those on the line count.

    Returns:
        As ``by_centres``.
    """
    cv2.fillPoly(canvas, [polygon.astype(np.int32)], 255)
    return canvas[box_around(polygon, canvas)].size + _A_STEP * _way(polygon)


def by_pillow(shape: str, points: Points, canvas: Mask) -> int:
    """Into a mask, as LabelMe fills: a polygon, a rectangle or a circle, its line included.

    Returns:
        As ``by_centres``.

    Raises:
        UserError: Pillow is missing.
        ValueError: a shape that has no area, or that is not known.
    """
    if (reason := why_missing("PIL", "annotations")) is not None:
        raise UserError(f"cannot draw polygons: {reason}")
    from PIL import Image, ImageDraw

    filled = shape in ("polygon", "oriented_rectangle")
    if not filled and (shape not in ("rectangle", "circle") or len(points) != 2):
        raise ValueError(f"a {shape[:40]} has no area")
    low, high = points.min(axis=0), points.max(axis=0)
    if shape == "circle":
        radius = float(np.hypot(*(points[1] - points[0])))
        low, high = points[0] - radius, points[0] + radius
    rows, columns = box_around(np.stack([low, high]), canvas)
    inside = canvas[rows, columns]  # a large picture may have thousands
    if not inside.size:
        return 0
    picture = Image.fromarray(inside)
    draw, corner = ImageDraw.Draw(picture), (columns.start, rows.start)
    if filled:
        draw.polygon([(float(x), float(y)) for x, y in points - corner], outline=255, fill=255)
    else:
        box = (*(low - corner).tolist(), *(high - corner).tolist())
        (draw.rectangle if shape == "rectangle" else draw.ellipse)(box, outline=255, fill=255)
    inside[:] = np.asarray(picture, np.uint8)
    return inside.size + len(points) * len(inside)  # Pillow looks at every point for each row
