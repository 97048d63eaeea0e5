"""How long the package takes to import and the program to show its help, each in a fresh process.

    python benchmarks/startup.py [--runs 15] [--json benchmarks/results/startup.json]

Leaves with 1 when a median is over its limit or a light command loaded a heavy package.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from espmedsam_edge.files import atomic_write
from espmedsam_edge.machine.environment import collect_environment
from espmedsam_edge.runtime.latency import Latency

# what runs -> (arguments of Python, limit in seconds for the median; None: only for scale)
CASES: dict[str, tuple[list[str], float | None]] = {
    "python alone": (["-c", "pass"], None),
    "import espmedsam_edge": (["-c", "import espmedsam_edge"], 0.3),
    "espmedsam-edge --help": (["-m", "espmedsam_edge", "--help"], 0.6),
    "espmedsam-edge bench --help": (["-m", "espmedsam_edge", "bench", "--help"], None),
}
HEAVY = ("torch", "onnx", "onnxruntime", "cv2", "scipy", "matplotlib", "av", "tensorrt", "pydantic", "numpy")


def main() -> None:
    """Measure, print and, with ``--json``, keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    environment = collect_environment()
    cases: dict[str, Any] = {}
    missed = False
    for name, (command, limit) in CASES.items():
        run(command)  # once uncounted: compiles bytecode, fills the page cache
        latency = Latency.of([run(command) for _ in range(arguments.runs)])
        late = limit is not None and latency.p50 > limit
        missed |= late
        cases[name] = {"ms": latency.milliseconds(), "limit_ms": limit and 1000 * limit}
        verdict = "" if limit is None else f"limit {1000 * limit:.0f} ms: {'OVER' if late else 'kept'}"
        print(f"{name:<28} p50 {1000 * latency.p50:6.1f} ms   max {1000 * latency.maximum:6.1f} ms   {verdict}")
    loaded = heavy_packages()
    missed |= bool(loaded)
    print(f"heavy packages that importing loads: {', '.join(loaded) or 'none'}")
    if arguments.json:
        result = {"schema": 1, "kind": "startup", "environment": environment, "cases": cases, "heavy": loaded}
        atomic_write(arguments.json, json.dumps(result, indent=2) + "\n")
    sys.exit(missed)


def run(command: list[str]) -> float:
    """Seconds a fresh Python takes to start, run and end."""
    start = time.perf_counter()
    subprocess.run([sys.executable, *command], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def heavy_packages() -> list[str]:
    """Which of ``HEAVY`` a bare import of the package pulls in."""
    code = f"import sys, espmedsam_edge; print(*[name for name in {HEAVY!r} if name in sys.modules])"
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()


if __name__ == "__main__":
    main()
