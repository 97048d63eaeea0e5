"""A mask as numbers in text: polygons, and the run lengths of COCO."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from espmedsam_edge.runtime.segmentation import Mask, Segmentation

Form = Literal["none", "polygons", "rle", "both"]


def contour_fields(result: Segmentation, form: Form) -> dict[str, Any]:
    """What a line of JSON says of a mask's shape: ``polygons``, ``rle``, both or neither.

    * ``polygons``: one list ``[x1, y1, x2, y2, ...]`` a part, in pixels, through the centres of its outermost pixels;
      holes are left out. Filling them (``cv2.fillPoly``) gives the parts back. A part of one or two points
      repeats them: COCO's readers refuse fewer than three, and take two for a box.
    * ``rle``: ``{"size": [H, W], "counts": "..."}``, the whole mask, exactly, as pycocotools reads it.
    """
    fields: dict[str, Any] = {}
    if form in ("polygons", "both"):
        fields["polygons"] = [_three_points(contour).ravel().tolist() for contour in result.contours()]
    if form in ("rle", "both"):
        fields["rle"] = encode_rle(result.mask)
    return fields


def _three_points(contour: NDArray[np.int32]) -> NDArray[np.int32]:
    """A contour of (N, ..., 2) points, its points repeated until there are three."""
    return contour if len(contour) >= 3 else np.resize(contour, (3, *contour.shape[1:]))


def encode_rle(mask: Mask) -> dict[str, Any]:
    """COCO's compressed run-length encoding.

    Args:
        mask: (H, W) uint8, foreground not 0.

    Returns:
        ``{"size": [H, W], "counts": TEXT}``: the lengths of the runs down the columns, background first.
    """
    height, width = mask.shape
    return {"size": [height, width], "counts": _compressed(_run_lengths(mask))}


def _run_lengths(mask: Mask) -> NDArray[np.int64]:
    """Lengths of the runs in column order; the first is of background and may be 0."""
    down = np.ascontiguousarray(mask.T).reshape(-1) != 0
    changes = np.flatnonzero(down[1:] != down[:-1]) + 1
    first = [0] if down.size and down[0] else []
    ends = np.concatenate([[0], first, changes, [down.size]]).astype(np.int64)
    return ends[1:] - ends[:-1]


def _compressed(lengths: NDArray[np.int64]) -> str:
    """As COCO's ``rleToString``: from the fourth on the difference to the length two before, then five bits a letter.

    The lowest bits come first; 32 marks that more follow, and the highest bit of the last five is the sign.
    """
    left = lengths.copy()
    left[3:] -= lengths[1:-2]
    letters, used = [], []
    going = np.ones(len(left), bool)
    while going.any():
        bits = left & 31
        left = left >> 5
        more = np.where(bits & 16, left != -1, left != 0) & going
        letters.append(bits + 32 * more + 48)
        used.append(going)
        going = more
    order = np.stack(used, axis=1)
    text: bytes = np.stack(letters, axis=1)[order].astype(np.uint8).tobytes()
    return text.decode("ascii")
