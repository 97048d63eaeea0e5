"""The optimiser over what a stage trains, and its learning rate: a function of the step, so none of it is saved."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.optim import Optimizer

from espmedsam_edge.errors import UserError
from espmedsam_edge.training.sections import OptimizerSection, ScheduleSection

_FIRST_FACTOR = 0.02  # of the warm-up by time, whose first step has spent nothing


def make_optimizer(network: nn.Module, section: OptimizerSection, *, fused: bool = False) -> Optimizer:
    """Adam or AdamW over what is trainable; AdamW leaves vectors (norms, biases, tokens' biases) undecayed.

    Args:
        network: whose trainable parameters are taken.
        section: of the recipe.
        fused: one kernel for all parameters.

    Raises:
        UserError: nothing is trainable.
    """
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    if not parameters:
        raise UserError("nothing to train: the recipe freezes every part.", "Name some in train = [...].")
    matrices = [parameter for parameter in parameters if parameter.ndim > 1]
    vectors = [parameter for parameter in parameters if parameter.ndim <= 1]
    groups = [
        {"params": matrices, "weight_decay": section.weight_decay},
        {"params": vectors, "weight_decay": 0.0 if section.name == "adamw" else section.weight_decay},
    ]
    kind = torch.optim.AdamW if section.name == "adamw" else torch.optim.Adam
    return kind([group for group in groups if group["params"]], lr=section.lr, betas=section.betas, fused=fused or None)


def learning_rate_factor(schedule: ScheduleSection, step: int, steps: int, steps_per_epoch: int) -> float:
    """What the recipe's learning rate is multiplied by at a step.

    Args:
        schedule: exponential (the paper's; its rate is not given, so the run's end decides), cosine or constant.
        step: 0 for the first.
        steps: of the whole run.
        steps_per_epoch: to turn the warm-up's epochs into steps.

    Returns:
        1 at the start (after the warm-up), ``final_factor`` at the last step.
    """
    warmup = min(round(schedule.warmup_epochs * steps_per_epoch), steps - 1)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return _decayed(schedule, min(1.0, (step - warmup) / max(1, steps - 1 - warmup)))


def learning_rate_factor_by_time(schedule: ScheduleSection, spent: float, minutes: float) -> float:
    """As ``learning_rate_factor`` for a run that ends by time.

    Args:
        schedule: its ``warmup_minutes`` count, half of the run at most.
        spent: seconds trained so far.
        minutes: of the whole run.
    """
    warmup = 60 * min(schedule.warmup_minutes, minutes / 2)
    if spent < warmup:
        return max(spent / warmup, _FIRST_FACTOR)
    return _decayed(schedule, min(1.0, (spent - warmup) / (60 * minutes - warmup)))


def _decayed(schedule: ScheduleSection, progress: float) -> float:
    """The factor at a share of the run after the warm-up."""
    last = schedule.final_factor
    if schedule.name == "exponential":
        return float(last**progress)
    if schedule.name == "cosine":
        return last + (1 - last) * 0.5 * (1 + math.cos(math.pi * progress))
    return 1.0
