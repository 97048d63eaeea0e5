"""Measure the weights that ship with the package, in every precision, and write docs/accuracy.md.

    python tools/accuracy.py measure --data DATA --out runs/accuracy --name accuracy-MACHINE
    python tools/accuracy.py page --name accuracy-MACHINE

``measure`` makes a bundle a modality from the packed weights, calibrates it to FP16 and INT8 on training images (the
gate looks at validation images), scores every precision on the test images at 1024 x 1024 as in the paper, and writes
benchmarks/results/NAME.json, the weights' scores.json and, into --out only, sheets with each dataset's best, median and
worst case: the images may not be passed on, so they are never committed. Half an hour on two cores; bundles that are
there already are not made again. ``page`` writes the table in docs/accuracy.md and its plot from the result.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from espmedsam_edge.bundle import MANIFEST, PRECISIONS, Bundle, Precision
from espmedsam_edge.calibration.calibrator import calibrate
from espmedsam_edge.calibration.images import find_images
from espmedsam_edge.calibration.request import CalibrationRequest
from espmedsam_edge.errors import UserError
from espmedsam_edge.evaluation.candidates import BundleCandidate
from espmedsam_edge.evaluation.evaluate import Evaluation, evaluate, plan_tasks
from espmedsam_edge.evaluation.paper import paper_score
from espmedsam_edge.evaluation.report import summary, write_csv, write_sheets
from espmedsam_edge.files import atomic_write, sha256_file
from espmedsam_edge.imaging.dataset import DatasetFolder
from espmedsam_edge.machine.environment import collect_environment
from espmedsam_edge.modalities import PAPER_MODALITIES
from espmedsam_edge.shipped.bundles import CHECKPOINT, METADATA_KEY, SCORES, WEIGHTS, make_bundle
from espmedsam_edge.shipped.packed import read_packed

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "accuracy.md"
PLOT = ROOT / "docs" / "images" / "accuracy.png"
# modality -> the dataset that decides, and the Dice (per cent) from which the weights count as usable
REQUIRED = {
    "dermoscopy": ("ph2", 82.0),
    "xray": ("covid_cxr_lungs", 92.0),
    "fundus": ("drive", 65.0),
    "colonoscopy": ("cvc_clinicdb", 65.0),
    "ultrasound": ("busi", 60.0),
    "microscopy": ("dsb2018", 85.0),
}
KEEP = 10_000  # all cases of a dataset, to pick the best and the median from


class _Lines:
    """How a calibration gets on, on the terminal."""

    def phase(self, title: str, total: int | None) -> None:
        print(f"    {title}", flush=True)

    def step(self) -> None:
        """Steps are not shown."""


def bundle_of(
    modality: str, out: Path, data: Path, precisions: Sequence[Precision], images: int
) -> tuple[Bundle, dict[str, Any]]:
    """The modality's bundle with the graphs there can be, and what the gate said of each lower precision."""
    path = out / f"{modality}.bundle"
    if not (path / MANIFEST).is_file():
        make_bundle([modality], path)
    gates: dict[str, Any] = {}
    found = None
    for precision in precisions:
        graphs = {graph.precision for graph in Bundle.open(path).manifest.graphs}
        if precision == "fp32" or precision in graphs:
            continue
        print(f"  {modality}: {precision}", flush=True)
        found = found or find_images(
            [str(data / modality / REQUIRED[modality][0])], count=images, held_out=16, masks=None
        )
        try:
            calibrate(path, CalibrationRequest(modality, precision, pictures=False), found, _Lines())
        except UserError as error:
            gates[precision] = str(error)
            print(f"    {error}", flush=True)
    return Bundle.open(path), gates


def cases(evaluation: Evaluation) -> None:
    """Keep of each dataset's cases, sorted by Dice, the best, the median and the worst, in that order."""
    for key, kept in evaluation.worst.items():
        evaluation.worst[key] = [kept[-1], kept[len(kept) // 2], kept[0]]


def measure(data: Path, out: Path, name: str, precisions: Sequence[Precision], images: int) -> None:
    """Score everything and write the results."""
    environment = collect_environment()
    scores: dict[str, Any] = {}
    gates: dict[str, Any] = {}
    extremes: dict[str, Any] = {}
    rows: list[dict[str, Any]] = []
    for modality in PAPER_MODALITIES:
        bundle, failed = bundle_of(modality, out, data, precisions, images)
        gates |= {f"{modality}/{precision}": line for precision, line in failed.items()}
        gates |= {key: value for key, value in bundle.manifest.accuracy.items() if not key.endswith("/fp32")}
        folders = [path for path in sorted((data / modality).iterdir()) if DatasetFolder.open(path).mask_files]
        for graph in bundle.manifest.graphs:
            candidate = BundleCandidate(bundle, graph.precision)
            tasks = plan_tasks(candidate, folders, modality, "test")
            evaluation = evaluate(candidate, tasks, split="test", worst=KEEP)
            for dataset, entry in summary(evaluation)[modality].items():
                entry = {**entry, "input": graph.image_size}
                scores.setdefault(modality, {}).setdefault(dataset, {})[graph.precision] = entry
                print(f"  {modality} {dataset} {graph.precision}: Dice {entry['dice']:.2f}", flush=True)
            if graph.precision == "fp32":
                rows += [
                    {"modality": r.modality, "dataset": r.dataset, "dice": r.scores.dice} for r in evaluation.results
                ]
                cases(evaluation)
                for (_, dataset), chosen in evaluation.worst.items():
                    extremes[f"{modality}/{dataset}"] = [
                        {"id": case.result.id, "dice": round(100 * case.result.scores.dice, 2)} for case in chosen
                    ]
                write_sheets(out / "sheets", evaluation)
                write_csv(out / f"{modality}.csv", evaluation)
    _, metadata = read_packed(WEIGHTS / CHECKPOINT)
    info = json.loads(metadata[METADATA_KEY])
    result = {
        "schema": 1,
        "kind": "accuracy",
        "environment": environment,
        "weights_sha256": sha256_file(WEIGHTS / CHECKPOINT),
        "provenance": info["provenance"],
        "size": 1024,
        "split": "test",
        "scores": scores,
        "gate": gates,
        "best_median_worst": extremes,
        "images_dice": rows,
    }
    atomic_write(RESULTS / f"{name}.json", json.dumps(result, indent=1, default=str) + "\n")
    shipped = {}
    for modality, (dataset, required) in REQUIRED.items():
        entry = scores[modality][dataset]["fp32"]
        shipped[modality] = {
            "dice": round(entry["dice"], 2),
            "images": entry["images"],
            "dataset": dataset,
            "required": required,
        }
    atomic_write(WEIGHTS / SCORES, json.dumps(shipped, indent=2) + "\n")


def page(name: str) -> None:
    """Write docs/accuracy.md and its plot from a result."""
    result = json.loads((RESULTS / f"{name}.json").read_text())
    text = PAGE.read_text() if PAGE.is_file() else "# Accuracy\n"
    begin, end = "<!-- table: tools/accuracy.py -->", "<!-- end of table -->"
    head, _, rest = text.partition(begin)
    tail = rest.partition(end)[2]
    atomic_write(PAGE, f"{head.rstrip()}\n\n{begin}\n{table(result, name)}\n{end}{tail or chr(10)}")
    plot(result)


def table(result: dict[str, Any], name: str) -> str:
    """The scores as Markdown."""
    lines = [
        f"From `benchmarks/results/{name}.json`: means over the test images at 1024 x 1024, Dice in per cent, HD and",
        "HD95 in pixels of 1024. The last columns are the paper's ESP-MedSAM-S on its own data.",
        "",
        "| modality | test set | images | input | precision | Dice | HD | HD95 | | paper: Dice | HD | on |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for modality, datasets in result["scores"].items():
        main, required = REQUIRED[modality]
        for dataset, entries in sorted(datasets.items(), key=lambda item: item[0] != main):
            for precision in PRECISIONS:
                if precision not in entries:
                    reason = result["gate"].get(f"{modality}/{precision}")
                    if reason and dataset == main:
                        lines.append(f"| {modality} | {dataset} | | | {precision} | not made: {reason} | | | | | | |")
                    continue
                entry = entries[precision]
                status = paper = ""
                if dataset == main and precision == "fp32":
                    status = "usable" if entry["dice"] >= required else f"experimental (below {required:g})"
                    published = paper_score(modality, dataset)
                    if published is not None:
                        paper = f"{published.dice:.2f} | {published.hd:.2f} | {published.dataset}"
                cells = [modality, dataset, entry["images"], entry["input"], precision]
                cells += [
                    f"{entry['dice']:.2f}",
                    f"{entry['hd']:.1f}",
                    f"{entry['hd95']:.1f}",
                    status,
                    paper or " | | ",
                ]
                lines.append(f"| {' | '.join(map(str, cells))} |")
    lines += [
        "",
        "Best, median and worst test image (id, Dice):",
        "",
        "| | best | median | worst |",
        "|---|---|---|---|",
    ]
    for key, chosen in result["best_median_worst"].items():
        lines.append(f"| {key} | " + " | ".join(f"{case['id']}: {case['dice']:.1f}" for case in chosen) + " |")
    return "\n".join(lines)


def plot(result: dict[str, Any]) -> None:
    """Every test image's Dice, a row a dataset."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    groups: dict[str, list[float]] = {}
    for row in result["images_dice"]:
        groups.setdefault(f"{row['modality']}\n{row['dataset']}", []).append(100 * row["dice"])
    figure, axes = pyplot.subplots(figsize=(8, 0.7 * len(groups) + 1))
    rng = np.random.default_rng(0)
    for index, values in enumerate(reversed(list(groups.values()))):
        axes.scatter(
            values, index + rng.uniform(-0.22, 0.22, len(values)), s=14, alpha=0.55, color="#1f77b4", linewidths=0
        )
        axes.plot([np.mean(values)] * 2, [index - 0.35, index + 0.35], color="#d62728", linewidth=2)
    axes.set_yticks(range(len(groups)), list(reversed(groups)), fontsize=8)
    axes.set_xlim(0, 100)
    axes.set_xlabel("Dice of each test image, per cent (red: mean)")
    axes.grid(axis="x", alpha=0.3)
    figure.tight_layout()
    PLOT.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(PLOT, dpi=110)


def main() -> None:
    """Measure, or write the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("measure")
    run.add_argument("--data", type=Path, required=True, help="folder with MODALITY/DATASET as in docs/data.md")
    run.add_argument("--out", type=Path, default=Path("runs/accuracy"))
    run.add_argument("--precision", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    run.add_argument("--images", type=int, default=64, help="images to calibrate on")
    run.add_argument("--name", required=True)
    write = commands.add_parser("page")
    write.add_argument("--name", required=True)
    arguments = parser.parse_args()
    logging.basicConfig(format="    %(message)s", stream=sys.stdout)
    logging.getLogger("espmedsam_edge").setLevel(logging.INFO)
    if arguments.command == "measure":
        measure(arguments.data, arguments.out, arguments.name, arguments.precision, arguments.images)
    page(arguments.name)


if __name__ == "__main__":
    main()
