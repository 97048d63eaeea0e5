"""Files a second of `batch` on one and on two local workers, in turn, and what Ray's scheduling of a unit takes.

    python benchmarks/batch.py BUNDLE --name batch-MACHINE [--files 500] [--rounds 3] [--size 1920x1080]

Pictures are made up. A batch is timed from the first unit that is handed out to the last that comes back, table
included: starting Ray and loading the network, which a batch does once, are told apart. Each worker has one thread. The
scheduling cost is the time of a unit that does nothing. docs/scale.md reckons with these numbers.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import cv2

from espmedsam_edge.batch.cluster import ClusterOptions, cluster
from espmedsam_edge.batch.run import BatchRequest, run_batch
from espmedsam_edge.batch.units import Unit
from espmedsam_edge.batch.worker import UnitResult, UnitWorker
from espmedsam_edge.files import atomic_write
from espmedsam_edge.machine.environment import collect_environment
from espmedsam_edge.phantoms import phantom
from espmedsam_edge.runtime.request import ModelOptions

RESULTS = Path(__file__).parent / "results"


class Idle(UnitWorker):
    """Does nothing with a unit."""

    def do(self, unit: Unit) -> UnitResult:
        """Says that it is done."""
        return UnitResult(sha256="0" * 64)


def timed(
    inputs: Path, out: Path, bundle: Path, workers: int, worker: type[UnitWorker] = UnitWorker
) -> dict[str, float]:
    """One batch: seconds from its first unit to its last, and files a second then; and seconds of the whole."""
    begin, times = time.perf_counter(), []
    model = ModelOptions(bundle, threads=1)
    request = BatchRequest([str(inputs)], out, model, ClusterOptions(workers=workers))
    report = run_batch(request, lambda done, of: times.append(time.perf_counter()), worker)
    if report.failures:
        raise SystemExit(report.failures[0])
    seconds = times[-1] - times[0]
    return {"whole_s": time.perf_counter() - begin, "s": seconds, "files_a_second": (len(times) - 1) / seconds}


def measure(bundle: Path, folder: Path, files: int, rounds: int, size: tuple[int, int]) -> dict[str, Any]:
    """Both numbers of workers in turn, so that drift meets both."""
    inputs = folder / "in"
    inputs.mkdir()
    pictures = [phantom("colonoscopy", seed=number, size=size)[0] for number in range(8)]
    for number in range(files):
        cv2.imwrite(str(inputs / f"{number:05d}.jpg"), pictures[number % len(pictures)])
    found: dict[str, list[dict[str, float]]] = {"1": [], "2": [], "idle": []}
    with cluster(ClusterOptions(workers=2), 1):
        for number in range(rounds):
            for workers in (1, 2):
                found[str(workers)].append(timed(inputs, folder / f"o{number}-{workers}", bundle, workers))
            found["idle"].append(timed(inputs, folder / f"i{number}", bundle, 1, Idle))
    rates = {name: statistics.median(run["files_a_second"] for run in runs) for name, runs in found.items()}
    return {
        "files": files,
        "size": list(size),
        "files_a_second": {name: round(rates[name], 3) for name in ("1", "2")},
        "ratio": round(rates["2"] / rates["1"], 3),
        "scheduling_ms_a_unit": round(1000 / rates["idle"], 3),
        "rounds": found,
    }


def main() -> None:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--name", required=True)
    parser.add_argument("--files", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--size", default="1920x1080", help="of the pictures, width by height")
    given = parser.parse_args()
    width, height = map(int, given.size.split("x"))
    environment = collect_environment()
    with tempfile.TemporaryDirectory() as folder:
        result = measure(given.bundle.absolute(), Path(folder), given.files, given.rounds, (height, width))
    result["load_average"] = [environment["load_average_1min"], os.getloadavg()[0]]
    atomic_write(
        RESULTS / f"{given.name}.json",
        json.dumps({"kind": "batch", "environment": environment, "result": result}, indent=1) + "\n",
    )
    print(json.dumps({name: value for name, value in result.items() if name != "rounds"}, indent=1))


if __name__ == "__main__":
    main()
