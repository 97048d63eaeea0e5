"""benchmarks/build_cost.py, on graphs written by hand."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
from hand_graphs import hand_bundle, hand_graph

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "build_cost.py"


@pytest.mark.rtx
@pytest.mark.usefixtures("no_gpu", "rtx")
def test_every_graph_has_its_seconds_memory_and_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    specification = importlib.util.spec_from_file_location("build_cost", SCRIPT)
    assert specification is not None
    assert specification.loader is not None
    benchmark = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(benchmark)
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
