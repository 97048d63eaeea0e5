"""The learning rate at the run's corners."""

from __future__ import annotations

import itertools

import pytest

from espmedsam_edge.training.optimizer import learning_rate_factor
from espmedsam_edge.training.sections import ScheduleSection


def factors(schedule: ScheduleSection, steps: int = 101, steps_per_epoch: int = 10) -> list[float]:
    return [learning_rate_factor(schedule, step, steps, steps_per_epoch) for step in range(steps)]


def test_exponential_decays_by_a_constant_ratio_to_its_end() -> None:
    values = factors(ScheduleSection())
    assert values[0] == 1
    assert values[-1] == pytest.approx(0.01)
    ratios = [after / before for before, after in itertools.pairwise(values)]
    assert ratios == pytest.approx([0.01 ** (1 / 100)] * 100)


def test_cosine_is_half_way_down_in_the_middle() -> None:
    values = factors(ScheduleSection(name="cosine", final_factor=0.1))
    assert (values[0], values[50], values[100]) == pytest.approx((1, 0.55, 0.1))


def test_warm_up_rises_linearly_then_the_schedule_starts() -> None:
    values = factors(ScheduleSection(name="constant", warmup_epochs=2))
    assert values[:3] == pytest.approx([1 / 21, 2 / 21, 3 / 21])
    assert values[20:] == [1.0] * 81


def test_a_run_shorter_than_its_warm_up_and_a_run_of_one_step_work() -> None:
    assert factors(ScheduleSection(warmup_epochs=5), steps=3) == pytest.approx([1 / 3, 2 / 3, 1])
    assert factors(ScheduleSection(), steps=1) == [1]
