"""A training run as a result: what it ran, on what, and its curves.

    python tools/training_summary.py runs/s --name espmedsam-s-MACHINE

Reads a finished (or stopped) run's folder and writes benchmarks/results/training/NAME.json (recipe, seed, provenance,
environment, losses an epoch, validation scores) and NAME.png (curves).
"""

from __future__ import annotations

import argparse
import csv
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open

from espmedsam_edge.files import atomic_path, atomic_write
from espmedsam_edge.machine.environment import collect_environment

RESULTS = Path(__file__).resolve().parents[1] / "benchmarks" / "results" / "training"
TERMS = ("loss", "pixel", "dice", "patch")


def epochs(file: Path) -> list[dict[str, Any]]:
    """Means of the steps' losses and terms an epoch, and the time it took."""
    groups: dict[int, list[dict[str, str]]] = defaultdict(list)
    with file.open(newline="") as stream:
        for row in csv.DictReader(stream):
            groups[int(row["epoch"])].append(row)
    summary = []
    for epoch, rows in sorted(groups.items()):
        entry: dict[str, Any] = {"epoch": epoch, "steps": len(rows)}
        entry |= {term: round(float(np.mean([float(row[term]) for row in rows])), 5) for term in TERMS}
        entry["images_per_second"] = round(float(np.median([float(row["images_per_second"]) for row in rows])), 3)
        by_modality: dict[str, list[float]] = defaultdict(list)
        for row in rows:
            by_modality[row["modality"]].append(float(row["loss"]))
        entry["loss_of"] = {name: round(float(np.mean(values)), 5) for name, values in sorted(by_modality.items())}
        summary.append(entry)
    return summary


def validations(file: Path) -> list[dict[str, Any]]:
    """valid.csv with a row a validation: its epoch and every modality's Dice, 0..1."""
    rows: dict[int, dict[str, Any]] = {}
    with file.open(newline="") as stream:
        for row in csv.DictReader(stream):
            epoch = int(row["epoch"])
            rows.setdefault(epoch, {"epoch": epoch})[row["modality"]] = float(row["score"])
    return list(rows.values())


def draw(result: dict[str, Any], path: Path) -> None:
    """Loss and validation Dice over the epochs."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4))
    numbers = [entry["epoch"] for entry in result["epochs"]]
    for term in TERMS:
        left.plot(numbers, [entry[term] for entry in result["epochs"]], label=term)
    left.set(xlabel="epoch", title="training loss and its terms")
    names = [key for row in result["validation"][:1] for key in row if key != "epoch"]
    for name in names:
        points = [(row["epoch"], 100 * row[name]) for row in result["validation"]]
        right.plot(*zip(*points, strict=True), marker="o", markersize=3, label=name)
    right.set(xlabel="epoch", title="validation Dice, per cent", ylim=(0, 100))
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.tight_layout()
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=100)


def main() -> None:
    """Summarise."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--name", required=True)
    parser.add_argument("--note", default="", help="a sentence on how it ran")
    arguments = parser.parse_args()
    run: Path = arguments.run
    with safe_open(run / "weights.safetensors", framework="np") as file:
        info = json.loads((file.metadata() or {})["espmedsam"])
    recipe = json.loads((run / "recipe.json").read_text())
    recipe.get("data", {}).pop("root", None)  # a folder of this machine
    recipe["init"] = Path(recipe.get("init", "scratch")).name
    result = {
        "schema": 1,
        "kind": "training",
        "environment": collect_environment(),
        "note": arguments.note,
        "recipe": recipe,
        "provenance": info["provenance"],
        "epochs": epochs(run / "train.csv"),
        "validation": validations(run / "valid.csv"),
    }
    atomic_write(RESULTS / f"{arguments.name}.json", json.dumps(result, indent=1, default=str) + "\n")
    draw(result, RESULTS / f"{arguments.name}.png")
    print(RESULTS / f"{arguments.name}.json")


if __name__ == "__main__":
    main()
