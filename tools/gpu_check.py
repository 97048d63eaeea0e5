"""The steps of gpu_check.sh, one after the other within a time limit, with a summary and JSON results.

    python tools/gpu_check.py [--bundle B.bundle] [--checkpoint W.safetensors] [--out DIR] [--only STEP] [--dry-run]

Measured are the precisions of B.bundle, and of the weights that came with the program those that it lacks. The summary
says of each target whether it was met.

A step that needs what is not there is left out with the reason, and the rest is done. Ends with 0 if every step passed
(one of TensorRT and TensorRT-RTX may be missing), else with 1.
"""

from __future__ import annotations

import argparse
import json
import logging
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

from gpu_check_targets import Sanitized, Target, markdown, table, targets

from espmedsam_edge.files import sha256_file

ROOT = Path(__file__).resolve().parents[1]
SMALL = "microscopy"
"""What the first engines are made of, 448 x 448, of the weights that came with the program."""
MEASURED = "fundus"
"""What is measured of them, 1024 x 1024."""
EQUAL_PIXELS = 0.9999  # FP32 by other kernels: pixels on the edge may differ

BUDGET = 520.0
"""Seconds for all steps together and what was before them: under nine minutes with the summary."""
FLAVOURS = ("tensorrt", "tensorrt-rtx")
SANITIZERS = ("memcheck", "racecheck", "initcheck")
GROUPS = ("engines", "builds", "tests", "sanitizer", "bench", "compare", "kernels", "video")
MEASUREMENTS = ("bench-fp16", "bench-fp32", "bench-int8", "compare", "kernels", "video")
"""Files of results, without their ending."""

_MISSING = 3  # how a child says that what it needs is not installed
Verdict = Literal["passed", "FAILED", "LEFT OUT"]


@dataclass(frozen=True)
class Step:
    """One command, the seconds that are kept for it, and why it cannot be run here, if it cannot."""

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


def engines(out: Path) -> list[Step]:
    """Whether each TensorRT can build and run an engine here at all, on a small network."""
    own = [sys.executable, str(Path(__file__).resolve())]
    return [
        Step("engines", f"{flavour} builds and runs", [*own, "--engine", flavour, "--out", str(out)], limit)
        for flavour, limit in zip(FLAVOURS, (45, 25), strict=True)
    ]


@dataclass(frozen=True)
class Network:
    """A graph to measure: a bundle's, of its first modality, and the SHA-256 of the checkpoint it was made from."""

    bundle: Path
    modality: str
    precision: str
    checkpoint_sha256: str


def networks(bundles: Sequence[Path]) -> dict[str, Network]:
    """The graph of each precision, of the first bundle that has it; the best precision to run comes first."""
    found: dict[str, Network] = {}
    for precision in ("fp16", "fp32", "int8"):
        for bundle in bundles:
            manifest = json.loads((bundle / "manifest.json").read_text())
            modality = manifest["graphs"][0]["modality"]
            if any((graph["modality"], graph["precision"]) == (modality, precision) for graph in manifest["graphs"]):
                found[precision] = Network(bundle, modality, precision, manifest["weights"]["checkpoint_sha256"])
                break
    return found


def plan(bundles: Sequence[Path], checkpoint: Path, out: Path, backend: str | None) -> list[Step]:
    """All steps but those on small engines, in the order in which they run.

    Args:
        bundles: whose graphs are measured; of the first one engines are compared with ONNX Runtime.
        checkpoint: the weights they were exported from, for PyTorch.
        out: where results go.
        backend: the TensorRT that runs here; None: none does, and what needs it is left out.
    """
    found = networks(bundles)
    best = next(iter(found.values()))
    none = "no TensorRT ran an engine here" if backend is None else None
    backend = backend or FLAVOURS[0]

    def missing(precision: str) -> str | None:
        return none or (None if precision in found else f"no bundle here has a {precision} graph: name one, --bundle")

    def graph(precision: str) -> list[str]:
        network = found.get(precision, best)
        chosen = ["--modality", network.modality, "--precision", precision, "--backend", backend]
        return [str(network.bundle), *chosen]

    def call(command: str, precision: str) -> list[str]:
        return [sys.executable, "-m", "espmedsam_edge", command, *graph(precision)]

    def bench(precision: str, limit: float, *options: str) -> Step:
        written = ["--json", str(out / f"bench-{precision}.json"), "--markdown", str(out / f"bench-{precision}.md")]
        command = [*call("bench", precision), *written, *options]
        return Step("bench", f"bench {precision}", command, limit, missing(precision))

    # Engines first: those that the tests and the benches load are then in the cache, and cost none of their time.
    steps = [
        Step("builds", f"build {precision}", call("build", precision), limit, missing(precision))
        for precision, limit in (("fp16", 55), ("fp32", 40), ("int8", 30))
    ]
    steps += checks(bundles[0])
    reason = none
    if reason is None and sha256_file(checkpoint) != best.checkpoint_sha256:
        reason = f"{best.bundle.name} was not exported from {checkpoint.name}: name its weights, --checkpoint"
    written = ["--json", str(out / "compare.json"), "--markdown", str(out / "compare.md")]
    rivals = ["--compare", "torch-eager,torch-compile,onnxruntime-cuda", "--checkpoint", str(checkpoint)]
    command = [*call("bench", best.precision), "--no-roofline", *rivals, *written]
    kernels = [sys.executable, "benchmarks/kernels.py", "--json", str(out / "kernels.json")]
    video = [sys.executable, "benchmarks/video_overlap.py", *graph(best.precision), "--rounds", "1"]
    return [
        *steps,
        bench("fp16", 25),
        Step("compare", f"{best.precision} against PyTorch and ONNX Runtime", command, 60, reason),
        Step("kernels", "kernels against the copy rate", kernels, 20),
        Step("video", "video to video", [*video, "--json", str(out / "video.json")], 20, none),
        bench("fp32", 13, "--no-roofline"),
        bench("int8", 12, "--no-roofline"),
    ]


def checks(bundle: Path) -> list[Step]:
    """The tests marked gpu, and compute-sanitizer on those of the kernels."""
    missing = [name for name in ("pytest", "hypothesis") if find_spec(name) is None]
    reason = f"not installed: {', '.join(missing)}" if missing else None
    # The caches of pytest and hypothesis belong to whoever develops, not to this check.
    tests = [sys.executable, "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider", "-rs"]
    own = {"ESPMEDSAM_BUNDLE": str(bundle)}
    steps = [Step("tests", "tests on the GPU", [*tests, "tests/gpu"], 100, reason, own)]
    if shutil.which("compute-sanitizer") is None:
        reason = "compute-sanitizer is not on the PATH; the CUDA toolkit has it"
    # Each tool slows kernels down by up to a hundred times: fewer random cases, and no camera-sized ones.
    few = {"ESPMEDSAM_KERNEL_EXAMPLES": os.environ.get("ESPMEDSAM_KERNEL_EXAMPLES", "12")}
    for tool in SANITIZERS:
        command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", "--print-limit", "20", *tests]
        command += ["-x", "-k", "not camera", "tests/gpu/test_gpu_kernels.py"]
        steps.append(Step("sanitizer", f"compute-sanitizer {tool}", command, 25, reason, few))
    return steps


def run(step: Step, limit: float, out: Path) -> Outcome:
    """Run a step for at most so many seconds, its output to the terminal and to a file of its name."""
    if step.reason:
        return Outcome(step.name, "LEFT OUT", 0.0, step.reason)
    if limit < 5:
        return Outcome(step.name, "LEFT OUT", 0.0, "no time was left")
    print(f"== {step.name}", flush=True)
    begin = time.monotonic()
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
    """Run the steps on small engines, then those for the backend that they found.

    A step may take its own limit, and what is left over of those before it once the limits of those after it are kept.
    Where there is less time than that, the last ones go without.
    """
    begin, outcomes = clock(), []

    def each(steps: Sequence[Step], later: Sequence[Step]) -> None:
        for number, step in enumerate(steps, 1):
            kept = sum(other.limit for other in (*steps[number:], *later) if other.reason is None)
            left = budget - (clock() - begin)
            outcome = run(step, min(left, max(step.limit, left - kept)), out)
            outcomes.append(compared(outcome, out) if step.group == "compare" else outcome)

    each(first, then(FLAVOURS[0]))
    each(then(working_backend(out)), ())
    return outcomes


def working_backend(out: Path) -> str | None:
    """The better of the backends whose engine ran and agreed with ONNX Runtime."""
    for flavour in FLAVOURS:
        path = out / f"engine-{flavour}.json"
        if path.is_file() and json.loads(path.read_text())["works"]:
            return flavour
    return None


class _Kept(logging.Handler):
    """Keeps what the package tells."""

    def __init__(self, lines: list[str]) -> None:
        super().__init__()
        self._lines = lines

    def emit(self, record: logging.LogRecord) -> None:
        self._lines.append(record.getMessage())


def check_engine(flavour: str, out: Path) -> int:
    """Build a small engine of the shipped weights, run it and compare its mask with ONNX Runtime's; writes JSON."""
    from espmedsam_edge.errors import UserError
    from espmedsam_edge.phantoms import phantom_clip
    from espmedsam_edge.runtime.backends.backend import unavailable
    from espmedsam_edge.runtime.cuda.gpu import find_gpu
    from espmedsam_edge.runtime.segmenter import Segmenter
    from espmedsam_edge.shipped.bundles import shipped_bundle

    said: list[str] = []
    logger = logging.getLogger("espmedsam_edge")
    logger.setLevel(logging.INFO)
    logger.addHandler(_Kept(said))
    found: dict[str, Any] = {"flavour": flavour, "gpu": str(find_gpu()), "works": False, "error": None, "said": said}
    out.mkdir(parents=True, exist_ok=True)
    reason = unavailable(flavour)
    if reason is not None:
        print(reason)
        return _MISSING
    try:
        ((frame, _),) = phantom_clip(SMALL, 0, 1, (480, 640))
        bundle = shipped_bundle(SMALL)
        with Segmenter.load(bundle, SMALL, "fp32", flavour) as segmenter:
            found["device"] = segmenter.choice.backend.device
            mask = segmenter.segment(frame).mask
            found["stages_ms"] = {name: 1000 * value for name, value in segmenter.stage_seconds([frame]).items()}
        with Segmenter.load(bundle, SMALL, "fp32", "onnxruntime-cpu") as reference:
            found["equal_pixels"] = float((mask == reference.segment(frame).mask).mean())
        found["works"] = found["equal_pixels"] >= EQUAL_PIXELS
    except UserError as error:
        found["error"] = str(error)
    (out / f"engine-{flavour}.json").write_text(json.dumps(found, indent=2) + "\n")
    print(found["error"] or f"{found['device']}: {found['equal_pixels']:.4%} of mask pixels equal ONNX Runtime's")
    return 0 if found["works"] else 1


def spare(outcome: Outcome, out: Path) -> bool:
    """Whether a step was left out for lack of the one TensorRT where the other works."""
    return outcome.verdict == "LEFT OUT" and outcome.name.endswith("builds and runs") and bool(working_backend(out))


def clear(out: Path, groups: Sequence[str]) -> None:
    """Remove the results of an earlier run; engines that worked then are still known if they are not tried again."""
    names = ["summary", *MEASUREMENTS]
    if "engines" in groups:
        names += [f"engine-{flavour}" for flavour in FLAVOURS]
    for name in names:
        for ending in (".json", ".md"):
            (out / f"{name}{ending}").unlink(missing_ok=True)


def judged(outcomes: Sequence[Outcome], out: Path) -> list[Target]:
    """The targets, by what the steps left in the results folder."""
    tools = [f"compute-sanitizer {tool}" for tool in SANITIZERS]
    return targets(out, [Sanitized(each.verdict, each.note) for each in outcomes if each.name in tools])


def main() -> int:
    """Run the check."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--bundle", type=Path, help="to measure, before what came with the program: FP16, INT8")
    parser.add_argument("--checkpoint", type=Path, help="the weights it was exported from; default: the shipped ones")
    parser.add_argument("--out", type=Path, default=Path("gpu-check"), help="where results go")
    parser.add_argument("--only", action="append", choices=GROUPS, help="may be given several times")
    parser.add_argument("--engine", choices=FLAVOURS, help="only build and run one engine")
    parser.add_argument("--spent", type=float, default=0.0, help="seconds that were spent before, of those there are")
    parser.add_argument("--dry-run", action="store_true", help="say what would be run")
    arguments = parser.parse_args()
    out: Path = arguments.out.resolve()
    if arguments.engine:
        return check_engine(arguments.engine, out)
    from espmedsam_edge.shipped.bundles import CHECKPOINT, WEIGHTS, shipped_bundle

    if arguments.bundle is not None and not (arguments.bundle / "manifest.json").is_file():
        parser.error(f"{arguments.bundle} is no bundle")
    if arguments.checkpoint is not None and not arguments.checkpoint.is_file():
        parser.error(f"there is no {arguments.checkpoint}")
    carried = [] if arguments.bundle is None else [arguments.bundle.resolve()]
    bundles = [*carried, shipped_bundle(MEASURED).path]
    checkpoint: Path = (arguments.checkpoint or WEIGHTS / CHECKPOINT).resolve()
    groups = arguments.only or GROUPS
    first = engines(out) if "engines" in groups else []

    def then(backend: str | None) -> list[Step]:
        return [step for step in plan(bundles, checkpoint, out, backend) if step.group in groups]

    if arguments.dry_run:
        for step in [*first, *then(working_backend(out) or FLAVOURS[0])]:
            print(f"{step.name} (at least {step.limit:.0f} s): {step.reason or ' '.join(step.command)}")
        return 0

    from espmedsam_edge.machine.environment import collect_environment

    out.mkdir(parents=True, exist_ok=True)
    clear(out, groups)
    environment = collect_environment()
    outcomes = run_all(first, then, out, BUDGET - arguments.spent)
    failed = any(outcome.verdict != "passed" and not spare(outcome, out) for outcome in outcomes)
    found = judged(outcomes, out)
    result = {
        "schema": 2,
        "kind": "gpu-check",
        "environment": environment,
        "bundles": [bundle.name for bundle in bundles],
        "backend": working_backend(out),
        "steps": [asdict(outcome) for outcome in outcomes],
        "targets": [target.as_json() for target in found],
    }
    (out / "summary.json").write_text(json.dumps(result, indent=2) + "\n")
    (out / "summary.md").write_text(markdown(result, found))
    print("== summary")
    print(table([(each.verdict, each.name, f"{each.seconds:6.1f} s", each.note) for each in outcomes]))
    print("== targets")
    print(table([target.cells() for target in found]))
    print(f"results: {out}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
