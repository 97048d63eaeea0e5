"""Frames a second that espmedsam-s should reach on boards nobody here has: a prediction on paper, not a measurement.

    python benchmarks/predict.py --name predicted-espmedsam-s

Counts the exported graph of one modality at several image sizes (weights are random: the count does not depend on them)
and bounds each kernel by the board's published peak of products and of memory, whichever takes longer (a roofline,
``espmedsam_edge.bench.roofline``). A real engine reaches part of that bound: the efficiency. Unless a bench made on a
GPU gives it (``--measured bench.json``), it is assumed to lie in a range, and the prediction is a range.

FP16 is counted as every value in two bytes. INT8 is counted as ``calibrate`` quantises: products with weights outside
the decoder in INT8, their weights in one byte, all else as in FP16.

Left out: copying frames, preprocessing and postprocessing, launches, heat and power limits. Writes JSON and Markdown
into ``benchmarks/results/``. Takes some minutes, on any machine.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from espmedsam_edge.bench.graph_cost import graph_cost
from espmedsam_edge.bench.roofline import GraphCost, Kernel, Rates, bound
from espmedsam_edge.files import atomic_write
from espmedsam_edge.machine.environment import collect_environment

RESULTS = Path(__file__).parent / "results"
MODALITY = "fundus"
PRECISIONS = ("fp32", "fp16", "int8")
ASSUMED = (0.35, 0.65)
"""What part of the bound an engine is assumed to reach."""


@dataclass(frozen=True)
class Board:
    """Published peaks: dense products in TFLOP/s (INT8: TOP/s), memory in GB/s."""

    name: str
    fp32: float
    fp16: float
    int8: float
    memory: float
    source: str

    @property
    def rates(self) -> Rates:
        """As the roofline takes them."""
        return Rates({name: 1e12 * getattr(self, name) for name in PRECISIONS}, 1e9 * self.memory)


BOARDS = (
    Board(
        "Jetson Orin Nano 8 GB (Super, 25 W)", 2.1, 17, 33, 102,
        "NVIDIA, Jetson Orin Nano Super Developer Kit (2024): 67 TOPS sparse INT8 (33 dense), 17 TFLOPS FP16, "
        "102 GB/s; FP32: 1024 CUDA cores x 2 x 1.02 GHz",
    ),
    Board(
        "Jetson AGX Orin 64 GB", 5.3, 42.5, 85, 204.8,
        "NVIDIA, Jetson AGX Orin Series Technical Brief v1.2: GPU 170 TOPS sparse INT8, 5.3 TFLOPS FP32, 204.8 GB/s; "
        "dense is half of sparse, FP16 half of INT8; the DLAs are not used",
    ),
    Board(
        "GeForce RTX 4060", 15.1, 30.2, 120.9, 272,
        "NVIDIA, Ada architecture and GeForce RTX 4060 specifications: 242 TOPS sparse INT8, 15.1 TFLOPS FP32, "
        "272 GB/s; dense is half of sparse, FP16 with FP32 sums a quarter of INT8",
    ),
)  # fmt: skip


def in_precision(cost: GraphCost, precision: str) -> GraphCost:
    """An FP32 graph's cost as if it were of another precision; see the text above."""
    if precision == "fp32":
        return cost
    kernels = []
    for kernel in cost.kernels:
        quantised = (
            precision == "int8" and kernel.flop and kernel.weight_bytes and not kernel.name.startswith("decoder")
        )
        weights = kernel.weight_bytes // (4 if quantised else 2)
        moved = (kernel.bytes - kernel.weight_bytes) // 2 + weights
        kind = "" if not kernel.flop else "int8" if quantised else "fp16"
        kernels.append(Kernel(kernel.name, kind, kernel.flop, moved, weights))
    return replace(cost, kernels=kernels, weight_bytes=sum(kernel.weight_bytes for kernel in kernels))


def export_costs(preset: str, sizes: Sequence[int]) -> dict[int, GraphCost]:
    """The exported FP32 graph's cost by image size."""
    from espmedsam_edge.export.exporter import export_bundle
    from espmedsam_edge.model.checkpoint import CheckpointInfo, save_checkpoint
    from espmedsam_edge.model.config import model_config
    from espmedsam_edge.model.esp_medsam import EspMedSam

    model = EspMedSam(model_config(preset), [MODALITY]).eval()
    costs = {}
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / "random.safetensors"
        save_checkpoint(weights, model, CheckpointInfo(config=model.config, origin="random"))
        for size in sizes:
            bundle, _ = export_bundle(weights, Path(folder) / f"{size}.bundle", image_size=size)
            costs[size] = graph_cost(bundle.read_graph(bundle.manifest.graphs[0]))
    return costs


def efficiency_of(benches: Sequence[Path]) -> dict[str, tuple[float, str]]:
    """By precision: the part of the bound that a bench on a GPU reached, and on which one."""
    found = {}
    for path in benches:
        data = json.loads(path.read_text())
        contender, gpus = data["contenders"][0], data["environment"]["gpus"]
        if data["roofline"] is None or contender["device_times"] is None or not gpus:
            raise SystemExit(f"{path} was not measured on a GPU with its roofline.")
        found[contender["precision"]] = (1 / data["roofline"]["run_to_bound"], gpus[0]["name"])
    return found


def predict(costs: dict[int, GraphCost], measured: dict[str, tuple[float, str]]) -> list[dict[str, Any]]:
    """One row a board, precision and size: the bound in milliseconds, and frames a second at each efficiency."""
    rows = []
    for board in BOARDS:
        for precision in PRECISIONS:
            efficiency = (measured[precision][0],) * 2 if precision in measured else ASSUMED
            for size, fp32 in costs.items():
                limit = bound(in_precision(fp32, precision), board.rates)
                rows.append(
                    {
                        "board": board.name,
                        "precision": precision,
                        "image_size": size,
                        "bound_ms": round(1000 * limit.kernels, 3),
                        "products_alone_ms": round(1000 * limit.products, 3),
                        "bytes_alone_ms": round(1000 * limit.copies, 3),
                        "efficiency": [round(value, 3) for value in efficiency],
                        "predicted_fps": [round(value / limit.kernels, 1) for value in efficiency],
                    }
                )
    return rows


def as_markdown(result: dict[str, Any]) -> str:
    """The table that ``docs/performance.md`` shows."""
    sizes = [int(size) for size in result["graphs"]]
    lines = [
        "# Predicted, not measured",
        "",
        result["method"],
        "",
        "| frames a second | precision | " + " | ".join(f"{size} x {size}" for size in sizes) + " |",
        "| :-- | :-- |" + " --: |" * len(sizes),
    ]
    for board in BOARDS:
        for precision in PRECISIONS:
            cells = [
                "{:.0f} to {:.0f}".format(*row["predicted_fps"])
                for row in result["rows"]
                if (row["board"], row["precision"]) == (board.name, precision)
            ]
            lines.append(f"| {board.name} | {precision} | {' | '.join(cells)} |")
    lines += ["", "| the graph, a frame | " + " | ".join(f"{size} x {size}" for size in sizes) + " |"]
    lines.append("| :-- |" + " --: |" * len(sizes))
    graphs = list(result["graphs"].values())
    lines.append("| GFLOP of products | " + " | ".join(f"{graph['gflop']:.1f}" for graph in graphs) + " |")
    for precision in PRECISIONS:
        cells = " | ".join(f"{graph['gb'][precision]:.2f}" for graph in graphs)
        lines.append(f"| GB moved, {precision} | {cells} |")
    lines += ["", "Peaks:", "", *(f"- {board.name}: {board.source}." for board in BOARDS)]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Count, predict and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--name", required=True, help="of the files in benchmarks/results/, without their ending")
    parser.add_argument("--preset", default="espmedsam-s")
    parser.add_argument("--sizes", type=int, nargs="+", default=[256, 512, 1024])
    parser.add_argument("--measured", type=Path, nargs="*", default=[], help="JSON of benches made on a GPU")
    arguments = parser.parse_args()
    environment = collect_environment()
    measured = efficiency_of(arguments.measured)
    costs = export_costs(arguments.preset, arguments.sizes)
    ranges = ", ".join(f"{value:.2f} ({name}) in {kind}" for kind, (value, name) in measured.items())
    method = (
        f"Predictions for {arguments.preset}, one modality, the network alone: the roofline of published peaks "
        + (f"at the measured efficiency {ranges}; elsewhere " if measured else "")
        + f"at an assumed efficiency of {ASSUMED[0]:g} to {ASSUMED[1]:g}. No such board was at hand."
    )
    result = {
        "schema": 1,
        "kind": "prediction",
        "measured": False,
        "method": method,
        "environment": environment,
        "preset": arguments.preset,
        "boards": [asdict(board) for board in BOARDS],
        "graphs": {
            str(size): {
                "gflop": sum(cost.flop.values()) / 1e9,
                "weights_gb": cost.weight_bytes / 1e9,
                "kernels": len(cost.kernels),
                "gb": {precision: in_precision(cost, precision).bytes / 1e9 for precision in PRECISIONS},
            }
            for size, cost in costs.items()
        },
        "rows": predict(costs, measured),
    }
    atomic_write(RESULTS / f"{arguments.name}.json", json.dumps(result, indent=2) + "\n")
    atomic_write(RESULTS / f"{arguments.name}.md", as_markdown(result))
    print(as_markdown(result))


if __name__ == "__main__":
    main()
