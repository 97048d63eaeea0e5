"""Losses noted on the training device and read now and then: reading one makes the processor wait for the device."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from espmedsam_edge.errors import UserError
from espmedsam_edge.training.data.dataset import Batch
from espmedsam_edge.training.log import RunLog


class StepFacts(NamedTuple):
    """An optimiser step for the log: its number from 1, its epoch from 1, the learning rate, images, when it ended."""

    step: int
    epoch: int
    rate: float
    images: int
    at: float


@dataclass
class _Noted:
    step: int
    modality: str
    names: tuple[str, ...]
    terms: tuple[str, ...]
    values: Tensor  # (terms,) float32 on the device


class LossLedger:
    """The losses of the batches since the last reading.

    Args:
        log: gets each step as it is read.
        every: steps between readings.
        precision: of the recipe, for the hint when a loss is not finite.
    """

    def __init__(self, log: RunLog, every: int, precision: str) -> None:
        self._log = log
        self._every = every
        self._precision = precision
        self._events: list[_Noted | StepFacts] = []
        self._step: list[float] = []  # losses read of a step that has not ended yet
        self._last: tuple[str, dict[str, float]] = ("", {})  # modality and terms of the batch read last
        self._losses: list[float] = []

    def note(self, step: int, batch: Batch, terms: dict[str, Tensor]) -> None:
        """Take a batch's terms, and read them all if it is time; ``step`` counts from 0.

        Raises:
            UserError: as ``read``.
        """
        values = torch.stack([value.detach().float() for value in terms.values()])
        self._events.append(_Noted(step, batch.modality, batch.names, tuple(terms), values))
        if (step + 1) % self._every == 0:
            self.read()

    def end_step(self, step: int, epoch: int, rate: float, images: int) -> None:
        """The batch noted last was the last of an optimiser step; ``step`` counts from 1."""
        self._events.append(StepFacts(step, epoch, rate, images, time.perf_counter()))
        if step % self._every == 0:
            self.read()

    def read(self) -> None:
        """Read what was noted, and log the steps that ended.

        Raises:
            UserError: a loss is not finite; names the step and its files.
        """
        events, self._events = self._events, []
        noted = [event.values for event in events if isinstance(event, _Noted)]
        # One copy from the device for all of them; a stage's batches all have the same terms.
        rows = iter(torch.stack(noted).tolist() if noted else [])
        for event in events:
            if isinstance(event, _Noted):
                terms = dict(zip(event.terms, next(rows), strict=True))
                if not all(map(math.isfinite, terms.values())):
                    self._not_finite(event, terms)
                self._step.append(terms["loss"])
                self._last = event.modality, terms
            else:
                self._losses.append(sum(self._step) / len(self._step))
                self._step = []
                modality, terms = self._last
                self._log.step(event.step, event.epoch, modality, event.rate, terms, event.images, event.at)

    def mean(self) -> float | None:
        """The mean loss of the steps since the last call, None if there was none; reads what was noted."""
        self.read()
        losses, self._losses = self._losses, []
        return sum(losses) / len(losses) if losses else None

    def _not_finite(self, one: _Noted, terms: dict[str, float]) -> None:
        shown = ", ".join(f"{name} {value:g}" for name, value in terms.items())
        hint = "Look at these images; then lower optimizer.lr"
        hint += "." if self._precision == "32-true" else " or set run.precision=32-true."
        raise UserError(
            f"step {one.step + 1}: the loss is not finite ({shown}) on {one.modality}: {', '.join(one.names)}.",
            hint,
            exit_code=1,
        )
