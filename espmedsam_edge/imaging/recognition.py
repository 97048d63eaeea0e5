"""Which modality a picture is of, told by its colours and coarse structure: a guess for convenience, never a diagnosis.

A linear classifier on a few dozen statistics of the picture at 64 x 64 pixels, fitted by ``tools/recognition.py`` on
the training images of public sets, with photographs as a class of their own. Its errors on test images stand in
``benchmarks/results/recognition-*.json``.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from espmedsam_edge.imaging.geometry import Frame

OTHER = "other"
"""The class of photographs and whatever else is none of the modalities."""

SURE = 0.9
"""The probability from which a guess is offered."""

_SIDE = 64
_FITTED = Path(__file__).with_name("recognition.json")


@dataclass(frozen=True)
class Guess:
    """The likeliest modality among those asked for, and its probability, 0..1."""

    modality: str
    probability: float

    @property
    def sure(self) -> bool:
        """Whether it is good enough to go by."""
        return self.probability >= SURE


@dataclass(frozen=True)
class Classifier:
    """A fitted linear classifier: ``scores = ((features - mean) / scale) @ weights + bias``, then softmax."""

    classes: tuple[str, ...]
    mean: NDArray[np.float64]  # (F,)
    scale: NDArray[np.float64]  # (F,)
    weights: NDArray[np.float64]  # (F, classes)
    bias: NDArray[np.float64]  # (classes,)

    def probabilities(self, features: NDArray[np.float64]) -> NDArray[np.float64]:
        """Features (..., F) to probabilities (..., classes)."""
        # Far outside what was fitted a linear score says nothing; its pull is limited.
        scores = np.clip((features - self.mean) / self.scale, -5, 5) @ self.weights + self.bias
        raised = np.exp(scores - scores.max(axis=-1, keepdims=True))
        return np.asarray(raised / raised.sum(axis=-1, keepdims=True))


def recognise(frame: Frame, among: Iterable[str]) -> Guess | None:
    """Guess the modality of a picture.

    Args:
        frame: (H, W, 3) uint8 BGR.
        among: the modalities to choose from.

    Returns:
        The likeliest of them, its probability taken over all classes there are; None when the classifier knows none
        of them.
    """
    classifier = fitted()
    names = set(among)
    probabilities = dict(zip(classifier.classes, classifier.probabilities(features(frame)), strict=True))
    known = [name for name in classifier.classes if name in names and name != OTHER]
    if not known:
        return None
    best = max(known, key=lambda name: probabilities[name])
    return Guess(best, float(probabilities[best]))


@lru_cache(maxsize=1)
def fitted() -> Classifier:
    """The classifier that comes with the program."""
    values = json.loads(_FITTED.read_text())
    arrays = {key: np.array(values[key], np.float64) for key in ("mean", "scale", "weights", "bias")}
    return Classifier(tuple(values["classes"]), **arrays)


def features(frame: Frame) -> NDArray[np.float64]:
    """What the classifier looks at, (F,): colours, their spread, histograms, edges and the light's distribution.

    Args:
        frame: (H, W, 3) uint8 BGR of any size.
    """
    small = np.asarray(cv2.resize(frame, (_SIDE, _SIDE), interpolation=cv2.INTER_AREA), np.float64) / 255
    blue, green, red = np.moveaxis(small, 2, 0)
    grey = small.mean(axis=2)
    saturation = small.max(axis=2) - small.min(axis=2)
    pairs = (red - green, green - blue)
    rows, columns = np.mgrid[:_SIDE, :_SIDE] / (_SIDE - 1) * 2 - 1
    radius = np.hypot(rows, columns)
    rings = [
        grey[(radius >= low) & (radius < high)].mean() for low, high in ((0, 0.4), (0.4, 0.8), (0.8, 1.1), (1.1, 2))
    ]
    edges = [np.abs(np.diff(grey, axis=axis)).mean() for axis in (0, 1)]
    values = [
        *(plane.mean() for plane in (blue, green, red)),
        *(plane.std() for plane in (blue, green, red)),
        *(pair.mean() for pair in pairs),
        *(pair.std() for pair in pairs),
        *(np.histogram(grey, 8, (0, 1))[0] / grey.size),
        *(np.histogram(saturation, 6, (0, 0.6))[0] / grey.size),
        saturation.max(),
        *rings,
        *edges,
        sum(edges) / (grey.std() + 0.02),
        grey[0].mean() - grey[-1].mean(),
        np.abs(grey - grey[:, ::-1]).mean(),
        (grey < 0.04).mean(),
        (grey > 0.96).mean(),
    ]
    return np.array(values)
