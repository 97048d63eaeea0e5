"""How good a network is on the validation images, and pictures of what it does there."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from lightning_fabric import Fabric
from numpy.typing import NDArray
from torch import Tensor

from espmedsam_edge.imaging.overlay import OverlayStyle, color_of, draw_overlay
from espmedsam_edge.training.data.dataset import Batch, TrainingSet
from espmedsam_edge.training.data.sampler import BatchPlan, Draw
from espmedsam_edge.training.objectives import Objective, SegmentationObjective

_TILE = 192  # pixels, a picture on a contact sheet
_TRUTH = (255, 255, 255)


@torch.no_grad()
def validate(objective: Objective, images: TrainingSet, batch_size: int, fabric: Fabric) -> dict[str, float]:
    """A score a modality, the mean over its validation images, higher is better; every process takes its share.

    Segmentation: Dice (0..1) of the masks at the network's input size. Distillation: the negated feature distance.

    Args:
        objective: in evaluation mode, not wrapped: shares may differ in length, so no process may wait for another's.
        images: the validation images.
        batch_size: images a forward pass.
        fabric: the processes.
    """
    sums = {}
    for modality in images.sizes:
        total = torch.zeros(2, dtype=torch.float64, device=fabric.device)
        for plan in images.in_order(modality, batch_size)[fabric.global_rank :: fabric.world_size]:
            batch = images.batch(plan).to(fabric.device)
            if isinstance(objective, SegmentationObjective):
                assert batch.masks is not None
                with fabric.autocast():
                    logits = objective.network(batch.images, modality).low_res_logits
                scores = _dice(logits, batch.masks)
            else:
                with fabric.autocast():
                    distance = objective(batch.images, batch.masks, modality)["loss"]
                scores = -distance.expand(len(plan.draws))
            total += torch.stack([scores.double().sum(), torch.tensor(len(plan.draws), device=fabric.device).double()])
        reduced = fabric.all_reduce(total, reduce_op="sum")
        assert isinstance(reduced, Tensor)
        sums[modality] = float(reduced[0] / reduced[1])
    return sums


def _dice(logits: Tensor, masks: Tensor) -> Tensor:
    """Dice of each image, (B,), at the masks' size; 1 where both are empty."""
    resized = F.interpolate(logits.float(), masks.shape[-2:], mode="bilinear", align_corners=False)
    prediction = (resized >= 0).flatten(1)
    truth = (masks >= 0.5).flatten(1)
    both = (prediction & truth).sum(1)
    either = prediction.sum(1) + truth.sum(1)
    return torch.where(either > 0, 2 * both / either.clamp(min=1), 1.0)


@torch.no_grad()
def contact_sheet(
    objective: SegmentationObjective, images: TrainingSet, count: int, fabric: Fabric
) -> NDArray[np.uint8]:
    """A row a modality: its first validation images, truth outlined in white, prediction tinted.

    Returns:
        (rows * 192, count * 192, 3) uint8 BGR.
    """
    rows = []
    for modality, size in images.sizes.items():
        plan = BatchPlan(modality, tuple(Draw(index, 0) for index in range(min(count, size))))
        batch = images.batch(plan)
        with fabric.autocast():
            logits = objective.network(batch.images.to(fabric.device), modality).low_res_logits
        tiles = [_tile(batch, row, logits[row, 0].float().cpu(), images) for row in range(len(plan.draws))]
        tiles += [np.zeros((_TILE, _TILE, 3), np.uint8)] * (count - len(tiles))
        rows.append(np.hstack(tiles))
    return np.vstack(rows)


def _tile(batch: Batch, row: int, logits: Tensor, images: TrainingSet) -> NDArray[np.uint8]:
    mean = torch.tensor(images.normalization.mean).reshape(3, 1, 1)
    std = torch.tensor(images.normalization.std).reshape(3, 1, 1)
    picture = ((batch.images[row] * std + mean) * 255).round().clamp(0, 255).byte()
    bgr: Any = cv2.resize(
        np.ascontiguousarray(picture.permute(1, 2, 0).numpy()[..., ::-1]), (_TILE, _TILE), interpolation=cv2.INTER_AREA
    )
    predicted: Any = cv2.resize(logits.numpy(), (_TILE, _TILE), interpolation=cv2.INTER_LINEAR)
    drawn = draw_overlay(bgr, _mask(predicted >= 0), OverlayStyle(color_of(batch.modality), 0.45, outline=False))
    if batch.masks is not None:
        truth: Any = cv2.resize(batch.masks[row, 0].numpy(), (_TILE, _TILE), interpolation=cv2.INTER_LINEAR)
        drawn = draw_overlay(drawn, _mask(truth >= 0.5), OverlayStyle(_TRUTH, 0.0))
    return drawn


def _mask(inside: NDArray[np.bool_]) -> NDArray[np.uint8]:
    return inside.view(np.uint8) * np.uint8(255)


def mean_score(scores: Iterable[float]) -> float:
    """The mean over modalities: every modality counts alike, however many images it has."""
    values = list(scores)
    return sum(values) / len(values)
