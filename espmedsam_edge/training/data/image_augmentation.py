"""One image's random change on the processor: what training on a processor is fed with, and the reference for batches.

Images are (S, S, 3) float32 in NumPy and OpenCV: there a pass over their pixels takes a tenth of a millisecond, and
several threads work beside each other. ``batch_augmentation`` does the same on a GPU.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from espmedsam_edge.training.data.augmentation import LUMA, NOISE_VALUES, Augmentation, Box, Change, box_around, draw

MASK_FROM = 128  # of 0..255, after interpolation
_EXACT_REMAP = int(cv2.__version__.split(".")[0]) >= 5  # before, places were rounded to 1/32 of a pixel
Pixels = NDArray[np.float32]


def augment(
    image: NDArray[np.uint8],
    mask: NDArray[np.uint8],
    settings: Augmentation,
    rng: np.random.Generator,
    side: int | None = None,
) -> tuple[Pixels, Pixels, Change]:
    """Change an image and its mask at random.

    Args:
        image: (S, S, 3) uint8 RGB.
        mask: (S, S) uint8, 0 or 255.
        settings: what may happen.
        rng: the only source of chance; the same state gives the same result.
        side: of the result; None: S.

    Returns:
        The image, (side, side, 3) float32 in 0..255; the mask, (side, side) float32, 0 or 1; and what was drawn,
        whose ``pasted`` is left to ``paste``, for it needs the batch.
    """
    target = box_around(mask) if settings.negative else None
    change = draw(settings, len(image), side or len(image), rng, target)
    return *apply(image, mask, change), change


def apply(image: NDArray[np.uint8], mask: NDArray[np.uint8], change: Change) -> tuple[Pixels, Pixels]:
    """Do to an image what was drawn; shapes and ranges as in ``augment``."""
    # The mask rides as a fourth channel through the geometry, so the two cannot part.
    stacked = np.asarray(cv2.merge([*cv2.split(image), mask]), np.uint8)
    moved = _sampled(stacked, change) if change.quarters is None else _rearranged(stacked, change)
    target = (np.asarray(cv2.extractChannel(moved, 3)) >= MASK_FROM).astype(np.float32)
    return _coloured(np.asarray(cv2.cvtColor(moved, cv2.COLOR_BGRA2BGR), np.float32), change), target


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
    """Where in the bank an image's ``count`` values are, channel by channel of a pixel after pixel; it is a ring."""
    if change.noise_at + count <= NOISE_VALUES:
        return slice(change.noise_at, change.noise_at + count)
    return torch.arange(change.noise_at, change.noise_at + count) % NOISE_VALUES


@functools.cache
def field_weights(points: int, side: int) -> Tensor:
    """(side, points) float32: a row of control points, the outer ones in the corners, to a smooth row of pixels."""
    each = torch.eye(points)[:, None, :, None].expand(points, 1, points, points)
    smooth = F.interpolate(each, (side, side), mode="bicubic", align_corners=True)
    return smooth[:, 0, :, 0].T.contiguous()


def _field(points: Pixels, side: int) -> Pixels:
    """Control points (n, n) as a smooth field (side, side)."""
    weights = field_weights(len(points), side).numpy()
    return np.asarray(weights @ points @ weights.T, np.float32)


def _rearranged(stacked: NDArray[np.uint8], change: Change) -> Pixels:
    """A window mirrored and turned by quarters: every pixel one of the image's, at the border mirrored."""
    top, left, height, width = change.box
    whole = len(stacked)
    if not (0 <= top <= whole - height and 0 <= left <= whole - width):
        rows = _mirrored(np.arange(top, top + height), whole)
        stacked, top, left = stacked[rows][:, _mirrored(np.arange(left, left + width), whole)], 0, 0
    part = np.rot90(stacked[top : top + height, left : left + width], change.quarters or 0)
    return part[:: -1 if change.mirror[1] else 1, :: -1 if change.mirror[0] else 1].astype(np.float32, order="C")


def _mirrored(places: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    around = places % (2 * count)
    return np.where(around < count, around, 2 * count - 1 - around)


def _sampled(stacked: NDArray[np.uint8], change: Change) -> Pixels:
    side, whole = change.side, len(stacked)
    line = (2 * np.arange(side) + 1) / side - 1
    places = []
    for axis, (a, b, c) in enumerate(change.placement(whole)):
        # From -1..1 to pixels, the first one's centre at 0.
        across, down = (a * line + c + 1) * whole / 2 - 0.5, b * line * whole / 2
        place = np.add.outer(down.astype(np.float32), across.astype(np.float32))
        if change.bend is not None:
            place += _field(change.bend[axis] * np.float32(change.box[3 - axis] / 2), side)
        places.append(place)
    if _EXACT_REMAP:
        part = _part(stacked, places).astype(np.float32)
        found = cv2.remap(part, places[0], places[1], cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT)
        return np.asarray(found, np.float32)
    grid = torch.from_numpy((2 * np.stack(places, axis=-1) + 1) / whole - 1)
    pixels = torch.from_numpy(stacked).permute(2, 0, 1)[None].float()
    sampled = F.grid_sample(pixels, grid[None], mode="bilinear", padding_mode="reflection", align_corners=False)
    return np.ascontiguousarray(sampled[0].permute(1, 2, 0).numpy())


def _part(stacked: NDArray[np.uint8], places: list[Pixels]) -> NDArray[np.uint8]:
    """What of a large image is looked up, so that no more is made floating-point; moves the places along."""
    whole, part = len(stacked), []
    if whole <= len(places[0]):
        return stacked
    for place in places:
        low, high, _, _ = cv2.minMaxLoc(place)
        # Beyond the border lies the mirror image of as much as is beyond it.
        first = max(0, min(math.floor(low), 2 * whole - 2 - math.ceil(high)))
        last = min(whole, max(math.ceil(high), -math.floor(low)) + 2)
        place -= np.float32(first)
        part.append(slice(first, last))
    return stacked[part[1], part[0]]


def _coloured(pixels: Pixels, change: Change) -> Pixels:
    """(S, S, 3) float32 in 0..255, the same again; may be the same array."""
    if change.sigma:
        width = 2 * math.ceil(3 * change.sigma) + 1
        pixels = np.asarray(cv2.GaussianBlur(pixels, (width, width), change.sigma), np.float32)
    if change.gain is not None:
        offset = change.offset * float(LUMA @ cv2.mean(pixels)[:3])
        pixels = np.asarray(cv2.transform(pixels, np.column_stack([change.gain, [offset] * 3])), np.float32)
    if change.light is not None:
        light = np.exp(_field(change.light, change.side))
        pixels = np.asarray(cv2.multiply(pixels, cv2.merge([light] * 3)), np.float32)
    np.clip(pixels, 0, 255, out=pixels)
    if change.gamma != 1:
        pixels = np.asarray(cv2.pow(pixels, change.gamma), np.float32)
        pixels *= np.float32(255 ** (1 - change.gamma))
    if change.noise:
        values = noise_bank()[noise_indices(change, pixels.size)].numpy().reshape(pixels.shape)
        pixels = np.asarray(cv2.scaleAdd(values, 255 * change.noise, pixels), np.float32)
        np.clip(pixels, 0, 255, out=pixels)
    return pixels
