"""Measure the weights that ship with the package, in every precision, and write docs/accuracy.md.

    python tools/accuracy.py measure --data DATA --out runs/accuracy --name accuracy-MACHINE --before accuracy-OLD
    python tools/accuracy.py page --name accuracy-MACHINE --before accuracy-OLD

    python tools/accuracy.py checks --data DATA --out runs/accuracy

``measure`` makes a bundle a modality from the packed weights, calibrates it to FP16 and INT8 on training images (the
gate looks at validation images), scores every precision on the test images at 1024 x 1024 as in the paper, and writes
benchmarks/results/NAME.json, the weights' scores.json and, into --out only, sheets with each dataset's best, median and
worst case: the images may not be passed on, so they are never committed. Half an hour on two cores. What the result
holds already of the very same weights is not measured again: a modality whose bag changed alone, or a precision more,
is added to it. ``page`` writes the tables in docs/accuracy.md and the model card and the plot from the result, with an
older result's Dice beside it. ``checks`` holds what backends compute with the weights that ship to calibrate's gate, on
the validation lists, and writes the weights' checks.json; five minutes on a processor that has the arithmetic.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from espmedsam_edge.bundle import MANIFEST, PRECISIONS, Bundle, Precision
from espmedsam_edge.calibration.calibrator import calibrate
from espmedsam_edge.calibration.check import check_backend
from espmedsam_edge.calibration.images import find_images
from espmedsam_edge.calibration.request import CalibrationRequest, CheckRequest, Target
from espmedsam_edge.errors import UserError
from espmedsam_edge.evaluation.candidates import BundleCandidate
from espmedsam_edge.evaluation.evaluate import Evaluation, evaluate, plan_tasks
from espmedsam_edge.evaluation.paper import paper_score
from espmedsam_edge.evaluation.report import summary, write_csv, write_sheets
from espmedsam_edge.files import atomic_write, sha256_file
from espmedsam_edge.imaging.dataset import DatasetFolder
from espmedsam_edge.machine.environment import collect_environment
from espmedsam_edge.modalities import PAPER_MODALITIES
from espmedsam_edge.runtime.auto.gates import accuracy_key, passed
from espmedsam_edge.shipped.bundles import CHECKPOINT, CHECKS, METADATA_KEY, SCORES, WEIGHTS, make_bundle
from espmedsam_edge.shipped.packed import read_packed

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "accuracy.md"
CARD = WEIGHTS / "README.md"
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
_OWNED = ("controller.", "decoder.queries.", "decoder.hypernetworks.")
KEEP = 10_000  # all cases of a dataset, to pick the best and the median from


class _Lines:
    """How a calibration gets on, on the terminal."""

    def phase(self, title: str, total: int | None) -> None:
        print(f"    {title}", flush=True)

    def step(self) -> None:
        """Steps are not shown."""


def bundle_of(
    modality: str, out: Path, data: Path, precisions: Sequence[Precision], images: int, target: Target = "gpu"
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
            request = CalibrationRequest(modality, precision, pictures=False, target=target)
            calibrate(path, request, found, _Lines())
        except UserError as error:
            gates[precision] = str(error)
            print(f"    {error}", flush=True)
    return Bundle.open(path), gates


def cases(evaluation: Evaluation) -> None:
    """Keep of each dataset's cases, sorted by Dice, the best, the median and the worst, in that order."""
    for key, kept in evaluation.worst.items():
        evaluation.worst[key] = [kept[-1], kept[len(kept) // 2], kept[0]]


def weights_of(arrays: Mapping[str, NDArray[Any]], modality: str) -> str:
    """Hex SHA-256 of all that a modality's masks depend on: everything but the other modalities' own arrays."""
    digest = hashlib.sha256()
    for key in sorted(arrays):
        owner = next((key[len(prefix) :].split(".")[0] for prefix in _OWNED if key.startswith(prefix)), modality)
        if owner == modality:
            digest.update(key.encode() + np.ascontiguousarray(arrays[key]).tobytes())
    return digest.hexdigest()


def kept(name: str, hashes: Mapping[str, str]) -> dict[str, Any]:
    """What a result that is there already says of weights that are the same still; else empty fields."""
    path = RESULTS / f"{name}.json"
    found = json.loads(path.read_text()) if path.is_file() else {}
    same = {modality for modality, sha256 in hashes.items() if found.get("weights_of", {}).get(modality) == sha256}

    def of_same(field: str) -> dict[str, Any]:
        return {key: value for key, value in found.get(field, {}).items() if key.split("/")[0] in same}

    return {
        **{field: of_same(field) for field in ("scores", "gate", "best_median_worst")},
        "images_dice": [row for row in found.get("images_dice", []) if row["modality"] in same],
    }


def measure(data: Path, out: Path, name: str, precisions: Sequence[Precision], images: int) -> None:
    """Score what has not been scored yet and write the results."""
    arrays, metadata = read_packed(WEIGHTS / CHECKPOINT)
    hashes = {modality: weights_of(arrays, modality) for modality in PAPER_MODALITIES}
    found = kept(name, hashes)
    for modality in PAPER_MODALITIES:
        done = found["scores"].get(modality, {}).get(REQUIRED[modality][0], {})
        missing = [precision for precision in precisions if precision not in done]
        if missing:
            measure_modality(modality, data, out / hashes[modality][:12], missing, images, found)
            write_result(name, found, hashes, json.loads(metadata[METADATA_KEY])["provenance"])
    shipped = {}
    for modality, (dataset, required) in REQUIRED.items():
        entry = found["scores"][modality][dataset]["fp32"]
        shipped[modality] = {
            "dice": round(entry["dice"], 2),
            "images": entry["images"],
            "dataset": dataset,
            "required": required,
        }
    atomic_write(WEIGHTS / SCORES, json.dumps(shipped, indent=2) + "\n")


def checks(data: Path, out: Path, backends: Sequence[str]) -> None:
    """Check the shipped weights on backends and write the results beside them; what ``out`` holds is not repeated."""
    checkpoint = sha256_file(WEIGHTS / CHECKPOINT)
    found: dict[str, dict[str, Any]] = {}
    for modality in PAPER_MODALITIES:
        path = out / checkpoint[:12] / f"{modality}.bundle"
        if not (path / MANIFEST).is_file():
            make_bundle([modality], path)
        images = find_images([str(data / modality / REQUIRED[modality][0])], held_out=KEEP)
        for backend in backends:
            bundle = Bundle.open(path)
            graph = bundle.graph(modality, "fp32")
            if not passed(bundle.manifest, graph, backend):
                print(f"  {modality} on {backend}", flush=True)
                print(f"    {check_backend(path, CheckRequest(modality, backend), images, _Lines())}", flush=True)
            key = accuracy_key(graph, backend)
            entry = Bundle.open(path).manifest.accuracy[key]
            found.setdefault(modality, {})[key.partition("/")[2]] = {
                k: v for k, v in entry.items() if k != "graph_sha256"
            }
    text = json.dumps({"checkpoint_sha256": checkpoint, "checks": found}, indent=1)
    atomic_write(WEIGHTS / CHECKS, text + "\n")


def measure_modality(
    modality: str, data: Path, out: Path, precisions: Sequence[Precision], images: int, found: dict[str, Any]
) -> None:
    """Score a modality's graphs of some precisions and note the scores in ``found``."""
    bundle, failed = bundle_of(modality, out, data, precisions, images)
    found["gate"] |= {f"{modality}/{precision}": line for precision, line in failed.items()}
    found["gate"] |= {key: value for key, value in bundle.manifest.accuracy.items() if not key.endswith("/fp32")}
    folders = [path for path in sorted((data / modality).iterdir()) if DatasetFolder.open(path).mask_files]
    for graph in bundle.manifest.graphs:
        if graph.precision not in precisions:
            continue
        candidate = BundleCandidate(bundle, graph.precision)
        evaluation = evaluate(candidate, plan_tasks(candidate, folders, modality, "test"), split="test", worst=KEEP)
        for dataset, entry in summary(evaluation)[modality].items():
            entry = {**entry, "input": graph.image_size}
            found["scores"].setdefault(modality, {}).setdefault(dataset, {})[graph.precision] = entry
            print(f"  {modality} {dataset} {graph.precision}: Dice {entry['dice']:.2f}", flush=True)
        if graph.precision == "fp32":
            found["images_dice"] += [
                {"modality": r.modality, "dataset": r.dataset, "dice": r.scores.dice} for r in evaluation.results
            ]
            cases(evaluation)
            for (_, dataset), chosen in evaluation.worst.items():
                found["best_median_worst"][f"{modality}/{dataset}"] = [
                    {"id": case.result.id, "dice": round(100 * case.result.scores.dice, 2)} for case in chosen
                ]
            write_sheets(out / "sheets", evaluation)
            write_csv(out / f"{modality}.csv", evaluation)


def write_result(name: str, found: dict[str, Any], hashes: Mapping[str, str], provenance: dict[str, str]) -> None:
    """Write what has been measured so far."""
    order = [modality for modality in PAPER_MODALITIES if modality in found["scores"]]
    result = {
        "schema": 1,
        "kind": "accuracy",
        "environment": collect_environment(),
        "weights_sha256": sha256_file(WEIGHTS / CHECKPOINT),
        "weights_of": {modality: hashes[modality] for modality in order},
        "provenance": provenance,
        "size": 1024,
        "split": "test",
        "scores": {modality: found["scores"][modality] for modality in order},
        "gate": found["gate"],
        "best_median_worst": found["best_median_worst"],
        "images_dice": sorted(found["images_dice"], key=lambda row: order.index(row["modality"])),
    }
    atomic_write(RESULTS / f"{name}.json", json.dumps(result, indent=1, default=str) + "\n")


def page(name: str, before: str | None) -> None:
    """Write docs/accuracy.md, the model card's scores and the plot from a result."""
    result = json.loads((RESULTS / f"{name}.json").read_text())
    old = json.loads((RESULTS / f"{before}.json").read_text()) if before else {"scores": {}}
    write_table("accuracy", table(result, name, old))
    write_table("accuracy", card(result, old), CARD)
    plot(result)


def write_table(tool: str, lines: str, path: Path = PAGE) -> None:
    """Put lines where a page has the marks of a tool's table."""
    begin, end = f"<!-- table: tools/{tool}.py -->", "<!-- end of table -->"
    head, _, rest = path.read_text().partition(begin)
    tail = rest.partition(end)[2]
    atomic_write(path, f"{head.rstrip()}\n\n{begin}\n{lines}\n{end}{tail or chr(10)}")


def dice_of(result: dict[str, Any], modality: str, dataset: str, precision: str) -> str:
    """A Dice in per cent as text; empty where it was not measured."""
    entry = result["scores"].get(modality, {}).get(dataset, {}).get(precision)
    return f"{entry['dice']:.2f}" if entry else ""


def card(result: dict[str, Any], old: dict[str, Any]) -> str:
    """The model card's scores as Markdown: FP32 alone."""
    lines = ["| modality | test set | images | Dice, per cent | before |", "|---|---|---|---|---|"]
    for modality, datasets in result["scores"].items():
        for dataset, entries in sorted(datasets.items(), key=lambda item: item[0] != REQUIRED[modality][0]):
            was = dice_of(old, modality, dataset, "fp32")
            lines.append(
                f"| {modality} | {dataset} | {entries['fp32']['images']} | {entries['fp32']['dice']:.2f} | {was} |"
            )
    return "\n".join(lines)


def table(result: dict[str, Any], name: str, old: dict[str, Any]) -> str:
    """The scores as Markdown."""
    lines = [
        f"From `benchmarks/results/{name}.json`: means over the test images at 1024 x 1024, Dice in per cent, HD and",
        'HD95 in pixels of 1024; "before" is the Dice of the weights that shipped at first. The last columns are',
        "the paper's ESP-MedSAM-S on its own data.",
        "",
        "| modality | test set | images | input | precision | Dice | before | HD | HD95 | | paper: Dice | HD | on |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for modality, datasets in result["scores"].items():
        main, required = REQUIRED[modality]
        for dataset, entries in sorted(datasets.items(), key=lambda item: item[0] != main):
            for precision in PRECISIONS:
                if precision not in entries:
                    reason = result["gate"].get(f"{modality}/{precision}")
                    if reason and dataset == main:
                        lines.append(f"| {modality} | {dataset} | | | {precision} | not made: {reason} | | | | | | | |")
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
                    dice_of(old, modality, dataset, precision),
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
    run.add_argument("--before", help="an older result to put beside it")
    write = commands.add_parser("page")
    write.add_argument("--name", required=True)
    write.add_argument("--before")
    hold = commands.add_parser("checks")
    hold.add_argument("--data", type=Path, required=True, help="as of measure")
    hold.add_argument("--out", type=Path, default=Path("runs/accuracy"))
    hold.add_argument("--backend", nargs="+", default=["openvino:bf16"])
    arguments = parser.parse_args()
    logging.basicConfig(format="    %(message)s", stream=sys.stdout)
    logging.getLogger("espmedsam_edge").setLevel(logging.INFO)
    if arguments.command == "checks":
        checks(arguments.data, arguments.out, arguments.backend)
        return
    if arguments.command == "measure":
        measure(arguments.data, arguments.out, arguments.name, arguments.precision, arguments.images)
    page(arguments.name, arguments.before)


if __name__ == "__main__":
    main()
