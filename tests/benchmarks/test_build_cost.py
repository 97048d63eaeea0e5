"""benchmarks/build_cost.py, on graphs written by hand."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hand_graphs import hand_bundle, hand_graph

from espmedsam_edge.errors import UserError


@pytest.mark.rtx
@pytest.mark.usefixtures("no_gpu", "rtx")
def test_every_graph_has_its_seconds_memory_and_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, load_script: Callable[[str], ModuleType]
) -> None:
    benchmark = load_script("benchmarks/build_cost.py")
    monkeypatch.setattr(benchmark, "RESULTS", tmp_path)
    bundle = hand_bundle(tmp_path / "b", {"fp32": hand_graph("fp16"), "int8": hand_graph("int8")})
    monkeypatch.setattr("sys.argv", ["build_cost.py", "--name", "trial", "--target", "sm86", str(bundle.path)])
    benchmark.main()
    result = json.loads((tmp_path / "trial.json").read_text())
    assert (result["kind"], result["targets"]) == ("build-cost", ["sm86"])
    assert result["builder"].startswith("TensorRT-RTX 1.")
    mislabelled, built = result["rows"]
    assert "fp32.onnx is listed as fp32, but its" in mislabelled["refusal"]
    assert (built["modality"], built["precision"]) == ("fundus", "int8")
    assert 0 < built["seconds"] < built["seconds_with_process"]
    assert 0.01 < built["peak_gb"] < 3
    assert built["engine_mb"] > 0.01
    assert set(built["macs"]) == {"int8", "fp16"}


def test_inductors_builds_of_fp32_graphs_have_a_row_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, load_script: Callable[[str], ModuleType]
) -> None:
    benchmark = load_script("benchmarks/build_cost.py")
    monkeypatch.setattr(benchmark, "RESULTS", tmp_path)
    built = benchmark.inductor.Built(b"0" * 2_000_000, {"seconds": "3.5", "agreement": "alike"}, tmp_path, True)

    def compile_it(bundle: Any, graph: Any, device: str, arithmetic: str, **_: Any) -> Any:
        if arithmetic == "bf16":
            raise UserError("no such instruction.")
        return built

    monkeypatch.setattr(benchmark.inductor, "find_or_build", compile_it)
    monkeypatch.setattr(benchmark.inductor, "why_not_here", lambda *_: None)
    bundle = hand_bundle(tmp_path / "b", {"fp32": hand_graph("fp32"), "int8": hand_graph("int8")})
    monkeypatch.setattr("sys.argv", ["build_cost.py", "--name", "trial", "--backend", "inductor", str(bundle.path)])
    benchmark.main()
    result = json.loads((tmp_path / "trial.json").read_text())
    assert result["builder"].startswith("Inductor of torch")
    compiled, refused = result["rows"]
    assert (compiled["arithmetic"], compiled["seconds"], compiled["engine_mb"]) == ("fp32", 3.5, 2.0)
    assert (refused["arithmetic"], refused["refusal"]) == ("bf16", "no such instruction.")
