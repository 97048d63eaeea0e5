"""The state of a run in one safetensors file, so that a killed run goes on as if it had not been: no pickled code.

Weights, optimiser moments (by parameter name), averaged weights and random states are tensors; where the run is
stands in the file's metadata. The learning rate is a function of the step and needs no saving.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.optim import Optimizer

from espmedsam_edge.bundle import FormatVersion
from espmedsam_edge.errors import UserError
from espmedsam_edge.model.checkpoint import parse_metadata
from espmedsam_edge.model.tensor_file import read_tensor_file, write_tensor_file
from espmedsam_edge.training.averaging import WeightAverage

_KEY = "espmedsam-training"


class TrainingProgress(BaseModel, extra="forbid"):
    """Where a run is.

    Attributes:
        stage: of the recipe.
        identity: the recipe's keys and values that decide what is computed.
        step: optimiser steps done.
        spent: seconds spent in them, pauses left out.
        sampler: the batch sampler's own state.
        best, best_epoch: the best validation score so far (None: none yet; higher is better) and its epoch, counted
            from 1; 0 is what the run started from.
        scaler: fp16's loss scale, where there is one.
        world_size: processes that trained.
        finished: whether the run reached its end.
    """

    format_version: FormatVersion = 1
    stage: str
    identity: dict[str, Any]
    step: int = 0
    spent: float = 0.0
    sampler: dict[str, Any] = {}
    best: float | None = None
    best_epoch: int = 0
    scaler: dict[str, float] = {}
    world_size: int = 1
    finished: bool = False


@dataclass
class Saved:
    """A state as read: ``tensors`` under "network.", "optimizer.", "average.", "random."."""

    progress: TrainingProgress
    tensors: dict[str, Tensor]

    def part(self, name: str) -> dict[str, Tensor]:
        """The tensors under one prefix, without it."""
        return {
            key.removeprefix(f"{name}."): value for key, value in self.tensors.items() if key.startswith(f"{name}.")
        }


def random_states() -> dict[str, Tensor]:
    """This process's torch random states: (bytes,) uint8 each. Nothing else in training draws from a global state."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def restore_random_states(states: Mapping[str, Tensor]) -> None:
    """Put back what ``random_states`` gave."""
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


def save_state(
    path: Path,
    progress: TrainingProgress,
    network: nn.Module,
    optimizer: Optimizer,
    average: WeightAverage | None,
    random: Mapping[str, Tensor],
) -> None:
    """Write everything that the rest of the run depends on, complete or not at all.

    Args:
        path: ends in .safetensors.
        progress: where the run is.
        network: whose weights and buffers are saved.
        optimizer: over the network's parameters.
        average: the averaged weights, if any.
        random: ``random_states`` of every process, keys ending in the rank.

    Raises:
        UserError: no space left; the state before stays.
    """
    tensors = {f"network.{name}": value for name, value in network.state_dict().items()}
    for name, parameter in network.named_parameters():
        for field, value in optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer.{field}.{name}"] = value
    if average is not None:
        tensors.update({f"average.{name}": value for name, value in average.shadow.items()})
    tensors.update({f"random.{name}": value for name, value in random.items()})
    write_tensor_file(path, tensors, {_KEY: progress.model_dump_json()})


def read_state(path: Path) -> Saved:
    """Read a state.

    Raises:
        UserError: truncated, not a training state, or from a newer program.
    """
    try:
        tensors, metadata, _ = read_tensor_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is not a readable training state ({error}).", "Start anew: --overwrite") from error
    if _KEY not in metadata:
        raise UserError(f"{path} is not the state of a training run.", "Name the run's own folder.")
    progress = parse_metadata(TrainingProgress, metadata[_KEY], path)
    return Saved(progress, tensors)


def restore(saved: Saved, network: nn.Module, optimizer: Optimizer, average: WeightAverage | None) -> None:
    """Load weights, optimiser moments and averaged weights; they must fit, for the recipe is the same.

    Raises:
        RuntimeError, LookupError, TypeError, ValueError: they do not: something is missing or of another shape.
    """
    network.load_state_dict(saved.part("network"))
    moments = saved.part("optimizer")
    fused = bool(optimizer.defaults.get("fused"))  # then the steps are counted on the device
    for name, parameter in network.named_parameters():
        fields = {key.split(".", 1)[0]: value for key, value in moments.items() if key.split(".", 1)[1] == name}
        if fields:
            if {*fields} != {key.split(".", 1)[0] for key in moments}:
                raise ValueError(f"{name} lacks a moment")
            if any(value.ndim and value.shape != parameter.shape for value in fields.values()):
                raise ValueError(f"a moment of {name} has another shape")
            optimizer.state[parameter] = {
                field: value.clone() if field == "step" and not fused else value.to(parameter.device, copy=True)
                for field, value in fields.items()
            }
    if average is not None:
        average.load(saved.part("average"))


def first_difference(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> str | None:
    """The first key whose value differs between two recipes' identities, as "run.epochs: 5, now 10"."""
    for key in sorted({*before, *now}):
        old, new = before.get(key), now.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            if found := first_difference(old, new, f"{prefix}{key}."):
                return found
        elif old != new:
            return f"{prefix}{key}: {old}, now {new}"
    return None
