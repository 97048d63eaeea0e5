"""Runs that end by time: how the time is counted, and what follows it."""

from __future__ import annotations

import csv
import itertools
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from espmedsam_edge.errors import UserError
from espmedsam_edge.training import loop as loop_module
from espmedsam_edge.training import pace as pace_module
from espmedsam_edge.training.optimizer import learning_rate_factor_by_time
from espmedsam_edge.training.pace import StepClock
from espmedsam_edge.training.recipe import Recipe
from espmedsam_edge.training.run_folder import STATE
from espmedsam_edge.training.sections import ScheduleSection
from espmedsam_edge.training.stages import run_stage
from espmedsam_edge.training.state import read_state


class Times:
    """A clock that goes on by ``step`` at each look, and by ``pauses`` more where it is told."""

    def __init__(self, step: float = 1.0) -> None:
        self.now, self.step = 0.0, step

    def monotonic(self) -> float:
        self.now += self.step
        return self.now


@pytest.fixture
def times(monkeypatch: pytest.MonkeyPatch) -> Times:
    fake = Times()
    monkeypatch.setattr(pace_module, "monotonic", fake.monotonic)
    return fake


def test_a_pause_counts_as_a_step(times: Times) -> None:
    clock = StepClock(spent=10)
    clock.start()
    for _ in range(5):
        clock.lap()
    assert clock.spent == 15
    times.now += 3600  # stopped
    clock.lap()
    assert clock.spent == 16
    times.now += 3  # a slow step is none
    clock.lap()
    assert clock.spent == 20
    times.now += 3600  # a validation
    clock.start()
    clock.lap()
    assert clock.spent == 21


def test_the_rate_follows_the_time() -> None:
    schedule = ScheduleSection(name="cosine", final_factor=0.1, warmup_minutes=1)
    factors = [learning_rate_factor_by_time(schedule, spent, 11) for spent in (0, 30, 60, 360, 660, 700)]
    assert factors == pytest.approx([0.02, 0.5, 1, 0.55, 0.1, 0.1])
    # A warm-up longer than the run is cut to half of it.
    assert learning_rate_factor_by_time(schedule, 30, 1) == pytest.approx(1)


def test_a_run_by_time_ends_when_it_is_up_and_resumes_where_it_was(
    tmp_path: Path, small_recipe: Callable[..., Recipe], times: Times, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = small_recipe(
        "run.minutes=0.15", "run.steps_per_epoch=4", "schedule.name=cosine", "run.epochs=1", "run.validate_every=5",
        "run.save_minutes=1000",
    )  # fmt: skip
    _, progress = run_stage("segment", recipe, tmp_path / "whole")
    assert (progress.step, progress.spent, progress.finished) == (9, 9.0, True)  # 9 s of a second a step
    assert progress.best_epoch == 3  # validated at the end, in the middle of an epoch

    end_step, steps = loop_module.LossLedger.end_step, itertools.count(1)

    def stopping(*arguments: object, **options: object) -> None:
        end_step(*arguments, **options)  # type: ignore[arg-type]
        if next(steps) == 6:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(loop_module.LossLedger, "end_step", stopping)
    with pytest.raises(UserError, match=r"stopped after step 6 of 0\.15 minutes"):
        run_stage("segment", recipe, tmp_path / "stopped")
    saved = read_state(tmp_path / "stopped" / STATE).progress
    assert (saved.step, saved.spent) == (6, 6.0)
    times.now += 10_000
    _, resumed = run_stage("segment", recipe, tmp_path / "stopped", resume=True)
    assert (resumed.step, resumed.spent, resumed.finished) == (9, 9.0, True)

    def rates(name: str) -> list[str]:
        with (tmp_path / name / "train.csv").open(newline="") as stream:
            return [row["learning_rate"] for row in csv.DictReader(stream)]

    assert rates("whole") == rates("stopped")
    assert len(set(rates("whole"))) == 9
