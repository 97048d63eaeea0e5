"""Whether images look like their modality: brightness, contrast, colour and roughness against known ranges."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from espmedsam_edge.imaging.geometry import Frame

FEATURES = ("brightness", "contrast", "saturation", "warmth (red minus blue)", "roughness")
_SIDE = 128  # pixels; features of a picture's large structure, whatever the camera's resolution

_Interval = tuple[float, float]

# Intervals for the mean over a set, in grey levels (roughness: neighbouring difference over contrast). They hold the
# 1st to 99th percentile of single images of public sets (PH2, COVID chest films, DRIVE, CVC-ClinicDB, BUSI, DSB 2018
# and white blood cells), widened by a tenth.
_KNOWN: dict[str, tuple[_Interval, ...]] = {
    "dermoscopy": ((70, 215), (15, 62), (25, 136), (15, 136), (0.05, 0.35)),
    "xray": ((80, 188), (14, 82), (0, 3), (-2, 2), (0.05, 0.25)),
    "fundus": ((44, 125), (25, 72), (50, 136), (50, 136), (0.03, 0.15)),
    "colonoscopy": ((40, 142), (30, 78), (20, 136), (20, 136), (0.03, 0.25)),
    "ultrasound": ((44, 155), (28, 78), (0, 8), (-6, 6), (0.05, 0.25)),
    "microscopy": ((3, 240), (4, 76), (0, 120), (-60, 113), (0.02, 0.35)),
}


@dataclass
class Resemblance:
    """Collects the features of pictures; ``warning`` compares their mean with the modality's ranges."""

    modality: str
    total: NDArray[np.float64]
    count: int = 0

    @classmethod
    def of(cls, modality: str) -> Resemblance:
        """An empty collection."""
        return cls(modality, np.zeros(len(FEATURES)))

    def add(self, frame: Frame) -> None:
        """Take in one picture, (H, W, 3) uint8 BGR."""
        self.total += features(frame)
        self.count += 1

    def warning(self) -> str | None:
        """One sentence naming what is far off, or None; modalities that a user added are not judged."""
        known = _KNOWN.get(self.modality)
        if known is None or not self.count:
            return None
        mean = self.total / self.count
        off = [
            f"{name} {value:.2g} where {low:g} to {high:g} is usual"
            for name, value, (low, high) in zip(FEATURES, mean, known, strict=True)
            if not low <= value <= high
        ]
        if not off:
            return None
        return f"These images do not look like {self.modality}: {'; '.join(off)}. Check that they are the right ones."


def features(frame: Frame) -> NDArray[np.float64]:
    """The values of ``FEATURES`` for one picture."""
    small = np.asarray(cv2.resize(frame, (_SIDE, _SIDE), interpolation=cv2.INTER_AREA), np.float64)
    grey = small.mean(axis=2)
    roughness = np.abs(np.diff(grey, axis=1)).mean() / (grey.std() + 1)
    saturation = (small.max(axis=2) - small.min(axis=2)).mean()
    warmth = (small[..., 2] - small[..., 0]).mean()
    return np.array([grey.mean(), grey.std(), saturation, warmth, roughness])
