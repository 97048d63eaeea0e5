"""The steps of gpu_check.sh, one after the other within a time limit, with a summary and JSON results.

    python scripts/gpu_check.py [--bundle B.bundle] [--checkpoint W.safetensors] [--out DIR] [--only STEP] [--dry-run]

A step that needs what is not there is left out with the reason, and the rest is done. Ends with 0 if every step passed
(one of TensorRT and TensorRT-RTX may be missing), else with 1.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

ROOT = Path(__file__).resolve().parents[1]
MODALITY = "microscopy"
"""What is run of the weights that came with the program, where no bundle is named."""

BUDGET = 520.0
"""Seconds for all steps together: under nine minutes with the start of the script."""
FLAVOURS = ("tensorrt", "tensorrt-rtx")
GROUPS = ("engines", "bench", "compare", "tests", "sanitizer")

_MISSING = 3  # how a child says that what it needs is not installed
Verdict = Literal["passed", "FAILED", "LEFT OUT"]


@dataclass(frozen=True)
class Step:
    """One command, the seconds it may take, and why it cannot be run here, if it cannot."""

    group: str
    name: str
    command: list[str]
    limit: float
    reason: str | None = None
    variables: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """What came of a step; ``note`` is a reason, or the last line it said."""

    name: str
    verdict: Verdict
    seconds: float
    note: str = ""


def plan(out: Path) -> list[Step]:
    """The steps up to the choice of a backend, and those that need none: engines, then tests and sanitizer."""
    own = [sys.executable, str(Path(__file__).resolve())]
    steps = [
        Step("engines", f"{flavour} builds and runs", [*own, "--engine", flavour, "--out", str(out)], 90)
        for flavour in FLAVOURS
    ]
    missing = [name for name in ("pytest", "hypothesis") if find_spec(name) is None]
    reason = f"not installed: {', '.join(missing)}" if missing else None
    # The caches of pytest and hypothesis belong to whoever develops, not to this check.
    tests = [sys.executable, "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider", "-rs"]
    steps.append(Step("tests", "tests on the GPU", [*tests, "tests/gpu"], 150, reason))
    if shutil.which("compute-sanitizer") is None:
        reason = "compute-sanitizer is not on the PATH; the CUDA toolkit has it"
    # Each tool slows kernels down by up to a hundred times: fewer random cases, and no camera-sized ones.
    few = {"ESPMEDSAM_KERNEL_EXAMPLES": os.environ.get("ESPMEDSAM_KERNEL_EXAMPLES", "12")}
    for tool in ("memcheck", "racecheck", "initcheck"):
        command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", "--print-limit", "20", *tests]
        command += ["-x", "-k", "not camera", "tests/gpu/test_gpu_kernels.py"]
        steps.append(Step("sanitizer", f"compute-sanitizer {tool}", command, 50, reason, few))
    return steps


def benches(bundle: Path, checkpoint: Path | None, out: Path, backend: str | None) -> list[Step]:
    """A bench of each precision, and the comparison of the best one with PyTorch and ONNX Runtime."""
    graphs = json.loads((bundle / "manifest.json").read_text())["graphs"]
    modality = graphs[0]["modality"]
    precisions = [graph["precision"] for graph in graphs if graph["modality"] == modality]
    none = "no TensorRT ran an engine here" if backend is None else None
    call = [sys.executable, "-m", "espmedsam_edge", "bench", str(bundle)]
    call += ["--modality", modality, "--backend", backend or "tensorrt"]
    steps = []
    for precision in ("fp32", "fp16", "int8"):
        reason = none or (None if precision in precisions else f"{bundle.name} has no {precision} graph")
        written = ["--json", str(out / f"bench-{precision}.json"), "--markdown", str(out / f"bench-{precision}.md")]
        steps.append(Step("bench", f"bench {precision}", [*call, "--precision", precision, *written], 75, reason))
    best = next((name for name in ("fp16", "fp32", "int8") if name in precisions), "fp32")
    reason = none or (None if checkpoint else "no --checkpoint, which PyTorch runs")
    command = [*call, "--precision", best, "--no-roofline", "--compare", "torch-eager,torch-compile,onnxruntime-cuda"]
    command += ["--checkpoint", str(checkpoint), "--json", str(out / "compare.json")]
    command += ["--markdown", str(out / "compare.md")]
    steps.append(Step("compare", f"{best} against PyTorch and ONNX Runtime", command, 150, reason))
    return steps


def run(step: Step, seconds_left: float, out: Path) -> Outcome:
    """Run a step, its output to the terminal and to a file of its name."""
    if step.reason:
        return Outcome(step.name, "LEFT OUT", 0.0, step.reason)
    if seconds_left < 5:
        return Outcome(step.name, "LEFT OUT", 0.0, "no time was left")
    print(f"== {step.name}", flush=True)
    limit, begin = min(step.limit, seconds_left), time.monotonic()
    log = out / f"{step.name.replace(' ', '-')}.log"
    with log.open("w") as stream:
        process = subprocess.Popen(
            step.command, cwd=ROOT, stdout=stream, stderr=subprocess.STDOUT, env={**os.environ, **step.variables},
            start_new_session=True,
        )  # fmt: skip
        try:
            code: int | None = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
            os.killpg(process.pid, 9)
            process.wait()
    seconds = time.monotonic() - begin
    text = log.read_text(errors="replace")
    print(text[-6000:], flush=True)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    last = lines[-1][:200] if lines else ""
    if code is None:
        return Outcome(step.name, "FAILED", seconds, f"stopped after {limit:.0f} s")
    if code == _MISSING:
        return Outcome(step.name, "LEFT OUT", seconds, last)
    return Outcome(step.name, "passed" if code == 0 else "FAILED", seconds, last)


def compared(outcome: Outcome, out: Path) -> Outcome:
    """The comparison's outcome, with those that could not take part: the others were compared all the same."""
    path = out / "compare.json"
    left_out = json.loads(path.read_text())["left_out"] if path.is_file() else []
    if outcome.verdict != "FAILED" or not left_out:
        return outcome
    return replace(outcome, verdict="LEFT OUT", note="; ".join(left_out))


def run_all(
    first: Sequence[Step],
    then: Callable[[str | None], Sequence[Step]],
    out: Path,
    budget: float = BUDGET,
    clock: Callable[[], float] = time.monotonic,
) -> list[Outcome]:
    """Run the steps on engines, those that need the backend they found, then all others."""
    begin, outcomes = clock(), []

    def each(steps: Sequence[Step]) -> None:
        for step in steps:
            outcome = run(step, budget - (clock() - begin), out)
            outcomes.append(compared(outcome, out) if step.group == "compare" else outcome)

    engines = [step for step in first if step.group == "engines"]
    each(engines)
    each(then(working_backend(out)))
    each([step for step in first if step.group != "engines"])
    return outcomes


def working_backend(out: Path) -> str | None:
    """The better of the backends whose engine ran and agreed with ONNX Runtime."""
    for flavour in FLAVOURS:
        path = out / f"engine-{flavour}.json"
        if path.is_file() and json.loads(path.read_text())["works"]:
            return flavour
    return None


def check_engine(flavour: str, out: Path) -> int:
    """Build the demo's engine, run it on this GPU and compare its mask with ONNX Runtime's; writes what it found."""
    from espmedsam_edge.errors import UserError
    from espmedsam_edge.phantoms import phantom_clip
    from espmedsam_edge.runtime.backend import unavailable
    from espmedsam_edge.runtime.cuda_driver import find_gpu
    from espmedsam_edge.runtime.segmenter import Segmenter
    from espmedsam_edge.runtime.shipped import shipped_bundle

    said: list[str] = []
    found: dict[str, Any] = {"flavour": flavour, "gpu": str(find_gpu()), "works": False, "error": None, "said": said}
    out.mkdir(parents=True, exist_ok=True)
    reason = unavailable(flavour)
    if reason is not None:
        print(reason)
        return _MISSING
    try:
        ((frame, _),) = phantom_clip(MODALITY, 0, 1, (480, 640))
        bundle = shipped_bundle(MODALITY)
        with Segmenter.load(bundle, MODALITY, "fp32", flavour, say=said.append) as segmenter:
            found["device"] = segmenter.choice.backend.device
            mask = segmenter.segment(frame).mask
            found["stages_ms"] = {name: 1000 * value for name, value in segmenter.stage_seconds([frame]).items()}
        with Segmenter.load(bundle, MODALITY, "fp32", "onnxruntime-cpu") as reference:
            found["equal_pixels"] = float((mask == reference.segment(frame).mask).mean())
        found["works"] = found["equal_pixels"] > 0.999  # FP32 by other kernels: pixels on the edge may differ
    except UserError as error:
        found["error"] = str(error)
    (out / f"engine-{flavour}.json").write_text(json.dumps(found, indent=2) + "\n")
    print(found["error"] or f"{found['device']}: {found['equal_pixels']:.4%} of mask pixels equal ONNX Runtime's")
    return 0 if found["works"] else 1


def spare(outcome: Outcome, out: Path) -> bool:
    """Whether a step was left out for lack of the one TensorRT where the other works."""
    return outcome.verdict == "LEFT OUT" and outcome.name.endswith("builds and runs") and bool(working_backend(out))


def summary(outcomes: Sequence[Outcome]) -> str:
    """A table."""
    width = max(len(outcome.name) for outcome in outcomes)
    return "\n".join(
        f"{outcome.verdict:<8}  {outcome.name:<{width}}  {outcome.seconds:6.1f} s  {outcome.note}".rstrip()
        for outcome in outcomes
    )


def main() -> int:
    """Run the check."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--bundle", type=Path, help="to bench; default: of the weights that came with the program")
    parser.add_argument("--checkpoint", type=Path, help="the weights it was exported from, for PyTorch")
    parser.add_argument("--out", type=Path, default=Path("gpu-check"), help="where results go")
    parser.add_argument("--only", action="append", choices=GROUPS, help="may be given several times")
    parser.add_argument("--engine", choices=FLAVOURS, help="only build and run one engine")
    parser.add_argument("--dry-run", action="store_true", help="say what would be run")
    arguments = parser.parse_args()
    out: Path = arguments.out.resolve()
    if arguments.engine:
        return check_engine(arguments.engine, out)
    if arguments.bundle is None:
        from espmedsam_edge.runtime.shipped import shipped_bundle

        arguments.bundle = shipped_bundle(MODALITY).path
    bundle: Path = arguments.bundle.resolve()
    if not (bundle / "manifest.json").is_file():
        parser.error(f"{arguments.bundle} is no bundle")
    checkpoint: Path | None = arguments.checkpoint.resolve() if arguments.checkpoint else None
    groups = arguments.only or GROUPS
    first = [step for step in plan(out) if step.group in groups]

    def then(backend: str | None) -> list[Step]:
        return [step for step in benches(bundle, checkpoint, out, backend) if step.group in groups]

    if arguments.dry_run:
        for step in [*first, *then(working_backend(out) or FLAVOURS[0])]:
            print(f"{step.name} (at most {step.limit:.0f} s): {step.reason or ' '.join(step.command)}")
        return 0

    from espmedsam_edge.runtime.environment import collect_environment

    out.mkdir(parents=True, exist_ok=True)
    environment = collect_environment()
    outcomes = run_all(first, then, out)
    failed = any(outcome.verdict != "passed" and not spare(outcome, out) for outcome in outcomes)
    result = {
        "schema": 1,
        "kind": "gpu-check",
        "environment": environment,
        "bundle": bundle.name,
        "backend": working_backend(out),
        "steps": [asdict(outcome) for outcome in outcomes],
    }
    (out / "summary.json").write_text(json.dumps(result, indent=2) + "\n")
    print("== summary")
    print(summary(outcomes))
    print(f"results: {out}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
