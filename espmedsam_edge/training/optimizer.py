"""The optimiser over what a stage trains."""

from __future__ import annotations

import torch
from torch import nn
from torch.optim import Optimizer

from espmedsam_edge.errors import UserError
from espmedsam_edge.training.recipe import OptimizerSection


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
