"""Touching nuclei are counted: the scenes of benchmarks/touching.py, a few of each number."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import pytest
from scipy.ndimage import label


@pytest.fixture
def benchmark(load_script: Callable[[str], ModuleType]) -> ModuleType:
    return load_script("benchmarks/touching.py")


def test_counts_of_touching_nuclei_are_right_within_five_percent(benchmark: ModuleType) -> None:
    rows = benchmark.measure(benchmark.KINDS[: benchmark.PROMISED], (10, 80), seeds=2)
    for row in rows:
        assert row["mean_error"] <= 5, row
        assert abs(row["sum_error"]) <= 5, row
        assert row["parts_error"] < -25, row  # so many touch each other
        assert [one["true"] for one in row["scenes"]] == [10, 10, 80, 80]


def test_nuclei_that_touch_none_are_not_cut(benchmark: ModuleType) -> None:
    alone = benchmark.Kind("alone", 28, longest=1.6, rough=0.04, touching=0)
    mask, _ = benchmark.scene(alone, 100, 3)
    (row,) = benchmark.measure((alone,), (100,), seeds=2)
    assert row["mean_error"] <= 5, row
    assert mask.any()


def test_a_scene_has_as_many_as_it_says(benchmark: ModuleType) -> None:
    """Apart from each other they are as many connected parts; at random places few are drawn."""
    lone = benchmark.Kind("lone", 12, rough=0, touching=0)
    mask, true = benchmark.scene(lone, 3, 1)
    assert true == 3
    assert label(mask)[1] in (2, 3)
    assert benchmark.summary([{"true": 10, "found": 9, "parts": 4}, {"true": 10, "found": 11, "parts": 6}]) == {
        "mean_error": pytest.approx(10),
        "sum_error": 0,
        "parts_error": -50,
    }
    assert "| lone | 3 |" in benchmark.table(
        [{"kind": "lone", "scenes": [{"true": 3}], "mean_error": 0, "sum_error": 0, "parts_error": 0}]
    )
