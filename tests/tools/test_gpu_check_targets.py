"""The targets of the GPU path as gpu_check judges them, on results made up for the purpose."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

SCRIPTS = Path(__file__).parents[2] / "tools"
GOOD = {
    "engine": 1.4, "frame": 1.7, "p99": 2.0, "kernels": 0.05, "eager": 0.1, "compile": 0.5, "before": 0.5,
    "after": 0.35, "video": 0.9, "ort": 9.7,
}  # fmt: skip
NAMES = ("engine", "frame", "p99", "ort", "eager", "compile", "kernels", "before", "after", "video", "sanitizer")


@pytest.fixture
def judge(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(SCRIPTS)
    monkeypatch.delitem(sys.modules, "gpu_check_targets", raising=False)
    return importlib.import_module("gpu_check_targets")


def write(out: Path, **other: Any) -> None:
    """Results of every step; ``other`` replaces what matters to a target."""
    values = {**GOOD, **other}
    contender = {
        "backend": values.get("backend", "tensorrt"),
        "device": "a GPU",
        "precision": values.get("precision", "fp16"),
        "batch": 1,
        "image_size": values.get("size", 1024),
        "frame_to_mask_ms": {"p50": values["frame"], "p99": values["p99"], "samples": 900},
        "device_times": {"stages_ms": {"engine": {"p50": values["engine"]}}, "kernels_to_engine": values["kernels"]},
    }
    if values.get("cpu"):
        contender["device_times"] = None
    source = {"width": values.get("width", 1920), "height": 1080}
    bench = {"schema": values.get("schema", 2), "source": source, "contenders": [contender]}
    rivals = {"torch eager": "eager", "torch compile fp16": "compile"}
    comparisons = [
        {"to": name, "network_on_gpu": values[key], "frame_to_mask": {"value": 0.25}}
        for name, key in rivals.items()
        if values[key]
    ]
    compare = {**bench, "comparisons": comparisons, "left_out": values.get("left_out", [])}
    rows = [{"name": "preprocess NV12", "of_copy": values["before"]}, {"name": "preprocess", "of_copy": 0.9}]
    rows += [{"name": "postprocess", "of_copy": values["after"]}]
    (out / values.get("file", "bench-fp16.json")).write_text(json.dumps(bench))
    times = {"stages_ms": {"engine": {"p50": values["ort"]}}}
    other = {**contender, "backend": "onnxruntime-cuda", "device_times": times, "precision": "fp32", "image_size": 1024}
    (out / "bench-fp32-onnxruntime-cuda.json").write_text(json.dumps({**bench, "contenders": [other]}))
    for name in ("torch-eager", "torch-compile"):
        (out / f"compare-{name}.json").write_text(json.dumps(compare))
    (out / "kernels.json").write_text(json.dumps({"rows": rows}))
    (out / "video.json").write_text(json.dumps({"of_slowest": values["video"], "slowest": "encode"}))


def verdicts(judge: ModuleType, out: Path, sanitized: list[Any] | None = None) -> dict[str, str]:
    tools = [judge.Sanitized("passed", "")] * 3 if sanitized is None else sanitized
    return {name: target.verdict for name, target in zip(NAMES, judge.targets(out, tools), strict=True)}


def test_results_at_the_limits_meet_every_target(judge: ModuleType, tmp_path: Path) -> None:
    write(tmp_path)
    assert set(verdicts(judge, tmp_path).values()) == {"met"}
    cells = [target.cells() for target in judge.targets(tmp_path, [])]
    assert cells[0][:4] == ("engine, FP16, batch 1, 1024 x 1024", "1.4 ms", "≤ 1.5 ms", "met")
    assert cells[3] == (
        "ONNX Runtime's CUDA provider, batch 1, 1024 x 1024",
        "9.7 ms",
        "≤ 9.7 ms",
        "met",
        "fp32, a GPU",
    )
    assert cells[4][:4] == ("faster than eager PyTorch in FP32", "10 x", "≥ 10 x", "met")
    assert cells[7] == (
        "preprocess, over the copy rate",
        "50.0 %",
        "≥ 50.0 %",
        "met",
        "the slowest of 2: preprocess NV12",
    )
    assert cells[8] == ("postprocess, over the copy rate", "35.0 %", "≥ 35.0 %", "met", "the slowest of 1: postprocess")


def test_inductor_in_fp16_stands_for_a_graph_in_fp16(judge: ModuleType, tmp_path: Path) -> None:
    inductor = {"backend": "inductor:fp16", "precision": "fp32", "file": "bench-fp32-inductor-fp16.json"}
    write(tmp_path, **inductor, engine=2.0, frame=2.5, p99=2.6, kernels=0.04)
    found = verdicts(judge, tmp_path)
    assert {found[name] for name in ("engine", "frame", "p99", "kernels")} == {"met"}
    assert judge.targets(tmp_path, [])[0].cells()[1:3] == ("2 ms", "≤ 2 ms")


@pytest.mark.parametrize(
    ("changed", "missed"),
    [
        ({"engine": 1.51, "frame": 1.8, "p99": 1.9}, "engine"),
        ({"frame": 1.76, "p99": 2.0}, "frame"),
        ({"p99": 2.05}, "p99"),
        ({"eager": 0.101}, "eager"),
        ({"compile": 0.51}, "compile"),
        ({"kernels": 0.0501}, "kernels"),
        ({"before": 0.49}, "before"),
        ({"after": 0.34}, "after"),
        ({"ort": 9.8}, "ort"),
        ({"video": 0.89}, "video"),
    ],
)
def test_each_target_can_be_missed_alone(
    judge: ModuleType, tmp_path: Path, changed: dict[str, float], missed: str
) -> None:
    write(tmp_path, **changed)
    assert {name for name, verdict in verdicts(judge, tmp_path).items() if verdict == "missed"} == {missed}


@pytest.mark.parametrize(
    ("changed", "unmeasured", "why"),
    [
        ({"precision": "fp32"}, {"engine", "frame", "p99", "kernels", "eager", "compile"}, "measured was fp32"),
        ({"size": 448}, {"engine", "frame", "p99", "kernels", "eager", "compile"}, "at 448 pixels"),
        ({"cpu": True}, {"engine", "frame", "p99", "kernels", "eager", "compile"}, "no times of a GPU"),
        ({"width": 640}, {"frame"}, "frames were 640 x 1080"),
        ({"schema": 1}, {"frame"}, "without the overlay"),
        ({"compile": None, "left_out": ["torch-compile: no Triton"]}, {"compile"}, "torch-compile: no Triton"),
        ({"eager": None}, {"eager"}, "no torch eager"),
    ],
)
def test_what_was_not_measured_is_neither_met_nor_missed_and_says_why(
    judge: ModuleType, tmp_path: Path, changed: dict[str, Any], unmeasured: set[str], why: str
) -> None:
    write(tmp_path, **changed)
    found = verdicts(judge, tmp_path)
    assert {name for name, verdict in found.items() if verdict == "not measured"} == unmeasured
    assert {verdict for name, verdict in found.items() if name not in unmeasured} == {"met"}
    assert any(why in target.note for target in judge.targets(tmp_path, []))


def test_without_results_nothing_is_measured(judge: ModuleType, tmp_path: Path) -> None:
    assert set(verdicts(judge, tmp_path, []).values()) == {"not measured"}
    assert judge.targets(tmp_path, [])[0].note == "there is no bench-fp16.json"
    assert json.loads(json.dumps([target.as_json() for target in judge.targets(tmp_path, [])]))[0]["value"] is None


def test_the_sanitizer_is_clean_if_all_its_tools_passed(judge: ModuleType, tmp_path: Path) -> None:
    passed = judge.Sanitized("passed", "ERROR SUMMARY: 0 errors")
    for other, verdict in (
        (judge.Sanitized("FAILED", "ERROR SUMMARY: 4 errors"), "missed"),
        (judge.Sanitized("FAILED", "stopped after 25 s"), "not measured"),
        (judge.Sanitized("LEFT OUT", "compute-sanitizer is not on the PATH"), "not measured"),
    ):
        assert verdicts(judge, tmp_path, [passed, other, passed])["sanitizer"] == verdict
        assert judge.targets(tmp_path, [passed, other, passed])[-1].note == other.note
    assert verdicts(judge, tmp_path, [passed, passed])["sanitizer"] == "not measured"
