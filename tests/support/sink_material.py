"""Results and sources for tests of sinks: the mask of each frame is known."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from espmedsam_edge.runtime.segmentation import Segmentation, Timings
from espmedsam_edge.runtime.sources.files import VideoFile


def result_of(mask: np.ndarray, modality: str = "fundus") -> Segmentation:
    """A result with this mask, (H, W) of 0 and 255 or of booleans."""
    if mask.dtype == bool:
        mask = mask.astype(np.uint8) * 255
    return Segmentation(mask, modality, np.zeros((16, 16), np.float32), 0.5, Timings(0.001, 0.002, 0.003))


def blob(size: tuple[int, int], number: int = 0) -> np.ndarray:
    """A rectangle with a hole, and a single pixel: (H, W) uint8, 0 or 255."""
    mask = np.zeros(size, np.uint8)
    mask[4:20, 6 + number : 30 + number] = 255
    mask[8:12, 10:14] = 0
    mask[size[0] - 3, size[1] - 5] = 255
    return mask


def source_of(path: Path = Path("camera"), *, live: bool = False, fps: Any = Fraction(10)) -> VideoFile:
    """A video that is never opened, or one that claims to be live."""
    source = VideoFile(path)
    source.fps = fps
    source.live = live
    return source
