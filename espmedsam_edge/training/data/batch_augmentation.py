"""The random changes of a whole batch on the training device: one lookup for all geometry, then colour in place.

The same numbers give what ``image_augmentation`` gives, but for float32's rounding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from espmedsam_edge.training.data.augmentation import LUMA, Box, Change
from espmedsam_edge.training.data.image_augmentation import MASK_FROM, field_weights, noise_indices

_REACH = 1.75  # how far about its centre a box is looked up at most, of its side: the diagonal, and bending


def augment_batch(
    images: Tensor, indices: Sequence[int], changes: Sequence[Change], bank: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Change images and their masks as drawn, except for ``Change.pasted``.

    Args:
        images: (N, 4, W, W) uint8 on the training device, RGB and mask (0 or 255); without masks (N, 3, W, W).
        indices: which ones, B.
        changes: B, all of one side S.
        bank: ``noise_bank`` on the same device.

    Returns:
        (B, 3, S, S) float32 in 0..255 and (B, 1, S, S) float32 of 0 and 1, or None.
    """
    side = changes[0].side
    moved = _moved(images, indices, changes)
    masks = (moved[:, 3:] >= MASK_FROM).float() if moved.shape[1] > 3 else None
    pixels = moved[:, :3]
    if any(change.sigma for change in changes):
        _blur(pixels, changes)
    if any(change.gain is not None for change in changes):
        pixels = _mixed(pixels, changes)
    else:
        pixels = pixels.contiguous()
    lit = [row for row, change in enumerate(changes) if change.light is not None]
    if lit:
        points = _on(pixels, [np.asarray(changes[row].light)[None] for row in lit])
        pixels[lit] *= _fields(points, side).exp()
    pixels.clamp_(0, 255)
    if any(change.gamma != 1 for change in changes):
        gammas = _on(pixels, [[[[change.gamma]]] for change in changes])
        pixels = pixels.div_(255).pow_(gammas).mul_(255)
    if any(change.noise for change in changes):
        for row, change in zip(pixels, changes, strict=True):
            if change.noise:
                values = bank[noise_indices(change, row.numel())].view(side, side, 3).permute(2, 0, 1)
                row.add_(values, alpha=255 * change.noise)
        pixels.clamp_(0, 255)
    return pixels, masks


def _moved(images: Tensor, indices: Sequence[int], changes: Sequence[Change]) -> Tensor:
    """All geometry, (B, C, S, S) float32 in 0..255."""
    whole, side = images.shape[-1], changes[0].side
    if all(change.quarters == 0 and change.mirror == (False, False) for change in changes) and whole == side:
        boxes = {change.box for change in changes}
        if boxes == {Box(0, 0, whole, whole)}:
            return images[list(indices)].float()
    parts, corners = _parts(images, indices, [change.box for change in changes])
    size = parts.shape[-1]
    places = []
    for change, (top, left) in zip(changes, corners, strict=True):
        # From the whole image's -1..1 to the part's.
        place = change.placement(whole) * (whole / size)
        place[:, 2] += (np.array([whole - 2 * left, whole - 2 * top]) - size) / size
        places.append(place)
    grid = F.affine_grid(_on(parts, places), [len(changes), 1, side, side], align_corners=False)
    bends = {row: change.bend for row, change in enumerate(changes) if change.bend is not None}
    if bends:
        scales = {row: np.array([changes[row].box.width, changes[row].box.height]) / size for row in bends}
        points = _on(parts, [scales[row][:, None, None] * bend for row, bend in bends.items()])
        grid[list(bends)] += _fields(points, side).permute(0, 2, 3, 1)
    return F.grid_sample(parts.float(), grid, mode="bilinear", padding_mode="reflection", align_corners=False)


def _parts(images: Tensor, indices: Sequence[int], boxes: Sequence[Box]) -> tuple[Tensor, list[tuple[int, int]]]:
    """The images, or of much larger ones squares around the boxes, (B, C, K, K) uint8, and their upper left corners.

    A square that does not reach an image's border has all that can be looked up, so mirroring happens there alone.
    """
    whole = images.shape[-1]
    size = min(whole, math.ceil(_REACH * max(max(box.height, box.width) for box in boxes)))
    if size == whole:
        return images[list(indices)], [(0, 0)] * len(boxes)
    corners = [
        (
            min(max(0, box.top + (box.height - size) // 2), whole - size),
            min(max(0, box.left + (box.width - size) // 2), whole - size),
        )
        for box in boxes
    ]
    parts = [
        images[index, :, top : top + size, left : left + size]
        for index, (top, left) in zip(indices, corners, strict=True)
    ]
    return torch.stack(parts), corners


def _blur(pixels: Tensor, changes: Sequence[Change]) -> None:
    """Gaussian blur of those images that get one, in place."""
    rows = [row for row, change in enumerate(changes) if change.sigma]
    reach = max(math.ceil(3 * changes[row].sigma) for row in rows)
    kernels = []
    for row in rows:
        sigma = changes[row].sigma
        places = np.arange(-reach, reach + 1)
        kernel = np.exp(-0.5 * (places / sigma) ** 2) * (abs(places) <= math.ceil(3 * sigma))
        kernels += [kernel / kernel.sum()] * 3
    weights = _on(pixels, kernels)[:, None]  # (3n, 1, 2 reach + 1)
    side, groups = pixels.shape[-1], len(kernels)
    planes = F.pad(pixels[rows].reshape(1, groups, side, side), [reach] * 4, mode="reflect")
    planes = F.conv2d(planes, weights[..., None, :], groups=groups)
    planes = F.conv2d(planes, weights[..., None], groups=groups)
    pixels[rows] = planes.reshape(-1, 3, side, side)


def _mixed(pixels: Tensor, changes: Sequence[Change]) -> Tensor:
    """Every image's colour matrix and offset, term by term: a product of three rows gains nothing from a GPU's TF32."""
    gains = _on(pixels, [np.eye(3) if change.gain is None else change.gain for change in changes])
    offsets = _on(pixels, [change.offset * LUMA for change in changes])  # (B, 3)
    grey = (offsets * pixels.mean((2, 3))).sum(1)[:, None, None, None]  # (B, 1, 1, 1)
    gains = gains[..., None, None]  # (B, 3, 3, 1, 1)
    mixed = torch.addcmul(grey, gains[:, :, 0], pixels[:, :1])
    for plane in (1, 2):
        mixed.addcmul_(gains[:, :, plane], pixels[:, plane : plane + 1])
    return mixed


def _fields(points: Tensor, side: int) -> Tensor:
    """Control points (B, C, n, n), the outer ones in the corners, as smooth fields (B, C, side, side)."""
    weights = field_weights(points.shape[-1], side).to(points.device, non_blocking=True)
    return weights @ points @ weights.T


def _on(like: Tensor, values: Sequence[object]) -> Tensor:
    """Numbers as float32 beside a tensor; from pageable memory, so that the copy waits for nothing on the device."""
    array: NDArray[np.float32] = np.asarray(values, np.float32)
    return torch.from_numpy(array).to(like.device, non_blocking=True)
