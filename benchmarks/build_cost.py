"""What ``build`` takes: seconds, peak memory and the engine's size, of every graph in a bundle, with TensorRT-RTX.

    python benchmarks/build_cost.py --name build-cost-MACHINE BUNDLE [--target sm86,sm89,sm120]

Needs TensorRT-RTX (extra rtx) and no GPU: one that is here is not used, so that no engine is loaded or timed. Each
graph is built as ``espmedsam-edge build`` does, in a process of its own, whose peak of resident memory is given, and
into a cache that is thrown away. A graph that is refused has the reason in its row. The result is written after each
graph, as JSON into ``benchmarks/results/``.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from espmedsam_edge.bundle import Bundle, Graph
from espmedsam_edge.errors import UserError
from espmedsam_edge.files import atomic_write, sha256_file
from espmedsam_edge.machine.environment import collect_environment
from espmedsam_edge.runtime.engines.cache import USUAL_TARGETS, find_or_build
from espmedsam_edge.runtime.engines.tensorrt_api import load

RESULTS = Path(__file__).parent / "results"
FLAVOUR = "tensorrt-rtx"


def measure(bundle: Bundle, graph: Graph, targets: Sequence[str]) -> dict[str, Any]:
    """Build one graph into an empty cache: the build's own seconds, and those around it, of its process as well."""
    row: dict[str, Any] = {
        "modality": graph.modality,
        "precision": graph.precision,
        "image_size": graph.image_size,
        "batch": graph.batch,
        "graph_mb": bundle.graph_path(graph).stat().st_size / 1e6,
    }
    with tempfile.TemporaryDirectory() as cache:
        begin = time.perf_counter()
        try:
            built = find_or_build(bundle, graph, flavour=FLAVOUR, targets=targets, cache=cache).sidecar
        except UserError as error:
            return {**row, "refusal": str(error)}
        seconds = time.perf_counter() - begin
    return {
        **row,
        "seconds": built.build_seconds,
        "seconds_with_process": round(seconds, 3),
        "peak_gb": None if built.peak_memory_bytes is None else built.peak_memory_bytes / 1e9,
        "engine_mb": built.plan_bytes / 1e6,
        "macs": {dtype: round(built.arithmetic.share(dtype), 4) for dtype in built.arithmetic.macs},
    }


def main() -> None:
    """Build each graph and write the result."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--name", required=True, help="of the file in benchmarks/results/, without its ending")
    parser.add_argument("--target", default=",".join(USUAL_TARGETS), help="GPU generations, such as sm86,sm120")
    arguments = parser.parse_args()
    environment = collect_environment()
    os.environ["CUDA_VISIBLE_DEVICES"] = "-1"
    bundle, targets = Bundle.open(arguments.bundle), arguments.target.split(",")
    result: dict[str, Any] = {
        "schema": 1,
        "kind": "build-cost",
        "environment": environment,
        "bundle": {"name": bundle.path.name, "sha256": sha256_file(bundle.path / "manifest.json")},
        "preset": bundle.manifest.preset,
        "builder": load(FLAVOUR).title,
        "targets": targets,
        "rows": [],
    }
    for graph in bundle.manifest.graphs:
        result["rows"].append(measure(bundle, graph, targets))
        print(result["rows"][-1], flush=True)
        atomic_write(RESULTS / f"{arguments.name}.json", json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
