"""Touching nuclei are counted: the scenes of benchmarks/touching.py, a few of each number."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import cv2
import numpy as np
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
        assert row["worst_of_50"] <= 10, row
        assert row["parts_error"] < -25, row  # so many touch each other
        assert [one["true"] for one in row["scenes"]] == [10, 10, 80, 80]


def test_nuclei_that_touch_none_are_not_cut(benchmark: ModuleType) -> None:
    """Up to twice as long as wide, with wavy outlines, and of few pixels."""
    alone = [kind for kind in benchmark.KINDS if kind.overlap < 0]
    assert {kind.diameter for kind in alone} == {10, 28}
    for row in benchmark.measure(alone, (100,), seeds=2):
        assert (row["parts_error"], row["sum_error"] <= 2) == (0, True), row


def test_convex_parts_of_masks_are_counted(benchmark: ModuleType, tmp_path: Path) -> None:
    mask = np.zeros((80, 200), np.uint8)
    for x, y in ((30, 40), (100, 40), (132, 40)):  # one alone, two that touch
        cv2.circle(mask, (x, y), 18, 255, -1)
    cv2.imwrite(str(tmp_path / "a.png"), mask)
    assert benchmark.of_masks(tmp_path) == {"parts": 2, "found": 3, "convex": 1, "convex_cut": 0}


def test_a_scene_has_as_many_as_it_says(benchmark: ModuleType) -> None:
    """Apart from each other they are as many connected parts; at random places few are drawn."""
    lone = benchmark.Kind("lone", 12, rough=0, touching=0)
    mask, true = benchmark.scene(lone, 3, 1)
    assert true == 3
    assert label(mask)[1] in (2, 3)
    assert benchmark.summary([{"true": 10, "found": 9, "parts": 4}, {"true": 10, "found": 11, "parts": 6}]) == {
        "mean_error": pytest.approx(10),
        "worst_of_50": 0,
        "near": 0,
        "sum_error": 0,
        "parts_error": -50,
    }
    assert "| lone | 3 |" in benchmark.table(
        [{"kind": "lone", "scenes": [{"true": 3}], **benchmark.summary([{"true": 3, "found": 3, "parts": 3}])}]
    )
