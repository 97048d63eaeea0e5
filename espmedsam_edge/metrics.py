"""Dice, IoU and Hausdorff distances of binary masks, without torch: for the device, the accuracy gate and the tables.

Masks are (H, W) arrays, bool or integer; every value but 0 is foreground (so 0/255 and 0/1 agree). The results are
MONAI's (DiceMetric, MeanIoU, HausdorffDistanceMetric) wherever both masks have foreground. Where MONAI gives NaN or
infinity, which no average survives:

* both masks empty: a correct "nothing here": Dice = IoU = 1, HD = HD95 = 0;
* one mask empty: Dice = IoU = 0, HD = HD95 = the largest distance between two pixels of the image, its diagonal.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from espmedsam_edge.errors import UserError

_CROSS = np.array([[0, 1, 0], [1, 1, 1], [0, 1, 0]], np.uint8)
_Binary = NDArray[np.uint8]  # (H, W), 0 or 1


@dataclass(frozen=True)
class Scores:
    """How well a prediction matches the truth: Dice and IoU in 0..1 (1 best), HD and HD95 in pixels (0 best)."""

    dice: float
    iou: float
    hd: float
    hd95: float

    def to_dict(self) -> dict[str, float]:
        """The four by name, in the same units."""
        return asdict(self)


def scores(prediction: NDArray[Any], truth: NDArray[Any]) -> Scores:
    """All four metrics of a pair of (H, W) masks at once; see the module for empty masks.

    Raises:
        UserError: the masks are not two-dimensional or not of one size.
    """
    pair = _binary_pair(prediction, truth)
    both, first, second = _counts(*pair)
    hd, hd95 = _hausdorff(*pair, percentiles=(100.0, 95.0))
    return Scores(_dice(both, first, second), _iou(both, first, second), hd, hd95)


def dice(prediction: NDArray[Any], truth: NDArray[Any]) -> float:
    """Dice coefficient 2|A∩B| / (|A| + |B|), 0..1; 1 where both masks are empty."""
    return _dice(*_counts(*_binary_pair(prediction, truth)))


def _binary_pair(prediction: NDArray[Any], truth: NDArray[Any]) -> tuple[_Binary, _Binary]:
    if prediction.shape != truth.shape or prediction.ndim != 2 or prediction.size == 0:
        raise UserError(
            f"cannot compare masks of shapes {prediction.shape} and {truth.shape}.",
            "Both must be (height, width) of the same size.",
        )
    return (prediction != 0).view(np.uint8), (truth != 0).view(np.uint8)


def _counts(prediction: _Binary, truth: _Binary) -> tuple[int, int, int]:
    """|A∩B|, |A|, |B| in pixels."""
    return int(np.count_nonzero(prediction & truth)), int(np.count_nonzero(prediction)), int(np.count_nonzero(truth))


def _dice(both: int, first: int, second: int) -> float:
    return 2 * both / (first + second) if first + second else 1.0


def _iou(both: int, first: int, second: int) -> float:
    union = first + second - both
    return both / union if union else 1.0


def _hausdorff(prediction: _Binary, truth: _Binary, percentiles: tuple[float, ...]) -> tuple[float, ...]:
    """Symmetric Hausdorff distances between the masks' edges in pixels, at percentiles (100: HD, 95: HD95).

    An edge pixel is a foreground pixel with a background or missing pixel among its four neighbours. Each direction
    takes the percentile (linear interpolation) of its edge pixels' distances to the other edge; the larger one counts.
    """
    if not prediction.any() and not truth.any():
        return (0.0,) * len(percentiles)
    if not prediction.any() or not truth.any():
        height, width = truth.shape
        return (math.hypot(height - 1, width - 1),) * len(percentiles)
    # Distances between edges depend on nothing outside the box around both masks.
    x, y, width, height = cv2.boundingRect(prediction | truth)
    edges = [_edge(mask[y : y + height, x : x + width]) for mask in (prediction, truth)]
    there, back = _distances(edges[0], edges[1]), _distances(edges[1], edges[0])
    return tuple(float(max(np.percentile(there, p), np.percentile(back, p))) for p in percentiles)


def _edge(mask: _Binary) -> NDArray[np.bool_]:
    """Foreground pixels that a 3x3 cross erodes; beyond the crop is background, as beyond the image."""
    padded = np.pad(mask, 1)
    inner = np.asarray(cv2.erode(padded, _CROSS), np.uint8)
    return np.asarray((padded != inner)[1:-1, 1:-1], np.bool_)


def _distances(edge: NDArray[np.bool_], other: NDArray[np.bool_]) -> NDArray[np.float32]:
    """Euclidean distance from every pixel of ``edge`` to the nearest of ``other``; neither is empty."""
    background = (~other).view(np.uint8)
    distance: Any = cv2.distanceTransform(background, cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    return np.asarray(distance[edge], np.float32)
