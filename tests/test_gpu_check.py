"""scripts/gpu_check.sh where there is no GPU: it must not look like a pass, and its parts must do what they say."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from toy_bundles import save_toy_bundle

from espmedsam_edge.runtime.cuda_api import unavailable

SCRIPT = Path(__file__).parents[1] / "scripts" / "gpu_check.sh"


def _check(*arguments: str) -> subprocess.CompletedProcess[str]:
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("needs bash")
    return subprocess.run(
        [bash, SCRIPT, *arguments], capture_output=True, text=True, env={**os.environ, "PYTHON": sys.executable}
    )


@pytest.fixture
def check(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script's Python part as a module."""
    spec = importlib.util.spec_from_file_location("gpu_check", SCRIPT.with_suffix(".py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "gpu_check", module)
    spec.loader.exec_module(module)
    return module


def test_without_a_gpu_it_says_so_and_fails() -> None:
    if unavailable() is None:
        pytest.skip("this machine has a GPU: the script would check it")
    ended = _check()
    assert ended.returncode == 2
    assert "nothing was checked: this machine has no usable GPU" in ended.stderr


@pytest.mark.parametrize(
    "arguments",
    [["--what"], ["--only", "all"], ["--wheels"], ["--bundle", "nowhere.bundle"], ["--checkpoint"], ["--out"]],
)
def test_wrong_options(arguments: list[str]) -> None:
    ended = _check(*arguments)
    assert ended.returncode == 2
    assert ended.stderr.startswith("gpu_check: ")
    assert len(ended.stderr.splitlines()) == 1


def test_a_dry_run_names_every_step(tmp_path: Path) -> None:
    weights = tmp_path / "w.safetensors"
    weights.write_bytes(b"")
    ended = _check("--dry-run", "--checkpoint", str(weights), "--out", str(tmp_path / "out"))
    assert ended.returncode == 0, ended.stderr
    lines = ended.stdout.splitlines()
    for words in (
        "tensorrt builds and runs", "tensorrt-rtx builds and runs", "bench fp32", "bench fp16", "bench int8",
        "fp32 against PyTorch and ONNX Runtime", "tests on the GPU", "memcheck", "racecheck", "initcheck",
    ):  # fmt: skip
        assert sum(words in line for line in lines) >= 1, words
    assert "torch-eager,torch-compile,onnxruntime-cuda" in ended.stdout
    assert "has no int8 graph" in ended.stdout
    assert not (tmp_path / "out").exists()
    only = _check("--dry-run", "--only", "bench", "--only", "tests").stdout.splitlines()
    assert len(only) == 4


def step(check: ModuleType, name: str, code: str, group: str = "tests", **options: Any) -> Any:
    return check.Step(group, name, [sys.executable, "-c", code], options.pop("limit", 60), **options)


def test_steps_pass_fail_are_left_out_and_are_stopped(check: ModuleType, tmp_path: Path) -> None:
    steps = [
        step(check, "good", "print('all well')"),
        step(check, "bad", "import sys; print('three failed'); sys.exit(1)"),
        step(check, "missing", "import sys; print('not installed'); sys.exit(3)"),
        step(check, "impossible", "", reason="there is no compiler"),
        step(check, "endless", "import time; time.sleep(600)", limit=0.5),
        step(check, "told", "import os; print(os.environ['TOLD'])", variables={"TOLD": "yes"}),
    ]
    outcomes = check.run_all(steps, lambda backend: [], tmp_path)
    assert [(each.verdict, each.note) for each in outcomes] == [
        ("passed", "all well"),
        ("FAILED", "three failed"),
        ("LEFT OUT", "not installed"),
        ("LEFT OUT", "there is no compiler"),
        ("FAILED", "stopped after 0 s"),
        ("passed", "yes"),
    ]
    table = check.summary(outcomes).splitlines()
    assert [line.split()[0] for line in table] == ["passed", "FAILED", "LEFT", "LEFT", "FAILED", "passed"]
    assert (tmp_path / "bad.log").read_text() == "three failed\n"


def test_what_does_not_fit_in_the_time_is_left_out(check: ModuleType, tmp_path: Path) -> None:
    ticks = iter([0.0, 10.0, 518.0])
    steps = [step(check, "first", "print(1)"), step(check, "late", "print(2)")]
    outcomes = check.run_all(steps, lambda backend: [], tmp_path, clock=lambda: next(ticks))
    assert [(each.verdict, each.note) for each in outcomes] == [("passed", "1"), ("LEFT OUT", "no time was left")]
    assert check.BUDGET < 9 * 60


def test_engines_come_first_and_the_benches_take_the_one_that_works(check: ModuleType, tmp_path: Path) -> None:
    write = f"import json, pathlib; pathlib.Path({str(tmp_path / 'engine-tensorrt-rtx.json')!r})"
    engines = [
        step(check, "tensorrt builds and runs", "import sys; sys.exit(3)", "engines"),
        step(check, "tensorrt-rtx builds and runs", write + ".write_text(json.dumps({'works': True}))", "engines"),
    ]
    chosen: list[str | None] = []

    def then(backend: str | None) -> list[Any]:
        chosen.append(backend)
        return [step(check, "bench", "print('fast')", "bench")]

    outcomes = check.run_all([step(check, "tests", ""), *engines], then, tmp_path)
    assert [each.name for each in outcomes] == [
        "tensorrt builds and runs", "tensorrt-rtx builds and runs", "bench", "tests"
    ]  # fmt: skip
    assert chosen == ["tensorrt-rtx"]
    assert [check.spare(each, tmp_path) for each in outcomes] == [True, False, False, False]


def test_without_an_engine_nothing_is_benched(check: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "engine-tensorrt.json").write_text('{"works": false}')
    assert check.working_backend(tmp_path) is None
    reasons = {
        each.name: each.reason
        for each in check.benches(save_toy_bundle(tmp_path / "toy.bundle").path, None, tmp_path, None)
    }
    assert set(reasons.values()) == {"no TensorRT ran an engine here"}


def test_a_comparison_without_some_is_not_a_failure_of_all(check: ModuleType, tmp_path: Path) -> None:
    outcome = check.Outcome("compare", "FAILED", 1.0, "something")
    assert check.compared(outcome, tmp_path) == outcome
    (tmp_path / "compare.json").write_text(json.dumps({"left_out": ["torch-compile: no Triton"]}))
    assert check.compared(outcome, tmp_path).note == "torch-compile: no Triton"
    assert check.compared(outcome, tmp_path).verdict == "LEFT OUT"


def test_an_engine_that_cannot_be_tried_says_why(
    check: ModuleType, no_gpu: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert check.check_engine("tensorrt-rtx", tmp_path) == 3
    assert "there is no NVIDIA driver here" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []
