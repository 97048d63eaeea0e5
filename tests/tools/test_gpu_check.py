"""tools/gpu_check.sh where there is no GPU: it must not look like a pass, and its parts must do what they say."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from toy_bundles import save_toy_bundle

from espmedsam_edge.files import sha256_file
from espmedsam_edge.runtime.cuda.driver import unavailable
from espmedsam_edge.shipped.bundles import CHECKPOINT, WEIGHTS, shipped_bundle

SCRIPT = Path(__file__).parents[2] / "tools" / "gpu_check.sh"


def _check(*arguments: str) -> subprocess.CompletedProcess[str]:
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("needs bash")
    return subprocess.run(
        [bash, SCRIPT, *arguments], capture_output=True, text=True, env={**os.environ, "PYTHON": sys.executable}
    )


@pytest.fixture
def check(monkeypatch: pytest.MonkeyPatch, load_script: Callable[[str], ModuleType]) -> ModuleType:
    """The script's Python part as a module."""
    monkeypatch.syspath_prepend(SCRIPT.parent)
    return load_script("tools/gpu_check.py")


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


@pytest.fixture(scope="module")
def dry_run() -> list[str]:
    ended = _check("--dry-run", "--out", "nowhere/at/all")
    assert ended.returncode == 0, ended.stderr
    return ended.stdout.splitlines()


def test_a_dry_run_names_every_step_in_the_order_of_their_weight(dry_run: list[str]) -> None:
    names = [line.split(" (at least")[0] for line in dry_run]
    assert names == [
        "tensorrt builds and runs", "tensorrt-rtx builds and runs", "inductor builds and runs",
        "onnxruntime-cuda builds and runs", "build inductor:fp16 fp32", "build inductor fp32",
        "tests of Inductor on the GPU", "build fp16", "build fp32",
        "tests on the GPU", "compute-sanitizer memcheck", "compute-sanitizer racecheck", "compute-sanitizer initcheck",
        "bench fp16", "kernels against the copy rate", "video to video", "several streams", "fp32 against torch-eager",
        "bench fp32", "bench int8", "peers' encoders", "fp32 against torch-compile",
    ]  # fmt: skip
    assert not Path("nowhere").exists()
    only = _check("--dry-run", "--only", "bench", "--only", "tests").stdout.splitlines()
    assert len(only) == 5


def test_by_itself_it_measures_the_shipped_weights_at_full_size(dry_run: list[str]) -> None:
    lines = {line.split(" (at least")[0]: line for line in dry_run}
    bundle = shipped_bundle("fundus")
    assert bundle.manifest.graphs[0].image_size == 1024
    for name in ("build fp32", "bench fp32"):
        assert f"{bundle.path} --modality fundus --precision fp32" in lines[name]
    for rival in ("torch-eager", "torch-compile"):
        assert f"--compare {rival} --checkpoint {WEIGHTS / CHECKPOINT}" in lines[f"fp32 against {rival}"]
    for name in ("build fp16", "bench fp16", "bench int8"):
        assert f"no bundle here has a {name.split()[1]} graph" in lines[name]


def in_precisions(path: Path, *precisions: str, checkpoint: str = "0" * 64) -> Path:
    """The part of a bundle's manifest that the check reads."""
    path.mkdir()
    graphs = [{"modality": "fundus", "precision": precision} for precision in precisions]
    (path / "manifest.json").write_text(json.dumps({"graphs": graphs, "weights": {"checkpoint_sha256": checkpoint}}))
    return path


def test_a_bundle_gives_what_it_has_and_the_shipped_weights_the_rest(check: ModuleType, tmp_path: Path) -> None:
    weights = tmp_path / "w.safetensors"
    weights.write_bytes(b"weights")
    carried = in_precisions(tmp_path / "own.bundle", "fp16", "int8", checkpoint=sha256_file(weights))
    shipped = in_precisions(tmp_path / "shipped.bundle", "fp32")
    steps = {each.name: each for each in check.plan([carried, shipped], weights, tmp_path, ["tensorrt"])}
    for name, bundle in (
        ("build fp16", carried),
        ("build fp32", shipped),
        ("bench fp16", carried),
        ("bench int8", carried),
        ("bench fp32", shipped),
    ):
        assert steps[name].reason is None
        assert str(bundle) in steps[name].command
    assert steps["fp16 against torch-eager"].reason is None
    assert steps["tests on the GPU"].variables == {"ESPMEDSAM_BUNDLE": str(carried)}
    weights.write_bytes(b"other weights")
    steps = {each.name: each for each in check.plan([carried, shipped], weights, tmp_path, ["tensorrt"])}
    assert "not exported from w.safetensors" in steps["fp16 against torch-eager"].reason


def test_all_steps_together_fit_in_the_time(check: ModuleType, tmp_path: Path) -> None:
    bundle = in_precisions(tmp_path / "own.bundle", "fp32", "fp16", "int8")
    weights = tmp_path / "w.safetensors"
    weights.write_bytes(b"")
    first = [*check.engines(tmp_path), *check.compilations([bundle], None)]
    for working in (list(check.ENGINES), ["inductor", "onnxruntime-cuda"]):
        then = check.plan([bundle], weights, tmp_path, working)
        seconds = [check.seconds_of(turn) for steps in (first, then) for turn in check.turns(steps)]
        assert sum(seconds) <= check.BUDGET <= 250
        assert {each.group for each in (*first, *then)} == set(check.GROUPS)


def test_what_nobody_times_runs_at_once_and_the_rest_alone(check: ModuleType, tmp_path: Path) -> None:
    bundle = in_precisions(tmp_path / "own.bundle", "fp32", "fp16")
    weights = tmp_path / "w.safetensors"
    weights.write_bytes(b"")
    first = [*check.engines(tmp_path), *check.compilations([bundle], None)]
    assert len(check.turns(first)) == 1
    builds = [each.command[each.command.index("--precision") + 1 :] for each in first if each.group == "builds"]
    assert builds == [["fp16", "--backend", "inductor"], ["fp32", "--backend", "inductor"]]
    turns = check.turns(check.plan([bundle], weights, tmp_path, ["inductor"]))
    (beside,) = [turn for turn in turns if len(turn) > 1]
    assert [each.group for each in beside] == ["tests", *["sanitizer"] * 3]
    assert [each.group for turn in turns for each in turn if each.group == "builds"] == []  # they are made

    meet = "import os, time; open({!r}, 'w').close()\nwhile not os.path.exists({!r}): time.sleep(0.01)"
    both = [step(check, one, meet.format(one, other), together=True) for one, other in (("a", "b"), ("b", "a"))]
    each_other = [replace(one, command=["env", "-C", str(tmp_path), *one.command]) for one in both]
    outcomes = check.run_all(each_other, lambda working: [], tmp_path)
    assert [(each.name, each.verdict) for each in outcomes] == [("a", "passed"), ("b", "passed")]


@pytest.mark.parametrize(
    "working",
    [
        ["inductor", "onnxruntime-cuda"],
        ["onnxruntime-cuda", "inductor"],
        ["tensorrt-rtx", "inductor", "onnxruntime-cuda"],
    ],
)
def test_the_best_engine_is_measured_in_full_and_the_others_once(
    check: ModuleType, tmp_path: Path, working: list[str]
) -> None:
    bundle = in_precisions(tmp_path / "own.bundle", "fp32")
    weights = tmp_path / "w.safetensors"
    weights.write_bytes(b"")
    steps = check.plan([bundle], weights, tmp_path, working)
    backends = {
        each.name: each.command[each.command.index("--backend") + 1] for each in steps if "--backend" in each.command
    }
    first, *others = working
    halved, whole = ("inductor:fp16", "inductor") if first == "inductor" else (first, "inductor:fp16")
    for name in ("bench fp32", "video to video", "several streams", "fp32 against torch-eager"):
        assert backends[name] == halved
    benches = {name for name in backends if name.startswith("bench fp32")}
    # Without an FP16 graph Inductor halves the FP32 one.
    more = [whole, "onnxruntime-cuda:nhwc"]
    assert benches == {"bench fp32", *(f"bench fp32 {other}" for other in (*others, *more))}
    assert [name for name in backends if name.startswith("build")] == (
        ["build fp16", "build fp32"] if first.startswith("tensorrt") else []
    )
    files = [each.command[each.command.index("--json") + 1] for each in steps if "--json" in each.command]
    assert len(set(files)) == len(files)
    assert not any(":" in Path(file).name for file in files)


def step(check: ModuleType, name: str, code: str, group: str = "tests", **options: Any) -> Any:
    return check.Step(group, name, [sys.executable, "-c", code], options.pop("limit", 60), **options)


def test_steps_pass_fail_are_left_out_and_are_stopped(check: ModuleType, tmp_path: Path) -> None:
    steps = [
        step(check, "good", "print('all well')"),
        step(check, "bad", "import sys; print('three failed'); sys.exit(1)"),
        step(check, "missing", "import sys; print('not installed'); sys.exit(3)"),
        step(check, "impossible", "", reason="there is no compiler"),
        step(check, "told", "import os; print(os.environ['TOLD'])", variables={"TOLD": "yes"}),
    ]
    kept: list[int] = []
    outcomes = check.run_all(steps, lambda working: [], tmp_path, keep=lambda found: kept.append(len(found)))
    assert kept == [1, 2, 3, 4, 5]  # what was found is written at once
    assert [(each.verdict, each.note) for each in outcomes] == [
        ("passed", "all well"),
        ("FAILED", "three failed"),
        ("LEFT OUT", "not installed"),
        ("LEFT OUT", "there is no compiler"),
        ("passed", "yes"),
    ]
    assert (tmp_path / "bad.log").read_text() == "three failed\n"


def test_an_endless_step_is_stopped(check: ModuleType, tmp_path: Path) -> None:
    outcome = check.run(step(check, "endless", "import time; time.sleep(600)"), 5.0, tmp_path)
    assert (outcome.verdict, outcome.note) == ("FAILED", "stopped after 5 s")


@pytest.fixture
def allowed(check: ModuleType, monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """The seconds that each step is given; none is run."""
    given: dict[str, float] = {}

    def run(step: Any, limit: float, out: Path) -> Any:
        given[step.name] = limit
        return check.Outcome(step.name, "passed", 0.0)

    monkeypatch.setattr(check, "run", run)
    return given


def test_where_time_is_short_the_last_steps_go_without(
    check: ModuleType, tmp_path: Path, allowed: dict[str, float]
) -> None:
    steps = [step(check, "a", "", limit=60), step(check, "b", "", limit=60)]
    ticks = iter([0.0, 0.0, 60.0])
    check.run_all(steps, lambda working: [], tmp_path, budget=100, clock=lambda: next(ticks))
    assert allowed == {"a": 60, "b": 40}


def test_a_step_has_what_those_before_left_and_leaves_those_after_their_own(
    check: ModuleType, tmp_path: Path, allowed: dict[str, float]
) -> None:
    first = [step(check, "engine", "", "engines", limit=100)]
    then = [step(check, "gone", "", limit=50, reason="not here"), step(check, "a", "", limit=60), step(check, "b", "")]
    ticks = iter([0.0, 0.0, 20.0, 20.0, 80.0])
    check.run_all(first, lambda working: then, tmp_path, budget=260, clock=lambda: next(ticks))
    assert allowed == {"engine": 140, "gone": 120, "a": 180, "b": 180}


def test_what_does_not_fit_in_the_time_is_left_out(check: ModuleType, tmp_path: Path) -> None:
    ticks = iter([0.0, 10.0, 518.0])
    steps = [step(check, "first", "print(1)"), step(check, "late", "print(2)")]
    outcomes = check.run_all(steps, lambda working: [], tmp_path, clock=lambda: next(ticks))
    assert [(each.verdict, each.note) for each in outcomes] == [("passed", "1"), ("LEFT OUT", "no time was left")]


def test_engines_come_first_and_the_benches_take_the_one_that_works(check: ModuleType, tmp_path: Path) -> None:
    def works(name: str, milliseconds: float) -> Any:
        result = {"works": True, "stages_ms": {"engine": milliseconds}}
        write = f"import json, pathlib; pathlib.Path({str(tmp_path / f'engine-{name}.json')!r}).write_text"
        return step(check, f"{name} builds and runs", f"{write}({json.dumps(result)!r})", "engines")

    engines = [
        step(check, "tensorrt builds and runs", "import sys; sys.exit(3)", "engines"),
        step(check, "tensorrt-rtx builds and runs", "import sys; sys.exit(1)", "engines"),
        works("onnxruntime-cuda", 9.0),
        works("inductor", 2.0),
    ]
    chosen: list[list[str]] = []

    def then(working: list[str]) -> list[Any]:
        chosen.append(working)
        return [step(check, "bench", "print('fast')", "bench")]

    outcomes = check.run_all(engines, then, tmp_path)
    assert [each.name for each in outcomes] == [*(each.name for each in engines), "bench"]
    assert chosen == [["tensorrt"], ["inductor", "onnxruntime-cuda"]]  # first to know what to keep for steps to come
    assert [check.spare(each, tmp_path) for each in outcomes] == [True, True, False, False, False]


def test_without_an_engine_nothing_is_benched(check: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "engine-tensorrt.json").write_text('{"works": false}')
    assert check.working_engines(tmp_path) == []
    weights = tmp_path / "w.safetensors"
    weights.write_bytes(b"")
    steps = check.plan([save_toy_bundle(tmp_path / "toy.bundle").path], weights, tmp_path, [])
    needing = [each for each in steps if each.group in ("builds", "bench", "compare")]
    assert {each.reason for each in needing} == {"no engine ran here"}
    assert [each.reason for each in steps if each.group == "kernels"] == [None]


def test_a_comparison_without_the_other_says_why(check: ModuleType, tmp_path: Path) -> None:
    file = tmp_path / "compare-torch-compile.json"
    compared = check.Step("compare", "compare", ["bench", "--json", str(file)], 10.0)
    outcome = check.Outcome("compare", "FAILED", 1.0, "something")
    assert check.compared(compared, outcome) == outcome
    file.write_text(json.dumps({"left_out": ["torch-compile: no Triton"]}))
    assert check.compared(compared, outcome).note == "torch-compile: no Triton"
    assert check.compared(compared, outcome).verdict == "LEFT OUT"


@pytest.fixture
def engine(load_script: Callable[[str], ModuleType]) -> ModuleType:
    """The script that tries one engine, as a module."""
    return load_script("tools/gpu_check_engine.py")


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("tensorrt-rtx", "there is no NVIDIA driver here"),
        ("inductor", "there is no NVIDIA GPU with a driver here"),  # and not taken on the processor
        ("no-such", "this version does not have it"),
    ],
)
def test_an_engine_that_cannot_be_tried_says_why(
    engine: ModuleType, no_gpu: None, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, why: str
) -> None:
    assert engine.check_engine(name, tmp_path) == 3
    assert why in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_an_engine_that_works_is_timed_and_compared(engine: ModuleType, tmp_path: Path) -> None:
    """Rehearsed on the CPU, which has no stages of its own."""
    assert engine.check_engine("onnxruntime-cpu", tmp_path) == 0
    found = json.loads((tmp_path / "engine-onnxruntime-cpu.json").read_text())
    assert (found["works"], found["equal_pixels"]) == (True, 1.0)
    assert found["seconds"] > 0


@pytest.mark.parametrize(("equal", "code"), [(0.9999, 0), (0.99985, 1)])
def test_an_engine_works_whose_mask_is_the_reference_s(
    check: ModuleType, engine: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, equal: float, code: int
) -> None:
    reference = np.zeros((100, 200), np.uint8)
    mask = reference.copy()
    mask.reshape(-1)[: round((1 - equal) * mask.size)] = 255
    masks = {"tensorrt": mask, "onnxruntime-cpu": reference}

    def load(bundle: Any, modality: str, precision: str, backend: str, **_: Any) -> Any:
        chosen = SimpleNamespace(backend=SimpleNamespace(device="a GPU"))
        segmenter = SimpleNamespace(
            choice=chosen, segment=lambda frame: SimpleNamespace(mask=masks[backend]), frame_backend=None
        )
        return nullcontext(segmenter)

    monkeypatch.setattr("espmedsam_edge.runtime.backends.backend.unavailable", lambda name: None)
    monkeypatch.setattr("espmedsam_edge.runtime.segmenter.Segmenter.load", load)
    monkeypatch.setattr("espmedsam_edge.shipped.bundles.shipped_bundle", lambda name: None)
    assert engine.check_engine("tensorrt", tmp_path) == code
    assert (check.working_engines(tmp_path) == ["tensorrt"]) is (code == 0)


def test_a_used_folder_is_cleared_of_what_will_be_measured_and_of_nothing_else(
    check: ModuleType, tmp_path: Path
) -> None:
    ours = [
        "bench-fp16.json",
        "bench-fp16.md",
        "compare-torch-eager.json",
        "kernels.json",
        "summary.json",
        "summary.md",
    ]
    theirs = ["README.md", "mine.json", "tests.log"]
    for name in (*ours, *theirs, "engine-tensorrt.json"):
        (tmp_path / name).write_text("{}")
    check.clear(tmp_path, ["bench"])
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*theirs, "engine-tensorrt.json"])
    check.clear(tmp_path, check.GROUPS)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(theirs)


def test_the_summary_judges_this_run_alone(
    check: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "kernels.json").write_text("of an earlier run")

    def run_all(first: Any, then: Any, out: Path, budget: float, keep: Any) -> list[Any]:
        assert budget == check.BUDGET - 30
        assert not (out / "kernels.json").exists()
        (out / "kernels.json").write_text(json.dumps({"rows": [{"name": "postprocess", "of_copy": 0.4}]}))
        tools = [check.Outcome(f"compute-sanitizer {tool}", "passed", 1.0) for tool in check.SANITIZERS]
        outcomes = [*tools, check.Outcome("tests on the GPU", "FAILED", 2.0, "1 failed | 3 passed")]
        keep(outcomes)
        return outcomes

    monkeypatch.setattr(check, "run_all", run_all)
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--out", str(tmp_path), "--spent", "30"])
    assert check.main() == 1
    summary = json.loads((tmp_path / "summary.json").read_text())
    verdicts = {target["name"]: target["verdict"] for target in summary["targets"]}
    assert len(verdicts) == 11
    assert verdicts["postprocess, over the copy rate"] == "met"
    assert verdicts["tools of compute-sanitizer that found something"] == "met"
    assert verdicts["engine, FP16, batch 1, 1024 x 1024"] == "not measured"
    page = (tmp_path / "summary.md").read_text()
    assert "| postprocess, over the copy rate | 40.0 % | ≥ 35.0 % | met | the slowest of 1: postprocess |" in page
    assert "| tests on the GPU | FAILED | 2.0 | 1 failed / 3 passed |" in page
    assert "not measured  there is no bench-fp16.json" in capsys.readouterr().out
