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
    ways = np.abs(np.diff(found, axis=0, append=found[:1])).max(axis=1)
    if np.maximum(ways, 1).sum() > _LONGEST:
        raise ValueError("its outline is far longer than any object's")
    return found


def by_centres(polygons: Sequence[Points], canvas: Mask) -> None:
    """Into a mask, as COCO's and CVAT's tools fill: coordinates count from a pixel's corner; of several the union.

    Raises:
        UserError: pycocotools is missing.
    """
    if (reason := why_missing("pycocotools", "annotations")) is not None:
        raise UserError(f"cannot draw polygons: {reason}")
    from pycocotools import mask as tools

    every = np.concatenate(polygons)
    # Only where they are: whole pixels shift nothing, and a large picture may have thousands.
    left, top = (max(0, int(least)) for least in every.min(axis=0))
    right, bottom = (min(end, int(most) + 2) for most, end in zip(every.max(axis=0), canvas.shape[::-1], strict=True))
    if right > left and bottom > top:
        moved = [(one - (left, top)).ravel().tolist() for one in polygons]
        packed = tools.frPyObjects(moved, bottom - top, right - left)
        canvas[top:bottom, left:right] |= 255 * np.asarray(tools.decode(tools.merge(packed)), np.uint8)


def by_pixels(polygon: Points, canvas: Mask) -> None:
    """Into a mask, as YOLO's readers fill: coordinates are cut off to pixels, and those on the line count."""
    cv2.fillPoly(canvas, [polygon.astype(np.int32)], 255)


def by_pillow(shape: str, points: Points, canvas: Mask) -> None:
    """Into a mask, as LabelMe fills: a polygon, a rectangle or a circle, its line included.

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
    # Only where it is: whole pixels shift nothing, and a large picture may have thousands.
    left, top = (max(0, int(least)) for least in low)
    inside = canvas[top : max(0, int(high[1]) + 2), left : max(0, int(high[0]) + 2)]
    if not inside.size:
        return
    picture = Image.fromarray(inside)
    draw = ImageDraw.Draw(picture)
    if filled:
        draw.polygon([(float(x), float(y)) for x, y in points - (left, top)], outline=255, fill=255)
    else:
        box = (*(low - (left, top)).tolist(), *(high - (left, top)).tolist())
        (draw.rectangle if shape == "rectangle" else draw.ellipse)(box, outline=255, fill=255)
    inside[:] = np.asarray(picture, np.uint8)
