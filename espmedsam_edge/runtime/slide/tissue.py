"""Where a slide has tissue, so that empty glass costs nothing."""

from __future__ import annotations

from functools import reduce

import cv2
import numpy as np
from numpy.typing import NDArray

from espmedsam_edge.imaging.crop import Crop
from espmedsam_edge.imaging.geometry import Frame

_BRIGHT = 200  # of glass under a lamp
_LEAST_GLASS = 0.01  # of the slide
_LEAST, _MOST = 12.0, 40.0  # levels between tissue and glass; noise is below, and pale tissue is not above
_RIM = 2  # pixels of the overview around tissue that count as tissue


class Tissue:
    """What differs from glass in an overview: under a lamp glass is bright, in fluorescence dark.

    Args:
        overview: (h, w, 3) uint8 BGR of the whole slide.
        size: (H, W) of the level whose parts are asked for.
        everywhere: count all as tissue.
    """

    def __init__(self, overview: Frame, size: tuple[int, int], *, everywhere: bool = False) -> None:
        self.mask: NDArray[np.bool_] = np.ones(overview.shape[:2], np.bool_) if everywhere else tissue_mask(overview)
        self._down, self._across = overview.shape[0] / size[0], overview.shape[1] / size[1]

    def among(self, place: Crop) -> bool:
        """Whether there is any in a part of the level."""
        top, left = int(place.y * self._down), int(place.x * self._across)
        bottom, right = (place.y + place.height) * self._down, (place.x + place.width) * self._across
        return bool(
            self.mask[top : max(top + 1, int(np.ceil(bottom))), left : max(left + 1, int(np.ceil(right)))].any()
        )


def tissue_mask(overview: Frame) -> NDArray[np.bool_]:
    """(h, w) bool: what is no glass, with a rim."""
    channels = cv2.split(cv2.medianBlur(overview, 3))
    bright = reduce(cv2.min, channels) >= _BRIGHT
    among = bright if bright.mean() >= _LEAST_GLASS else np.ones_like(bright)
    glass = [int(np.bincount(channel[among], minlength=256).argmax()) for channel in channels]
    distance = reduce(
        cv2.max, [cv2.absdiff(one, np.full_like(one, level)) for one, level in zip(channels, glass, strict=True)]
    )
    otsu, _ = cv2.threshold(distance, 0, 255, cv2.THRESH_BINARY | cv2.THRESH_OTSU)
    found = np.asarray(distance > np.clip(otsu, _LEAST, _MOST), np.uint8)
    side = 2 * _RIM + 1
    return np.asarray(cv2.dilate(found, np.ones((side, side), np.uint8)) > 0, np.bool_)
