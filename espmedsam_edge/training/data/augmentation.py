"""Random changes of training images: typed settings a modality, and one draw of them as plain numbers.

``draw`` turns settings and a generator into a ``Change``; ``image_augmentation`` applies one to an image,
``batch_augmentation`` many to a batch on the training device. Every random number comes from the generator given with
the image: no global random state is read or moved, which makes runs repeatable with any number of loading threads and
resumable in the middle of an epoch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, Field

Probability = Annotated[float, Field(ge=0, le=1)]
Strength = Annotated[float, Field(ge=0, lt=1)]

LUMA = np.array([0.299, 0.587, 0.114])
# NTSC's colour space: hue is an angle in its last two axes (rows: Y, I, Q of R, G, B).
_YIQ = np.array([[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])
_RGB = np.linalg.inv(_YIQ)

BEND_POINTS = 5  # control points of the bending along a side, the outer ones in the corners
LIGHT_POINTS = 4  # and of the light
NOISE_VALUES = 1 << 22  # what ``noise_bank`` holds
_TURNED = 0.7  # share of the images that are turned by an angle, where turning is asked for
_BENT = 0.5  # and bent, and lit unevenly
_SMALLEST_EMPTY = 0.4  # a crop beside the target keeps at least this share of a side


class Augmentation(BaseModel, extra="forbid", frozen=True):
    """What may happen to an image of one modality, and how strongly.

    Attributes:
        horizontal_flip, vertical_flip: their probabilities.
        quarter_turns: whether it is turned by 0, 90, 180 or 270 degrees.
        smallest_crop: a crop keeps at least this share of each side and is stretched back; 1 never crops.
        largest_crop: and at most this; above 1 the picture is shrunk and mirrored at its border.
        turn: largest angle of a turn, in degrees; seven of ten images are turned.
        elastic: largest deviation of a smooth bending, of half a side; half of the images are bent.
        negative: probability of a crop from beside the target, where there is room for one.
        brightness, contrast, saturation: factors are drawn from 1 - x to 1 + x.
        hue: shifts are drawn from -x to x of a whole turn.
        light: largest deviation of the logarithm of uneven light; half of the images are lit so.
        gamma: exponents are drawn from exp(-x) to exp(x).
        blur: probability of a Gaussian blur of 0.3 to 1.5 pixels at 512, in proportion at other sizes.
        noise: largest deviation of Gaussian noise, of the range 0..1; half of the images get some.
        paste: probability that a rectangle of the batch's image before it, with its mask, covers a part.
    """

    horizontal_flip: Probability = 0.5
    vertical_flip: Probability = 0.5
    quarter_turns: bool = True
    smallest_crop: Annotated[float, Field(gt=0.1, le=1)] = 0.7
    largest_crop: Annotated[float, Field(ge=1, le=1.5)] = 1.0
    turn: Annotated[float, Field(ge=0, le=180)] = 0.0
    elastic: Annotated[float, Field(ge=0, le=0.1)] = 0.0
    negative: Probability = 0.0
    brightness: Strength = 0.2
    contrast: Strength = 0.2
    saturation: Strength = 0.15
    hue: Annotated[float, Field(ge=0, le=0.5)] = 0.02
    light: Strength = 0.0
    gamma: Strength = 0.0
    blur: Probability = 0.1
    noise: Annotated[float, Field(ge=0, le=0.5)] = 0.02
    paste: Probability = 0.0


NO_AUGMENTATION = Augmentation(
    horizontal_flip=0, vertical_flip=0, quarter_turns=False, smallest_crop=1, brightness=0, contrast=0, saturation=0,
    hue=0, blur=0, noise=0,
)  # fmt: skip

_BY_MODALITY: dict[str, Augmentation] = {
    # A chest film hangs upright and a fan opens downwards; both are grey.
    "xray": Augmentation(vertical_flip=0, quarter_turns=False, smallest_crop=0.8, saturation=0, hue=0),
    "ultrasound": Augmentation(vertical_flip=0, quarter_turns=False, smallest_crop=0.8, saturation=0, hue=0),
    # Blur and shrinking would wipe out the capillaries that the masks show.
    "fundus": Augmentation(quarter_turns=False, blur=0, hue=0.03),
    "dermoscopy": Augmentation(hue=0.03),
    "colonoscopy": Augmentation(brightness=0.3),
    "microscopy": Augmentation(brightness=0.3, contrast=0.3, smallest_crop=0.6),
    "histopathology": Augmentation(saturation=0.25, hue=0.05, smallest_crop=0.6),
}
# Where targets are single things on a background, another picture's part may cover some of it.
_PASTE = {"colonoscopy": 0.3, "microscopy": 0.3, "dermoscopy": 0.2}


def default_augmentation(modality: str) -> Augmentation:
    """The settings a modality is trained with unless the recipe says otherwise."""
    return _BY_MODALITY.get(modality, Augmentation())


def strong_augmentation(modality: str) -> Augmentation:
    """``default_augmentation`` and more: for long runs on few images (``data.augment = "strong"``)."""
    usual = default_augmentation(modality)
    return usual.model_copy(
        update={
            "smallest_crop": round(usual.smallest_crop - 0.1, 2),
            "largest_crop": 1.1,
            "turn": 180.0 if usual.quarter_turns else 15.0,
            "elastic": 0.03,
            "light": 0.15,
            "gamma": 0.2,
            "blur": 2 * usual.blur,
            "paste": _PASTE.get(modality, 0.0),
        }
    )


class Box(NamedTuple):
    """A rectangle in whole pixels; it may reach beyond the image."""

    top: int
    left: int
    height: int
    width: int


@dataclass(frozen=True)
class Change:
    """What happens to one image, as numbers: ``draw`` makes it, two modules apply it.

    An output pixel at (x, y) in -1..1 is looked up in the image so: mirrored, turned, moved by the bending, stretched
    to ``box``. Then, with pixels in 0..255: blurred, ``gain`` and ``offset`` of colour, light, clamped, gamma, noise,
    clamped.

    Attributes:
        side: of the result in pixels.
        box: the part of the image that becomes the result.
        mirror: horizontally, vertically.
        angle: of the turn, in radians, clockwise as seen.
        bend: (2, 5, 5) float32, x and y, of half a side at control points; None: none.
        sigma: of the blur in pixels; 0: none.
        gain: (3, 3) float64, RGB from RGB.
        offset: added, as a factor of the image's mean grey (contrast is about it).
        light: (4, 4) float32, logarithms at control points; None: even.
        gamma: exponent.
        noise: deviation, of 0..1; 0: none.
        noise_at: where in ``noise_bank`` it begins.
        pasted: what the batch's image before it covers; None: nothing.
    """

    side: int
    box: Box
    mirror: tuple[bool, bool] = (False, False)
    angle: float = 0.0
    bend: NDArray[np.float32] | None = None
    sigma: float = 0.0
    gain: NDArray[np.float64] | None = None
    offset: float = 0.0
    light: NDArray[np.float32] | None = None
    gamma: float = 1.0
    noise: float = 0.0
    noise_at: int = 0
    pasted: Box | None = None

    def placement(self, whole: int) -> NDArray[np.float64]:
        """(2, 3): from an output pixel's (x, y, 1) in -1..1 to the image's, whose sides are ``whole`` pixels."""
        stretch = np.array([self.box.width, self.box.height]) / whole
        centre = np.array([2 * self.box.left + self.box.width, 2 * self.box.top + self.box.height]) / whole - 1
        cosine, sine = math.cos(self.angle), math.sin(self.angle)
        turned = np.array([[cosine, -sine], [sine, cosine]]) * [-1 if on else 1 for on in self.mirror]
        return np.column_stack([stretch[:, None] * turned, centre])

    @property
    def quarters(self) -> int | None:
        """Quarter turns, if each output pixel is exactly one of the image's; else None."""
        turns = self.angle / (math.pi / 2)
        exact = self.bend is None and self.box.height == self.box.width == self.side
        return round(turns) % 4 if exact and abs(turns - round(turns)) < 1e-9 else None


def draw(settings: Augmentation, whole: int, side: int, rng: np.random.Generator, target: Box | None = None) -> Change:
    """What happens to one image.

    Args:
        settings: what may happen.
        whole: side of the image in pixels.
        side: of the result; smaller than ``whole``: a window at a random place.
        rng: the only source of chance; the same state gives the same result.
        target: the smallest box around the image's target, for ``settings.negative``; None: it has none.
    """
    box = _box(settings, whole, side, rng, target)
    mirror = (bool(rng.random() < settings.horizontal_flip), bool(rng.random() < settings.vertical_flip))
    angle = int(rng.integers(0, 4)) * math.pi / 2 if settings.quarter_turns else 0.0
    if settings.turn and rng.random() < _TURNED:
        angle += math.radians(float(rng.uniform(-settings.turn, settings.turn)))
    bend = light = None
    if settings.elastic and rng.random() < _BENT:
        bend = rng.standard_normal((2, BEND_POINTS, BEND_POINTS), np.float32)
        bend *= np.float32(rng.uniform(0, settings.elastic))
    sigma = float(rng.uniform(0.3, 1.5)) * side / 512 if rng.random() < settings.blur else 0.0
    gain, offset = _colour(settings, rng)
    if settings.light and rng.random() < _BENT:
        light = rng.standard_normal((LIGHT_POINTS, LIGHT_POINTS), np.float32)
        light *= np.float32(rng.uniform(0, settings.light))
    gamma = math.exp(float(rng.uniform(-settings.gamma, settings.gamma))) if settings.gamma else 1.0
    noise = max(0.0, float(rng.uniform(-1, 1)) * settings.noise)  # negative half the time: none
    noise_at = int(rng.integers(0, NOISE_VALUES))
    pasted = _rectangle(side, rng) if settings.paste and rng.random() < settings.paste else None
    return Change(side, box, mirror, angle, bend, sigma, gain, offset, light, gamma, noise, noise_at, pasted)


def box_around(mask: NDArray[np.uint8]) -> Box | None:
    """The smallest box around what is not 0 in (S, S); None where nothing is."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not len(rows):
        return None
    top, left = int(rows[0]), int(columns[0])
    return Box(top, left, int(rows[-1]) + 1 - top, int(columns[-1]) + 1 - left)


def _box(settings: Augmentation, whole: int, side: int, rng: np.random.Generator, target: Box | None) -> Box:
    shares = np.ones(2)
    if settings.smallest_crop < 1 or settings.largest_crop > 1:
        shares = rng.uniform(settings.smallest_crop, settings.largest_crop, 2)
    height, width = (max(1, round(side * share)) for share in shares)
    room = Box(0, 0, whole, whole)
    if settings.negative and target is not None and rng.random() < settings.negative:
        room = _beside(target, whole, side, rng) or room
        height, width = min(height, room.height), min(width, room.width)
    top, left = (
        start + int(rng.integers(min(0, free), max(0, free) + 1))
        for start, free in ((room.top, room.height - height), (room.left, room.width - width))
    )
    return Box(top, left, height, width)


def _beside(target: Box, whole: int, side: int, rng: np.random.Generator) -> Box | None:
    """One of the strips above, below, left and right of the target that are wide enough; None: there is none."""
    bottom, right = target.top + target.height, target.left + target.width
    strips = [
        Box(0, 0, target.top, whole),
        Box(bottom, 0, whole - bottom, whole),
        Box(0, 0, whole, target.left),
        Box(0, right, whole, whole - right),
    ]
    wide = [strip for strip in strips if min(strip.height, strip.width) >= _SMALLEST_EMPTY * side]
    return wide[int(rng.integers(len(wide)))] if wide else None


def _colour(settings: Augmentation, rng: np.random.Generator) -> tuple[NDArray[np.float64] | None, float]:
    """Brightness, contrast, saturation and hue as one matrix, for each is linear in RGB: one pass, not five.

    Contrast is about the mean grey, as in torchvision; brightness scales the result.
    """
    brightness, contrast, saturation = (
        1 + float(rng.uniform(-x, x)) for x in (settings.brightness, settings.contrast, settings.saturation)
    )
    turn = 2 * math.pi * float(rng.uniform(-settings.hue, settings.hue))
    if settings.brightness == settings.contrast == settings.saturation == settings.hue == 0:
        return None, 0.0
    rotation = np.array([[1, 0, 0], [0, math.cos(turn), -math.sin(turn)], [0, math.sin(turn), math.cos(turn)]])
    matrix = _RGB @ rotation @ _YIQ
    matrix = saturation * matrix + (1 - saturation) * np.outer(np.ones(3), LUMA) @ matrix
    return brightness * contrast * matrix, brightness * (1 - contrast)


def _rectangle(side: int, rng: np.random.Generator) -> Box:
    """A fifth to three fifths of a side each way, about a place anywhere in the image, cut at its border."""
    (height, width), (y, x) = rng.uniform(0.1, 0.3, 2) * side, rng.uniform(0, 1, 2) * side
    top, left = max(0, round(y - height)), max(0, round(x - width))
    return Box(top, left, min(side, round(y + height)) - top, min(side, round(x + width)) - left)
