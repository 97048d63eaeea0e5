"""What ``build`` takes: seconds, peak memory and the engine's size, of every graph in a bundle.

    python benchmarks/build_cost.py --name build-cost-MACHINE BUNDLE [--target sm86,sm89,sm120]
    python benchmarks/build_cost.py --name build-cost-inductor-MACHINE BUNDLE --backend inductor

With TensorRT-RTX (extra rtx); or with torch's Inductor (extra inductor) for the processor, FP32 graphs in FP32 and,
where the processor has it, in bfloat16. A GPU that is here is not used, so that no engine is loaded or timed. Each
graph is built as ``espmedsam-edge build`` does, in a process of its own, whose peak of resident memory is given, and
into a cache that is thrown away. A graph that is refused has the reason in its row. The result is written after each
graph, as JSON into ``benchmarks/results/``.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from espmedsam_edge.bundle import Bundle, Graph
from espmedsam_edge.errors import UserError
from espmedsam_edge.files import atomic_write, sha256_file
from espmedsam_edge.machine.environment import collect_environment
from espmedsam_edge.runtime.engines.cache import USUAL_TARGETS, find_or_build
from espmedsam_edge.runtime.engines.tensorrt_api import load
from espmedsam_edge.runtime.inductor import building as inductor
from espmedsam_edge.runtime.inductor.building import Arithmetic

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


def measure_inductor(bundle: Bundle, graph: Graph, arithmetic: Arithmetic) -> dict[str, Any]:
    """Compile one graph into an empty cache: seconds by the clock, and ``cpu_seconds`` that all of it used."""
    row = {"modality": graph.modality, "image_size": graph.image_size, "batch": graph.batch, "arithmetic": arithmetic}
    with tempfile.TemporaryDirectory() as cache:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        try:
            built = inductor.find_or_build(bundle, graph, "cpu", arithmetic, cache=cache)
        except UserError as error:
            return {**row, "refusal": str(error)}
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {
        **row,
        "graph_mb": bundle.graph_path(graph).stat().st_size / 1e6,
        "seconds": float(built.facts["seconds"]),
        "cpu_seconds": round(used, 1),
        "memory": built.facts.get("memory"),
        "engine_mb": len(built.content) / 1e6,
        "agreement": built.facts["agreement"],
    }


def rows_of(bundle: Bundle, backend: str, targets: Sequence[str]) -> Iterator[dict[str, Any]]:
    """A row for each build."""
    for graph in bundle.manifest.graphs:
        if backend == FLAVOUR:
            yield measure(bundle, graph, targets)
        elif graph.precision == "fp32":
            arithmetics: tuple[Arithmetic, ...] = ("fp32", "bf16")
            for arithmetic in arithmetics:
                if inductor.why_not_here(graph, "cpu", arithmetic) is None:
                    yield measure_inductor(bundle, graph, arithmetic)


def main() -> None:
    """Build each graph and write the result."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--name", required=True, help="of the file in benchmarks/results/, without its ending")
    parser.add_argument("--backend", default=FLAVOUR, choices=[FLAVOUR, "inductor"])
    parser.add_argument("--target", default=",".join(USUAL_TARGETS), help="GPU generations, such as sm86,sm120")
    arguments = parser.parse_args()
    with_torch = arguments.backend == "inductor"
    environment = collect_environment()
    os.environ["CUDA_VISIBLE_DEVICES"] = "-1"
    bundle, targets = Bundle.open(arguments.bundle), arguments.target.split(",")
    result: dict[str, Any] = {
        "schema": 1,
        "kind": "build-cost",
        "environment": environment,
        "bundle": {"name": bundle.path.name, "sha256": sha256_file(bundle.path / "manifest.json")},
        "preset": bundle.manifest.preset,
        "builder": f"Inductor of torch {inductor.torch_version()}" if with_torch else load(FLAVOUR).title,
        "targets": [] if with_torch else targets,
        "rows": [],
    }
    for row in rows_of(bundle, arguments.backend, targets):
        result["rows"].append(row)
        print(result["rows"][-1], flush=True)
        atomic_write(RESULTS / f"{arguments.name}.json", json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
