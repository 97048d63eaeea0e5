"""benchmarks/build_cost.py, on graphs written by hand."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from hand_graphs import hand_bundle, hand_graph


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
