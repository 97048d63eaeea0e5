"""Predictions stay predictions: how they are computed, that the file says so, and that the page shows its numbers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from espmedsam_edge.bench.roofline import GraphCost, Kernel

ROOT = Path(__file__).parents[2]
RESULT = ROOT / "benchmarks" / "results" / "predicted-espmedsam-s.json"


@pytest.fixture
def predict(load_script: Callable[[str], ModuleType]) -> ModuleType:
    return load_script("benchmarks/predict.py")


def test_a_graph_counts_as_if_it_were_of_another_precision(predict: ModuleType) -> None:
    kernels = [
        Kernel("encoder.mlp/MatMul", "fp32", 800, 100, 40),
        Kernel("encoder.attention/MatMul", "fp32", 80, 60, 0),
        Kernel("decoder/MatMul", "fp32", 8, 60, 20),
        Kernel("encoder/Softmax", "", 0, 40, 0),
    ]
    cost = GraphCost(kernels, 60)
    assert predict.in_precision(cost, "fp32") is cost
    half = predict.in_precision(cost, "fp16")
    assert (half.flop, half.bytes, half.weight_bytes) == ({"fp16": 888}, 130, 30)
    quarter = predict.in_precision(cost, "int8")
    assert quarter.flop == {"int8": 800, "fp16": 88}
    assert [kernel.bytes for kernel in quarter.kernels] == [30 + 10, 30, 20 + 10, 20]


def test_a_row_is_the_bound_at_each_efficiency(predict: ModuleType) -> None:
    cost = GraphCost([Kernel("a", "fp32", 10**9, 10**6, 0)], 0)
    rows = predict.predict({64: cost}, {"fp16": (0.5, "some GPU")})
    assert len(rows) == 9
    nano, half = rows[0], rows[1]
    assert nano["bound_ms"] == pytest.approx(1000 / 2100, abs=1e-3)  # 1 GFLOP at 2.1 TFLOP/s
    assert nano["predicted_fps"] == [pytest.approx(2100 * 0.35, abs=0.1), pytest.approx(2100 * 0.65, abs=0.1)]
    assert half["efficiency"] == [0.5, 0.5]


def test_only_a_bench_of_a_gpu_gives_an_efficiency(predict: ModuleType, tmp_path: Path) -> None:
    bench = {
        "contenders": [{"precision": "fp16", "device_times": {"stages_ms": {}}}],
        "environment": {"gpus": [{"name": "some GPU"}]},
        "roofline": {"run_to_bound": 2.0},
    }
    path = tmp_path / "bench.json"
    path.write_text(json.dumps(bench))
    assert predict.efficiency_of([path]) == {"fp16": (0.5, "some GPU")}
    path.write_text(json.dumps({**bench, "environment": {"gpus": []}}))
    with pytest.raises(SystemExit, match="not measured on a GPU"):
        predict.efficiency_of([path])


def test_the_file_and_the_page_say_that_nothing_was_measured(predict: ModuleType) -> None:
    data = json.loads(RESULT.read_text())
    assert (data["kind"], data["measured"]) == ("prediction", False)
    page = (ROOT / "docs" / "performance.md").read_text()
    assert "what else is said of GPUs is a\nprediction, marked as one" in page
    table = predict.as_markdown(data)
    assert (RESULT.with_suffix(".md")).read_text() == table
    rows = [line for line in table.splitlines() if line.startswith("| ")]
    assert len(rows) == 17
    assert all(row in page for row in rows)
