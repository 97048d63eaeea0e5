"""One image's random change on the processor: the reference for the batches that ``batch_augmentation`` makes."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from torchvision.transforms.v2 import functional as v2

from espmedsam_edge.training.data.augmentation import LUMA, NOISE_VALUES, Augmentation, Box, Change, box_around, draw

MASK_FROM = 128  # of 0..255, after interpolation


def augment(
    image: NDArray[np.uint8],
    mask: NDArray[np.uint8],
    settings: Augmentation,
    rng: np.random.Generator,
    side: int | None = None,
) -> tuple[Tensor, Tensor, Change]:
    """Change an image and its mask at random.

    Args:
        image: (S, S, 3) uint8 RGB.
        mask: (S, S) uint8, 0 or 255.
        settings: what may happen.
        rng: the only source of chance; the same state gives the same result.
        side: of the result; None: S.

    Returns:
        The image, (3, side, side) float32 in 0..255; the mask, (1, side, side) float32, 0 or 1; and what was drawn,
        whose ``pasted`` is left to ``paste``, for it needs the batch.
    """
    target = box_around(mask) if settings.negative else None
    change = draw(settings, len(image), side or len(image), rng, target)
    return *apply(image, mask, change), change


def apply(image: NDArray[np.uint8], mask: NDArray[np.uint8], change: Change) -> tuple[Tensor, Tensor]:
    """Do to an image what was drawn; shapes and ranges as in ``augment``."""
    # The mask rides as a fourth channel through the geometry, so the two cannot part.
    stacked = torch.from_numpy(np.dstack([image, mask])).permute(2, 0, 1)
    moved = _sampled(stacked, change) if change.quarters is None else _rearranged(stacked, change)
    return _coloured(moved[:3], change), (moved[3:] >= MASK_FROM).float()


def paste(images: Tensor, masks: Tensor | None, rectangles: Sequence[Box | None]) -> None:
    """Cover a part of each image that has a rectangle with the same part of the image before it, masks alike.

    Args:
        images: (B, 3, S, S), changed in place; each part is copied from what was there before the call.
        masks: (B, 1, S, S), likewise, or None.
        rectangles: one an image.
    """
    for values in (images, masks):
        if values is not None:
            places = [
                (row, (..., slice(box.top, box.top + box.height), slice(box.left, box.left + box.width)))
                for row, box in enumerate(rectangles)
                if box is not None
            ]
            parts = [values[row - 1][place].clone() for row, place in places]
            for (row, place), part in zip(places, parts, strict=True):
                values[row][place] = part


@functools.cache
def noise_bank() -> Tensor:
    """(NOISE_VALUES,) float32, normal: drawn once, for drawing it anew takes longer than all else about an image."""
    return torch.from_numpy(np.random.default_rng(20_407).standard_normal(NOISE_VALUES, np.float32))


def noise_indices(change: Change, count: int) -> slice | Tensor:
    """Where in the bank an image's ``count`` values are; it is a ring."""
    if change.noise_at + count <= NOISE_VALUES:
        return slice(change.noise_at, change.noise_at + count)
    return torch.arange(change.noise_at, change.noise_at + count) % NOISE_VALUES


def _rearranged(stacked: Tensor, change: Change) -> Tensor:
    """A window mirrored and turned by quarters: every pixel one of the image's, at the border mirrored."""
    top, left, height, width = change.box
    whole = stacked.shape[-1]
    rows, columns = (_mirrored(np.arange(start, start + size), whole) for start, size in ((top, height), (left, width)))
    part = stacked[:, rows][:, :, columns]
    part = torch.rot90(part, change.quarters or 0, (1, 2))
    dims = [dim for dim, on in zip((2, 1), change.mirror, strict=True) if on]
    return part.flip(dims).float()


def _mirrored(places: NDArray[np.int64], count: int) -> Tensor:
    around = places % (2 * count)
    return torch.from_numpy(np.where(around < count, around, 2 * count - 1 - around))


def _sampled(stacked: Tensor, change: Change) -> Tensor:
    side, whole = change.side, stacked.shape[-1]
    line = (2 * np.arange(side) + 1) / side - 1
    x, y = line[None, :], line[:, None]
    (a, b, c), (d, e, f) = change.placement(whole)
    across, down = a * x + b * y + c, d * x + e * y + f
    if change.bend is not None:
        bend = upsampled(torch.from_numpy(change.bend)[None], side)[0].numpy()
        across, down = across + change.box.width / whole * bend[0], down + change.box.height / whole * bend[1]
    grid = torch.from_numpy(np.stack([across, down], axis=-1).astype(np.float32))
    pixels = stacked.float()[None]
    return F.grid_sample(pixels, grid[None], mode="bilinear", padding_mode="reflection", align_corners=False)[0]


def upsampled(points: Tensor, side: int) -> Tensor:
    """Control points (B, C, n, n), the outer ones in the corners, as smooth fields (B, C, side, side)."""
    return F.interpolate(points, (side, side), mode="bicubic", align_corners=True)


def _coloured(pixels: Tensor, change: Change) -> Tensor:
    """(3, S, S) float32 in 0..255, the same again."""
    if change.sigma:
        width = 2 * math.ceil(3 * change.sigma) + 1
        pixels = v2.gaussian_blur(pixels, [width, width], [change.sigma, change.sigma])
    if change.gain is not None:
        # NumPy's mean, because torch's depends on how many threads share the sum.
        grey = float(LUMA @ pixels.reshape(3, -1).numpy().mean(axis=1, dtype=np.float64))
        mixed = torch.full_like(pixels, change.offset * grey)
        # Written out: a matrix product of three rows would start as many threads as one of three thousand.
        for row, weights in zip(mixed, change.gain, strict=True):
            for plane, weight in zip(pixels, weights, strict=True):
                row.add_(plane, alpha=float(weight))
        pixels = mixed
    if change.light is not None:
        pixels = pixels * upsampled(torch.from_numpy(change.light)[None, None], change.side)[0].exp()
    pixels = pixels.clamp(0, 255)
    if change.gamma != 1:
        pixels = 255 * (pixels / 255) ** change.gamma
    if change.noise:
        values = noise_bank()[noise_indices(change, pixels.numel())]
        pixels = (pixels + values.reshape(pixels.shape) * (255 * change.noise)).clamp(0, 255)
    return pixels
