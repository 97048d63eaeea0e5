"""Which modality a picture is of, told by its colours and coarse structure: a guess for convenience, never a diagnosis.

A linear classifier on 300 statistics of the picture at 128 x 128 pixels, fitted by ``tools/recognition.py`` on the
training images of public sets and many changed copies of them, with photographs, pages and drawings as a class of their
own. Its errors by data set stand in ``benchmarks/results/recognition-*.json``.

The same statistics tell how much a picture is of the kind that a network was made for: ``confidences``, calibrated by
``tools/confidence.py`` (``benchmarks/results/confidence-*.json``).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from espmedsam_edge.imaging.geometry import Frame

OTHER = "other"
"""The class of photographs and whatever else is none of the modalities."""

SURE = 0.95
"""The probability from which a guess is offered."""

CLIP = 4.0
"""Far outside what was fitted a linear score says nothing; a feature's pull ends at so many standard deviations."""

ARRAYS = ("mean", "scale", "weights", "bias", "own_weights", "own_bias")
"""The arrays of a ``Classifier``."""

DOUBTFUL = 0.5
"""The confidence under which a picture counts as none of the network's kind."""

_WORTH_SAYING = 0.05
_SIDE, _HALF = 128, 64
_AROUND = ((-1, -1), (-1, 0), (-1, 1), (0, 1), (1, 1), (1, 0), (1, -1), (0, -1))  # in turn


def _rings() -> list[NDArray[np.bool_]]:
    rows, columns = np.mgrid[:_HALF, :_HALF] / (_HALF - 1) * 2 - 1
    radius = np.hypot(rows, columns)
    return [(radius >= low) & (radius < high) for low, high in ((0, 0.4), (0.4, 0.8), (0.8, 1.1), (1.1, 2))]


def _pattern_numbers() -> NDArray[np.int64]:
    """By code of 8 neighbours: how many are brighter, where these are in one piece; else 9."""
    bits = (np.arange(256)[:, None] >> np.arange(8)) & 1
    changes = (bits != np.roll(bits, -1, axis=1)).sum(axis=1)
    return np.where(changes <= 2, bits.sum(axis=1), 9)


_RINGS = _rings()
_PATTERN = _pattern_numbers()
_BANDS = np.array([1, 2, 3, 5, 8, 12, 18, 27, 40, 64])  # waves across the picture
_BAND = np.digitize(
    np.hypot(np.fft.fftfreq(_SIDE)[:, None] * _SIDE, np.fft.rfftfreq(_SIDE)[None] * _SIDE), _BANDS
)  # 0: the mean
_WINDOW = np.outer(np.hanning(_SIDE), np.hanning(_SIDE)).astype(np.float32)
_PART = (np.arange(_HALF) // 16)[:, None] * 4 + np.arange(_HALF) // 16
_FITTED = Path(__file__).with_name("recognition.json")


@dataclass(frozen=True)
class Guess:
    """The likeliest modality among those asked for, and its probability, 0..1."""

    modality: str
    probability: float
    familiar: bool = True
    """Whether the picture is like those of the class, not only less like those of the others."""

    @property
    def sure(self) -> bool:
        """Whether it is good enough to go by."""
        return self.probability >= SURE and self.familiar

    @property
    def per_cent(self) -> str:
        """The probability as it is said."""
        return f"{100 * self.probability:.0f} %"


@dataclass(frozen=True)
class Classifier:
    """A fitted linear classifier: ``scores = ((features - mean) / scale) @ weights + bias``, then softmax.

    Softmax says which class is the likeliest of those there are, even where a picture is like none. So each class has a
    second score, of itself against all others, which must be at least ``least``.
    """

    classes: tuple[str, ...]
    mean: NDArray[np.float64]  # (F,)
    scale: NDArray[np.float64]  # (F,)
    weights: NDArray[np.float64]  # (F, classes)
    bias: NDArray[np.float64]  # (classes,)
    own_weights: NDArray[np.float64]  # (F, classes)
    own_bias: NDArray[np.float64]  # (classes,)
    least: float
    kinds: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """By modality slope and bound: its confidence is the logistic function of slope x (log odds - bound)."""

    def standardised(self, features: NDArray[np.float64]) -> NDArray[np.float64]:
        """Features (..., F) as the weights take them."""
        return np.asarray(np.clip((features - self.mean) / self.scale, -CLIP, CLIP))

    def familiar(self, features: NDArray[np.float64]) -> NDArray[np.bool_]:
        """For features (..., F) whether they are like each class's, (..., classes)."""
        return np.asarray(self.standardised(features) @ self.own_weights + self.own_bias >= self.least)

    def log_odds(self, features: NDArray[np.float64]) -> NDArray[np.float64]:
        """For features (..., F) the logarithm of p/(1-p) of each class's probability, (..., classes)."""
        scores = self.standardised(features) @ self.weights + self.bias
        others = np.repeat(scores[..., None, :], scores.shape[-1], axis=-2)
        others[..., np.arange(scores.shape[-1]), np.arange(scores.shape[-1])] = -np.inf
        highest = others.max(axis=-1)
        return np.asarray(scores - highest - np.log(np.exp(others - highest[..., None]).sum(axis=-1)))

    def probabilities(self, features: NDArray[np.float64]) -> NDArray[np.float64]:
        """Features (..., F) to probabilities (..., classes)."""
        scores = self.standardised(features) @ self.weights + self.bias
        raised = np.exp(scores - scores.max(axis=-1, keepdims=True))
        return np.asarray(raised / raised.sum(axis=-1, keepdims=True))


@dataclass(frozen=True, eq=False)
class Look:
    """A picture as the classifier sees it: its features, (F,). Taken once, it answers every question below."""

    features: NDArray[np.float64]


def look(frame: Frame | Look) -> Look:
    """Look at a picture, (H, W, 3) uint8 BGR; takes 5 ms on one core, whatever its size."""
    return frame if isinstance(frame, Look) else Look(features(frame))


def confidences(frame: Frame | Look) -> dict[str, float]:
    """How much a picture, (H, W, 3) uint8 BGR, is of the kind of each modality that this is known for, 0 to 1.

    From ``DOUBTFUL`` on it counts as one of them: no image of that modality's validation list is below.
    """
    classifier = fitted()
    odds = classifier.log_odds(look(frame).features)
    return {
        name: float(1 / (1 + np.exp(-slope * (odds[classifier.classes.index(name)] - bound))))
        for name, (slope, bound) in classifier.kinds.items()
    }


def recognise(frame: Frame | Look, among: Iterable[str]) -> Guess | None:
    """Guess the modality of a picture.

    Args:
        frame: (H, W, 3) uint8 BGR.
        among: the modalities to choose from.

    Returns:
        The likeliest of them, its probability taken over all classes there are; None when the classifier knows none
        of them.
    """
    names = set(among) - {OTHER}
    return next((guess for guess in likely(frame) if guess.modality in names), None)


def likely(frame: Frame | Look) -> list[Guess]:
    """All that a picture, (H, W, 3) uint8 BGR, may be, ``OTHER`` too, the likeliest first."""
    classifier = fitted()
    found = look(frame).features
    each = zip(classifier.classes, classifier.probabilities(found), classifier.familiar(found), strict=True)
    guesses = [Guess(name, float(value), bool(familiar)) for name, value, familiar in each]
    return sorted(guesses, key=lambda guess: -guess.probability)


def likeliest(frame: Frame | Look, among: Iterable[str]) -> str:
    """The end of a sentence that says which two of some modalities are the likeliest; "" if none is likely at all."""
    names = set(among)
    said = [guess for guess in likely(frame) if guess.modality in names and guess.probability >= _WORTH_SAYING][:2]
    listed = " or ".join(f"{guess.modality} ({guess.per_cent})" for guess in said)
    return f"; the likeliest is {listed}" if listed else ""


def looks_otherwise(frame: Frame | Look, modality: str) -> str | None:
    """What a picture surely is that is not ``modality``: "fundus (98 %)"; None where it may well be."""
    guess = likely(frame)[0]
    if not guess.sure or guess.modality == modality:
        return None
    kind = "a kind of picture that no network here is for" if guess.modality == OTHER else guess.modality
    return f"{kind} ({guess.per_cent})"


def recognisable(names: Iterable[str]) -> list[str]:
    """Those of some modalities that the classifier knows, in their order."""
    known = set(fitted().classes) - {OTHER}
    return [name for name in names if name in known]


@lru_cache(maxsize=1)
def fitted() -> Classifier:
    """The classifier that comes with the program."""
    values = json.loads(_FITTED.read_text())
    arrays = {key: np.array(values[key], np.float64) for key in ARRAYS}
    kinds = {name: (slope, bound) for name, (slope, bound) in values.get("kinds", {}).items()}
    return Classifier(tuple(values["classes"]), least=values["least"], kinds=kinds, **arrays)


def features(frame: Frame) -> NDArray[np.float64]:
    """What the classifier looks at, (F,): colours, light, texture at two scales, spectrum, edges and dark borders.

    Args:
        frame: (H, W, 3) uint8 BGR of any size.
    """
    every = max(1, min(frame.shape[:2]) // 512)  # leaving rows out first saves most of a large picture's time
    large = _resized(frame[::every, ::every], _SIDE)
    small = _resized(large, _HALF)
    grey = np.asarray(cv2.cvtColor(large, cv2.COLOR_BGR2GRAY), np.uint8)
    half = _resized(grey, _HALF)
    parts = (
        _light(small),
        _colour(small),
        _spectrum(grey),
        _patterns(grey, 1),
        _patterns(grey, 6),
        _patterns(half, 3),
        _edges(half),
        _sharpness(grey),
        _layout(half),
        _borders(small),
        np.percentile(half, (1, 5, 25, 50, 75, 95, 99)) / 255,
    )
    return np.concatenate([np.asarray(part, np.float64) for part in parts])


def _resized(image: Any, side: int) -> Any:
    return cv2.resize(np.ascontiguousarray(image), (side, side), interpolation=cv2.INTER_AREA)


def _light(small: Frame) -> list[float]:
    """Means, spreads and histograms of brightness, colours and saturation; rings around the middle; symmetry."""
    values = small.astype(np.float64) / 255
    blue, green, red = np.moveaxis(values, 2, 0)
    grey = values.mean(axis=2)
    saturation = values.max(axis=2) - values.min(axis=2)
    pairs = (red - green, green - blue)
    edges = [np.abs(np.diff(grey, axis=axis)).mean() for axis in (0, 1)]
    return [
        *(plane.mean() for plane in (blue, green, red)),
        *(plane.std() for plane in (blue, green, red)),
        *(pair.mean() for pair in pairs),
        *(pair.std() for pair in pairs),
        *(np.histogram(grey, 8, (0, 1))[0] / grey.size),
        *(np.histogram(saturation, 6, (0, 0.6))[0] / grey.size),
        saturation.max(),
        *(grey[ring].mean() for ring in _RINGS),
        *edges,
        sum(edges) / (grey.std() + 0.02),
        grey[0].mean() - grey[-1].mean(),
        np.abs(grey - grey[:, ::-1]).mean(),
        (grey < 0.04).mean(),
        (grey > 0.96).mean(),
    ]


def _colour(small: Frame) -> list[float]:
    """Moments of the planes of Lab, how they go together, and which hues there are."""
    lab = lab_of(small).reshape(-1, 3).astype(np.float64)
    away = lab - lab.mean(axis=0)
    spread = away.std(axis=0)
    together = (away.T @ away) / len(lab) / (np.outer(spread, spread) + 1)
    a, b = lab[:, 1] - 128, lab[:, 2] - 128
    chroma = np.hypot(a, b)
    hues = np.histogram(np.arctan2(b, a), 8, (-np.pi, np.pi), weights=np.minimum(chroma, 40) / 40)[0] / len(lab)
    return [
        *(lab.mean(axis=0) / 128),
        *(spread / 64),
        *(np.cbrt((away**3).mean(axis=0)) / 64),
        *together[np.triu_indices(3, 1)],
        *hues,
        *(np.percentile(chroma, (50, 90, 99)) / 64),
    ]


@lru_cache(maxsize=1)
def _lab_tables() -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.int32]]:
    """sRGB's gamma by 8-bit value, the root by light, and planes of light by BGR over white's (D65), all scaled."""
    value, light = np.arange(256) / 255, np.arange(3072) / 2040
    linear = np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)
    root = np.where(light < 216 / 24389, light * 841 / 108 + 16 / 116, np.cbrt(light).astype(np.float32))
    planes = np.array([[0.412453, 0.357580, 0.180423], [0.212671, 0.715160, 0.072169], [0.019334, 0.119193, 0.950227]])
    whites = np.array([[0.950456], [1], [1.088754]])
    gamma, roots, from_rgb = (
        np.rint(one).astype(np.int32) for one in (2040 * linear, 32768 * root, 4096 * planes / whites)
    )
    return gamma, roots, from_rgb[:, ::-1]


def lab_of(image: Frame) -> NDArray[np.uint8]:
    """(H, W, 3) uint8 BGR as Lab, equal to OpenCV's, which takes a tenth of a second for tables at its first call."""
    gamma, roots, from_bgr = _lab_tables()
    x, y, z = np.moveaxis(roots[(gamma[image] @ from_bgr.T + 2048) >> 12], -1, 0)
    planes = (296 * y - 1336934, 500 * (x - y) + (128 << 15), 200 * (y - z) + (128 << 15))
    return np.asarray(np.clip((np.stack(planes, -1) + (1 << 14)) >> 15, 0, 255), np.uint8)


def _spectrum(grey: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Power in rings of spatial frequency, of the picture with its contrast made 1."""
    values = grey.astype(np.float32)
    power = np.abs(np.fft.rfft2((values - values.mean()) / (values.std() + 4) * _WINDOW)) ** 2
    sums = np.bincount(_BAND.ravel(), power.ravel(), minlength=len(_BANDS) + 1)[1:]
    return np.asarray(np.log10(sums + 0.1))


def _patterns(grey: NDArray[np.uint8], margin: int) -> NDArray[np.float64]:
    """Shares of the uniform local binary patterns, turned alike (Ojala 2002); ``margin``: what counts as brighter."""
    values = grey.astype(np.int16)
    height, width = values.shape
    middle = values[1:-1, 1:-1] + margin
    codes = np.zeros(middle.shape, np.uint8)
    for bit, (down, right) in enumerate(_AROUND):
        codes |= (values[1 + down : height - 1 + down, 1 + right : width - 1 + right] > middle).astype(np.uint8) << bit
    return np.bincount(_PATTERN[codes].ravel(), minlength=10) / codes.size


def _edges(half: NDArray[np.uint8]) -> NDArray[np.float64]:
    """How strong edges of 6 directions are in each of 4 x 4 parts, together 1 where there are any."""
    across, down = (cv2.Sobel(half, cv2.CV_32F, *order) / 8 for order in ((1, 0), (0, 1)))
    turn = np.minimum((np.mod(np.arctan2(down, across), np.pi) / np.pi * 6).astype(int), 5)
    found = np.bincount((_PART * 6 + turn).ravel(), np.hypot(across, down).ravel(), minlength=96)
    return np.asarray(np.sqrt(found / (found.sum() + 50)))


def _sharpness(grey: NDArray[np.uint8]) -> list[float]:
    """Differences between neighbours and the Laplacian, relative to the contrast, and where there are none."""
    values = grey.astype(np.float32)
    steps = [np.abs(np.diff(values, axis=axis)) for axis in (0, 1)]
    strengths = [*steps, np.abs(cv2.Laplacian(values, cv2.CV_32F))]
    spread = values.std() + 4
    return [
        *(float(np.log10(one.mean() / spread + 1e-3)) for one in strengths),
        *(float((one < 1).mean()) for one in strengths),
        float(np.log10((steps[0].mean() + 0.1) / (steps[1].mean() + 0.1))),
    ]


def _layout(half: NDArray[np.uint8]) -> NDArray[np.float64]:
    """The picture at 8 x 8, its contrast made 1."""
    tiny = _resized(half, 8).astype(np.float64)
    return np.asarray(np.clip((tiny - tiny.mean()) / (tiny.std() + 8), -3, 3).ravel())


def _borders(small: Frame) -> list[float]:
    """The share of black in the border's 28 parts of 8 x 8, in the middle and in all."""
    black = small.max(axis=2) < 14
    parts = black.reshape(8, 8, 8, 8).mean(axis=(1, 3))
    return [*parts[0], *parts[-1], *parts[1:-1, 0], *parts[1:-1, -1], parts[2:-2, 2:-2].mean(), black.mean()]
