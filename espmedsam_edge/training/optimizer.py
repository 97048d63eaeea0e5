"""The optimiser over what a stage trains, and its learning rate: a function of the step, so none of it is saved."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.optim import Optimizer

from espmedsam_edge.errors import UserError
from espmedsam_edge.training.sections import OptimizerSection, ScheduleSection


def make_optimizer(network: nn.Module, section: OptimizerSection) -> Optimizer:
    """Adam or AdamW over what is trainable; AdamW leaves vectors (norms, biases, tokens' biases) undecayed.

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
    return kind([group for group in groups if group["params"]], lr=section.lr, betas=section.betas)


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
    progress = min(1.0, (step - warmup) / max(1, steps - 1 - warmup))
    last = schedule.final_factor
    if schedule.name == "exponential":
        return float(last**progress)
    if schedule.name == "cosine":
        return last + (1 - last) * 0.5 * (1 + math.cos(math.pi * progress))
    return 1.0
