"""The steps of gpu_check.sh, one after the other within a time limit, with a summary and JSON results.

    python tools/gpu_check.py [--bundle B.bundle] [--checkpoint W.safetensors] [--out DIR] [--only STEP] [--dry-run]

Measured are the precisions of B.bundle, and of the weights that came with the program those that it lacks, by the
best engine that works here, and by the others once. What nobody times runs at once: the engines on a small network and
what Inductor compiles, then the tests. The summary says of each target whether it was met; it is written anew after
each step, so that what was found stays found.

A step that needs what is not there is left out with the reason, and the rest is done. Ends with 0 if every step passed
(an engine may be missing as long as another works), else with 1.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Literal

from gpu_check_plan import ENGINES, ROOT, SANITIZERS, Step, compilations, engines, plan
from gpu_check_targets import Sanitized, Target, markdown, table, targets

MEASURED = "fundus"
"""What is measured of the weights that came with the program, 1024 x 1024."""

BUDGET = 250.0
"""Seconds for all steps together and what was before them."""
GROUPS = ("engines", "builds", "tests", "sanitizer", "bench", "compare", "kernels", "video", "streams", "peers")
MEASUREMENTS = ("bench-*", "compare-*", "kernels", "video", "streams", "peers")
"""Files of results, without their ending."""

MISSING = 3  # how a child says that what it needs is not installed
Verdict = Literal["passed", "FAILED", "LEFT OUT"]


@dataclass(frozen=True)
class Outcome:
    """What came of a step; ``note`` is a reason, or the last line it said."""

    name: str
    verdict: Verdict
    seconds: float
    note: str = ""


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
    """Run the first steps, then those for the engines that work; ``keep`` gets what came of all, each time.

    A step may take its own limit, and what is left over of those before it once the limits of those after it are kept.
    Where there is less time than that, the last ones go without.
    """
    begin = clock()
    outcomes: dict[int, Outcome] = {}  # by the place in the order of all steps
    lock = threading.Lock()

    def do(place: int, step: Step, limit: float) -> None:
        outcome = run(step, limit, out)
        with lock:
            outcomes[place] = compared(step, outcome) if step.group == "compare" else outcome
            keep([outcomes[number] for number in sorted(outcomes)])

    def each(all_turns: Sequence[Sequence[Step]], later: Sequence[Sequence[Step]]) -> None:
        for number, turn in enumerate(all_turns, 1):
            kept = sum(seconds_of(other) for other in (*all_turns[number:], *later))
            left, place = budget - (clock() - begin), len(outcomes)
            with ThreadPoolExecutor(len(turn)) as pool:
                limits = [min(left, max(step.limit, left - kept)) for step in turn]
                list(pool.map(do, range(place, place + len(turn)), turn, limits))  # a bug comes out

    each(turns(first), turns(then(list(ENGINES[:1]))))
    each(turns(then(working_engines(out))), ())
    return [outcomes[number] for number in sorted(outcomes)]


def turns(steps: Sequence[Step]) -> list[list[Step]]:
    """Steps that run at once, in order of what runs after each other."""
    ranked = groupby(enumerate(steps), key=lambda item: -1 if item[1].together else item[0])
    return [[step for _, step in group] for _, group in ranked]


def seconds_of(turn: Sequence[Step]) -> float:
    """What is kept for a turn."""
    return max((step.limit for step in turn if step.reason is None), default=0.0)


def working_engines(out: Path) -> list[str]:
    """The engines that ran and agreed with ONNX Runtime on the CPU, the best first."""

    def works(name: str) -> bool:
        path = out / f"engine-{name}.json"
        return path.is_file() and bool(json.loads(path.read_text())["works"])

    return [name for name in ENGINES if works(name)]


def spare(outcome: Outcome, out: Path) -> bool:
    """Whether a step was left out, or failed, for lack of one engine where another works."""
    tried = outcome.name.endswith("builds and runs")
    missing = outcome.verdict == "LEFT OUT" and "inductor" in outcome.name.lower()
    return outcome.verdict != "passed" and (tried or missing) and bool(working_engines(out))


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
    from espmedsam_edge.runtime.backends.backend import unavailable

    lacking = None if arguments.dry_run else unavailable("inductor:cuda")
    first = [step for step in [*engines(out), *compilations(bundles, lacking)] if step.group in groups]

    def then(working: Sequence[str]) -> list[Step]:
        return [step for step in plan(bundles, checkpoint, out, working) if step.group in groups]

    if arguments.dry_run:
        for step in [*first, *then(working_engines(out) or list(ENGINES[:1]))]:
            beside = ", beside others" if step.together else ""
            print(f"{step.name} (at least {step.limit:.0f} s{beside}): {step.reason or ' '.join(step.command)}")
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
