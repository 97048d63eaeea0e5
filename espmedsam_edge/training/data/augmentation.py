"""Random changes of training images: typed settings a modality, and their exact, repeatable application.

Geometry and blur are torchvision v2's. The mask rides as a fourth channel through the geometry, so the two cannot
part. Every random number comes from a generator given with the image: no global random state is read or moved, which
makes runs repeatable with any number of loading threads and resumable in the middle of an epoch.
"""

from __future__ import annotations

import math
from typing import Annotated

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor
from torchvision.transforms.v2 import functional as v2

Probability = Annotated[float, Field(ge=0, le=1)]
Strength = Annotated[float, Field(ge=0, lt=1)]

_LUMA = np.array([0.299, 0.587, 0.114])
# NTSC's colour space: hue is an angle in its last two axes (rows: Y, I, Q of R, G, B).
_YIQ = np.array([[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])


class Augmentation(BaseModel):
    """What may happen to an image of one modality, and how strongly.

    Attributes:
        horizontal_flip, vertical_flip: their probabilities.
        quarter_turns: whether it is turned by 0, 90, 180 or 270 degrees.
        smallest_crop: a crop keeps at least this share of each side and is stretched back; 1 never crops.
        brightness, contrast, saturation: factors are drawn from 1 - x to 1 + x.
        hue: shifts are drawn from -x to x of a whole turn.
        blur: probability of a Gaussian blur of 0.3 to 1.5 pixels at 512, in proportion at other sizes.
        noise: largest deviation of Gaussian noise, of the range 0..1; half of the images get some.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    horizontal_flip: Probability = 0.5
    vertical_flip: Probability = 0.5
    quarter_turns: bool = True
    smallest_crop: Annotated[float, Field(gt=0.1, le=1)] = 0.7
    brightness: Strength = 0.2
    contrast: Strength = 0.2
    saturation: Strength = 0.15
    hue: Annotated[float, Field(ge=0, le=0.5)] = 0.02
    blur: Probability = 0.1
    noise: Annotated[float, Field(ge=0, le=0.5)] = 0.02


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


def default_augmentation(modality: str) -> Augmentation:
    """The settings a modality is trained with unless the recipe says otherwise."""
    return _BY_MODALITY.get(modality, Augmentation())


def augment(
    image: NDArray[np.uint8], mask: NDArray[np.uint8], settings: Augmentation, rng: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """Change an image and its mask at random.

    Args:
        image: (S, S, 3) uint8 RGB.
        mask: (S, S) uint8, 0 or 255.
        settings: what may happen.
        rng: the only source of chance; the same state gives the same result.

    Returns:
        The image, (3, S, S) float32 in 0..255, and the mask, (1, S, S) float32, 0 or 1.
    """
    size = image.shape[0]
    stacked = torch.from_numpy(np.dstack([image, mask])).permute(2, 0, 1)  # (4, S, S) uint8, channels last in memory
    stacked = _geometry(stacked, settings, rng)
    pixels, target = stacked[:3], stacked[3:]
    if rng.random() < settings.blur:
        sigma = float(rng.uniform(0.3, 1.5)) * size / 512
        width = 2 * math.ceil(3 * sigma) + 1
        pixels = v2.gaussian_blur(pixels, [width, width], [sigma, sigma])
    color = _color(pixels, settings, rng)
    amount = float(rng.uniform(-1, 1)) * settings.noise  # negative half the time: none
    if amount > 0:
        color += torch.from_numpy(rng.standard_normal(color.shape, np.float32)) * (255 * amount)
        color.clamp_(0, 255)
    return color, (target >= 128).float()


def _geometry(stacked: Tensor, settings: Augmentation, rng: np.random.Generator) -> Tensor:
    size = stacked.shape[-1]
    if settings.smallest_crop < 1:
        sides = [max(1, round(size * share)) for share in rng.uniform(settings.smallest_crop, 1, 2)]
        top, left = (int(rng.integers(0, size - side + 1)) for side in sides)
        stacked = v2.resized_crop(stacked, top, left, sides[0], sides[1], [size, size], antialias=False)
    if rng.random() < settings.horizontal_flip:
        stacked = v2.horizontal_flip(stacked)
    if rng.random() < settings.vertical_flip:
        stacked = v2.vertical_flip(stacked)
    if settings.quarter_turns:
        stacked = torch.rot90(stacked, int(rng.integers(0, 4)), (1, 2))
    return stacked


def _color(pixels: Tensor, settings: Augmentation, rng: np.random.Generator) -> Tensor:
    """Brightness, contrast, saturation and hue as one matrix, for each is linear in RGB: one pass, not five.

    (3, S, S) uint8 to (3, S, S) float32 in 0..255. torchvision's hue alone, through HSV, takes longer than all else.
    """
    brightness, contrast, saturation = (
        1 + float(rng.uniform(-x, x)) for x in (settings.brightness, settings.contrast, settings.saturation)
    )
    turn = 2 * math.pi * float(rng.uniform(-settings.hue, settings.hue))
    planes = pixels.reshape(3, -1).float()
    if settings.brightness == settings.contrast == settings.saturation == settings.hue == 0:
        return planes.reshape(pixels.shape)
    rotation = np.array([[1, 0, 0], [0, math.cos(turn), -math.sin(turn)], [0, math.sin(turn), math.cos(turn)]])
    matrix = np.linalg.inv(_YIQ) @ rotation @ _YIQ
    matrix = saturation * matrix + (1 - saturation) * np.outer(np.ones(3), _LUMA) @ matrix
    # Contrast is about the mean grey, as in torchvision; brightness scales the result.
    # NumPy's mean, because torch's depends on how many threads share the sum.
    grey = float(_LUMA @ pixels.reshape(3, -1).numpy().mean(axis=1, dtype=np.float64))
    offset = brightness * (1 - contrast) * grey
    # Written out, because a matrix product of three rows would start as many threads as one of three thousand.
    changed = torch.full_like(planes, offset)
    for row, weights in zip(changed, brightness * contrast * matrix, strict=True):
        for plane, weight in zip(planes, weights, strict=True):
            row.add_(plane, alpha=float(weight))
    return changed.clamp_(0, 255).reshape(pixels.shape)
