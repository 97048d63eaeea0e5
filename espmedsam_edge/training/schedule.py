"""The learning rate of every optimiser step, a pure function of the step: nothing of it needs saving."""

from __future__ import annotations

import math

from espmedsam_edge.training.recipe import ScheduleSection


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
