"""The steps of gpu_check.sh, one after the other within a time limit, with a summary and JSON results.

    python tools/gpu_check.py [--bundle B.bundle] [--checkpoint W.safetensors] [--out DIR] [--only STEP] [--dry-run]

Measured are the precisions of B.bundle, and of the weights that came with the program those that it lacks, by the
fastest engine that works here, and by the others once. The summary says of each target whether it was met; it is
written anew after each step, so that what was found stays found.

A step that needs what is not there is left out with the reason, and the rest is done. Ends with 0 if every step passed
(an engine may be missing as long as another works), else with 1.
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
from typing import Literal

from gpu_check_targets import Sanitized, Target, markdown, table, targets

from espmedsam_edge.files import sha256_file

ROOT = Path(__file__).resolve().parents[1]
MEASURED = "fundus"
"""What is measured of the weights that came with the program, 1024 x 1024."""

BUDGET = 250.0
"""Seconds for all steps together and what was before them."""
ENGINES = {"tensorrt": 15.0, "tensorrt-rtx": 8.0, "inductor": 30.0, "onnxruntime-cuda": 8.0}
"""What runs a network on a GPU, best first, and the seconds kept to try it; one that is missing takes none."""
SANITIZERS = ("memcheck", "racecheck", "initcheck")
GROUPS = ("engines", "builds", "tests", "sanitizer", "bench", "compare", "kernels", "video", "streams", "peers")
MEASUREMENTS = ("bench-*", "compare-*", "kernels", "video", "streams", "peers")
"""Files of results, without their ending."""

MISSING = 3  # how a child says that what it needs is not installed
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
    """Whether each engine can be built and run here at all, on a small network."""
    own = [sys.executable, str(Path(__file__).with_name("gpu_check_engine.py"))]
    return [
        Step("engines", f"{name} builds and runs", [*own, name, "--out", str(out)], limit)
        for name, limit in ENGINES.items()
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


def plan(bundles: Sequence[Path], checkpoint: Path, out: Path, working: Sequence[str]) -> list[Step]:
    """All steps but those on small engines, in the order in which they run.

    Args:
        bundles: whose graphs are measured; of the first one engines are compared with ONNX Runtime.
        checkpoint: the weights they were exported from, for PyTorch.
        out: where results go.
        working: the engines that run here, the fastest first; without any what needs one is left out.
    """
    found = networks(bundles)
    best = next(iter(found.values()))
    none = None if working else "no engine ran here"
    first, *others = working or list(ENGINES)[:1]
    if "fp16" not in found and "inductor" in (first, *others):  # which computes the FP32 graph in FP16 by itself
        others = [*others, "inductor" if first == "inductor" else "inductor:fp16"]
        first = "inductor:fp16" if first == "inductor" else first
    others += ["onnxruntime-cuda:nhwc"] if "onnxruntime-cuda" in working else []

    def missing(precision: str) -> str | None:
        return none or (None if precision in found else f"no bundle here has a {precision} graph: name one, --bundle")

    def graph(precision: str, backend: str = first) -> list[str]:
        network = found.get(precision, best)
        chosen = ["--modality", network.modality, "--precision", network.precision, "--backend", backend]
        return [str(network.bundle), *chosen]

    def call(command: str, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "espmedsam_edge", command, *arguments]

    def bench(precision: str, limit: float, backend: str = first, *options: str) -> Step:
        name = precision if backend == first else f"{precision} {backend}"
        file = f"bench-{name.replace(' ', '-').replace(':', '-')}"
        written = ["--json", str(out / f"{file}.json"), "--markdown", str(out / f"{file}.md")]
        command = call("bench", *graph(precision, backend), *written, *options)
        return Step("bench", f"bench {name}", command, limit, missing(precision))

    def script(name: str, file: str, limit: float, *options: str, reason: str | None = None, title: str = "") -> Step:
        command = [sys.executable, f"benchmarks/{file}.py", *options]
        return Step(name, title or name, command, limit, reason)

    # Engines first: those that the tests and the benches load are then in the cache, and cost none of their time.
    builds = first.partition(":")[0] != "onnxruntime-cuda"  # which builds nothing
    steps = [
        Step("builds", f"build {precision}", call("build", *graph(precision)), limit, missing(precision))
        for precision, limit in (("fp16", 26.0), ("fp32", 8.0))
        if builds
    ]
    steps += checks(bundles[0])
    reason = none
    if reason is None and sha256_file(checkpoint) != best.checkpoint_sha256:
        reason = f"{best.bundle.name} was not exported from {checkpoint.name}: name its weights, --checkpoint"

    def against(rival: str, limit: float) -> Step:
        written = ["--json", str(out / f"compare-{rival}.json"), "--markdown", str(out / f"compare-{rival}.md")]
        rivals = ["--no-roofline", "--compare", rival, "--checkpoint", str(checkpoint)]
        command = call("bench", *graph(best.precision), *rivals, *written)
        return Step("compare", f"{best.precision} against {rival}", command, limit, reason)

    lacking = "benchmarks/peers.py needs the extra peers: pip install -e '.[peers]'"
    peers = ["measure", "--name", "peers", "--device", "cuda", "--rounds", "5", "--out", str(out), "--docs", str(out)]
    of_video = [*graph(best.precision), "--tile", "off"]
    return [
        *steps,
        bench("fp16", 12),
        *(bench(best.precision, 6, other, "--no-roofline") for other in others),
        script("kernels", "kernels", 7, "--json", str(out / "kernels.json"), title="kernels against the copy rate"),
        script("video", "video_overlap", 9, *of_video, "--rounds", "1", "--json", str(out / "video.json"), reason=none,
               title="video to video"),
        script("streams", "streams", 8, *graph(best.precision), "--seconds", "3", "--json", str(out / "streams.json"),
               reason=none, title="several streams"),
        against("torch-eager", 8),
        bench("fp32", 6, first, "--no-roofline"),
        bench("int8", 6, first, "--no-roofline"),
        script("peers", "peers", 10, *peers, "--figures", "encoder", "encoder float16",
               reason=None if find_spec("mobile_sam") else lacking, title="peers' encoders"),
        against("torch-compile", 8),  # which compiles for as long as it is let
    ]  # fmt: skip


def checks(bundle: Path) -> list[Step]:
    """The tests marked gpu, and compute-sanitizer on those of the kernels."""
    missing = [name for name in ("pytest", "hypothesis") if find_spec(name) is None]
    reason = f"not installed: {', '.join(missing)}" if missing else None
    # The caches of pytest and hypothesis belong to whoever develops, not to this check.
    tests = [sys.executable, "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider", "-rs"]
    own = {"ESPMEDSAM_BUNDLE": str(bundle)}
    steps = [Step("tests", "tests on the GPU", [*tests, "tests/gpu"], 30, reason, own)]
    if shutil.which("compute-sanitizer") is None:
        reason = "compute-sanitizer is not on the PATH; the CUDA toolkit has it"
    # Each tool slows kernels down by up to a hundred times: fewer random cases, and no camera-sized ones.
    few = {"ESPMEDSAM_KERNEL_EXAMPLES": os.environ.get("ESPMEDSAM_KERNEL_EXAMPLES", "6")}
    for tool in SANITIZERS:
        command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", "--print-limit", "20", *tests]
        command += ["-x", "-k", "not camera", "tests/gpu/test_gpu_kernels.py"]
        steps.append(Step("sanitizer", f"compute-sanitizer {tool}", command, 9, reason, few))
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
    if code == MISSING:
        return Outcome(step.name, "LEFT OUT", seconds, last)
    return Outcome(step.name, "passed" if code == 0 else "FAILED", seconds, last)


def compared(step: Step, outcome: Outcome) -> Outcome:
    """A comparison's outcome, or why the other could not take part."""
    path = Path(step.command[step.command.index("--json") + 1])
    left_out = json.loads(path.read_text())["left_out"] if path.is_file() else []
    if outcome.verdict != "FAILED" or not left_out:
        return outcome
    return replace(outcome, verdict="LEFT OUT", note="; ".join(left_out))


def run_all(
    first: Sequence[Step],
    then: Callable[[Sequence[str]], Sequence[Step]],
    out: Path,
    budget: float = BUDGET,
    clock: Callable[[], float] = time.monotonic,
    keep: Callable[[Sequence[Outcome]], None] = lambda outcomes: None,
) -> list[Outcome]:
    """Run the steps on small engines, then those for the engines that work; ``keep`` gets what came of all, each time.

    A step may take its own limit, and what is left over of those before it once the limits of those after it are kept.
    Where there is less time than that, the last ones go without.
    """
    begin, outcomes = clock(), []

    def each(steps: Sequence[Step], later: Sequence[Step]) -> None:
        for number, step in enumerate(steps, 1):
            kept = sum(other.limit for other in (*steps[number:], *later) if other.reason is None)
            left = budget - (clock() - begin)
            outcome = run(step, min(left, max(step.limit, left - kept)), out)
            outcomes.append(compared(step, outcome) if step.group == "compare" else outcome)
            keep(outcomes)

    each(first, then(list(ENGINES)[:1]))
    each(then(working_engines(out)), ())
    return outcomes


def working_engines(out: Path) -> list[str]:
    """The engines that ran and agreed with ONNX Runtime on the CPU, by the time of their network on the GPU."""
    found: dict[str, float] = {}
    for name in ENGINES:
        path = out / f"engine-{name}.json"
        result = json.loads(path.read_text()) if path.is_file() else {"works": False}
        if result["works"]:
            found[name] = result.get("stages_ms", {}).get("engine", float("inf"))
    return sorted(found, key=lambda name: found[name])


def spare(outcome: Outcome, out: Path) -> bool:
    """Whether a step was left out, or failed, for lack of one engine where another works."""
    return outcome.verdict != "passed" and outcome.name.endswith("builds and runs") and bool(working_engines(out))


def clear(out: Path, groups: Sequence[str]) -> None:
    """Remove the results of an earlier run; engines that worked then are still known if they are not tried again."""
    names = ["summary", *MEASUREMENTS]
    if "engines" in groups:
        names += [f"engine-{name}" for name in ENGINES]
    for name in names:
        for file in [*out.glob(f"{name}.json"), *out.glob(f"{name}.md")]:
            file.unlink()


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
    parser.add_argument("--spent", type=float, default=0.0, help="seconds that were spent before, of those there are")
    parser.add_argument("--dry-run", action="store_true", help="say what would be run")
    arguments = parser.parse_args()
    out: Path = arguments.out.resolve()
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

    def then(working: Sequence[str]) -> list[Step]:
        return [step for step in plan(bundles, checkpoint, out, working) if step.group in groups]

    if arguments.dry_run:
        for step in [*first, *then(working_engines(out) or list(ENGINES)[:1])]:
            print(f"{step.name} (at least {step.limit:.0f} s): {step.reason or ' '.join(step.command)}")
        return 0

    from espmedsam_edge.machine.environment import collect_environment

    out.mkdir(parents=True, exist_ok=True)
    clear(out, groups)
    environment = collect_environment()

    def keep(outcomes: Sequence[Outcome]) -> None:
        found = judged(outcomes, out)
        result = {
            "schema": 3,
            "kind": "gpu-check",
            "environment": environment,
            "bundles": [bundle.name for bundle in bundles],
            "engines": working_engines(out),
            "steps": [asdict(outcome) for outcome in outcomes],
            "targets": [target.as_json() for target in found],
        }
        (out / "summary.json").write_text(json.dumps(result, indent=2) + "\n")
        (out / "summary.md").write_text(markdown(result, found))

    outcomes = run_all(first, then, out, BUDGET - arguments.spent, keep=keep)
    failed = any(outcome.verdict != "passed" and not spare(outcome, out) for outcome in outcomes)
    print("== summary")
    print(table([(each.verdict, each.name, f"{each.seconds:6.1f} s", each.note) for each in outcomes]))
    print("== targets")
    print(table([target.cells() for target in judged(outcomes, out)]))
    print(f"results: {out}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
