"""The processes that train: Fabric for this one alone, or as torchrun started it."""

from __future__ import annotations

import os

import torch
from lightning_fabric import Fabric
from lightning_fabric.plugins.precision.amp import MixedPrecision
from lightning_fabric.strategies.ddp import DDPStrategy

from espmedsam_edge.errors import UserError
from espmedsam_edge.training.sections import RunSection


def make_fabric(run: RunSection) -> Fabric:
    """Fabric for this process: alone, or as torchrun started it (any number of processes and machines).

    Raises:
        UserError: CUDA asked for where there is none, or a precision that the processor cannot train in.
    """
    cuda = torch.cuda.is_available()
    if run.accelerator == "cuda" and not cuda:
        raise UserError("run.accelerator=cuda, but torch sees no GPU.", "Check the driver, or set run.accelerator=cpu.")
    accelerator = "cuda" if cuda and run.accelerator != "cpu" else "cpu"
    if run.precision == "16-mixed" and accelerator == "cpu":
        raise UserError("run.precision=16-mixed needs a GPU.", "Use bf16-mixed or 32-true.")
    plugins = None if run.precision == "32-true" else MixedPrecision(run.precision, accelerator)
    world = int(os.environ.get("WORLD_SIZE", "1"))
    local = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    # A batch is of one modality, so the other modalities' bags get no gradient in that step.
    strategy = DDPStrategy(find_unused_parameters=True) if world > 1 else "auto"
    fabric = Fabric(
        accelerator=accelerator, strategy=strategy, devices=local, num_nodes=max(1, world // local), plugins=plugins
    )
    fabric.launch()
    return fabric
