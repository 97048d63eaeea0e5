"""How far a run is: by its epochs, or by the time of its steps without the pauses between them."""

from __future__ import annotations

from collections import deque
from statistics import median
from time import monotonic

from espmedsam_edge.training.optimizer import learning_rate_factor, learning_rate_factor_by_time
from espmedsam_edge.training.recipe import Recipe
from espmedsam_edge.training.state import TrainingProgress

_TYPICAL_OF = 21  # laps
_PAUSE = 10  # times a typical lap
_SHORTEST_PAUSE = 5.0  # seconds


class StepClock:
    """Counts the seconds spent in steps.

    A lap that is far longer than those before it was no step but a process that stood still (SIGSTOP, a suspended
    computer); it counts as one of theirs.

    Args:
        spent: seconds counted before, of a run that is resumed.
    """

    def __init__(self, spent: float = 0.0) -> None:
        self.spent = spent
        self._laps: deque[float] = deque(maxlen=_TYPICAL_OF)
        self._since = monotonic()

    def start(self) -> None:
        """Count from now on: what was since the last lap (a validation, a save) is left out."""
        self._since = monotonic()

    def lap(self) -> None:
        """A step ended; the next begins."""
        now = monotonic()
        lap, self._since = now - self._since, now
        if self._laps and lap > max(_SHORTEST_PAUSE, _PAUSE * (typical := median(self._laps))):
            lap = typical
        else:
            self._laps.append(lap)
        self.spent += lap


class Pace:
    """Where a run's end is, and what depends on how near it is.

    Args:
        recipe: by epochs, or by time where ``run.minutes`` is set.
        steps_per_epoch: optimiser steps.
    """

    def __init__(self, recipe: Recipe, steps_per_epoch: int) -> None:
        self.recipe = recipe
        self.minutes = recipe.run.minutes
        self.steps_per_epoch = steps_per_epoch
        self.steps = steps_per_epoch * recipe.run.epochs

    @property
    def length(self) -> str:
        """The run's, for people."""
        return f"{self.minutes:g} minutes" if self.minutes else f"{self.steps} steps"

    def over(self, progress: TrainingProgress, epochs: int) -> bool:
        """Whether the run ends here, after whole ``epochs``."""
        return progress.spent >= 60 * self.minutes if self.minutes else epochs >= self.recipe.run.epochs

    def share(self, progress: TrainingProgress) -> float:
        """How much of the run is done, 0..1."""
        return min(1.0, progress.spent / (60 * self.minutes)) if self.minutes else progress.step / self.steps

    def learning_rate(self, progress: TrainingProgress) -> float:
        """Of the next step."""
        schedule = self.recipe.schedule
        if self.minutes:
            factor = learning_rate_factor_by_time(schedule, progress.spent, self.minutes)
        else:
            factor = learning_rate_factor(schedule, progress.step, self.steps, self.steps_per_epoch)
        return self.recipe.optimizer.lr * factor
