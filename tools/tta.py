"""Measure what averaging over mirrored and turned copies (``--tta``) gives the weights that ship, by modality.

    python tools/tta.py measure --data DATA --out runs/accuracy --name tta-MACHINE
    python tools/tta.py page --name tta-MACHINE

``measure`` scores FP32 graphs at 1024 x 1024: on validation images under each set of views, on test images with and
without those that the modality allows, and times a frame with and without them, in turn. ``page`` writes the table in
docs/accuracy.md. Which views a modality allows stands in ``espmedsam_edge/modalities.py``: the largest set of which
every doubling gained at least a tenth of a point of Dice on validation images; test images decide nothing. What the
result holds of the same weights is kept.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
from accuracy import REQUIRED, RESULTS, WEIGHTS, bundle_of, weights_of, write_table

from espmedsam_edge.bundle import Bundle
from espmedsam_edge.files import atomic_write
from espmedsam_edge.imaging.dataset import DatasetFolder
from espmedsam_edge.imaging.geometry import mask_from_logits, preprocess
from espmedsam_edge.imaging.masks import resize_mask
from espmedsam_edge.imaging.views import VIEWS, average
from espmedsam_edge.machine.environment import collect_environment
from espmedsam_edge.metrics import dice
from espmedsam_edge.modalities import Views, views_of
from espmedsam_edge.runtime.segmenter import Segmenter
from espmedsam_edge.shipped.bundles import CHECKPOINT
from espmedsam_edge.shipped.packed import read_packed

SIZE = 1024
WORTH = 0.1  # points of Dice for which twice the time is spent
TIMED = 7  # frames


def best_views(scores: dict[Views, float]) -> Views:
    """The largest set of which every doubling was worth it."""
    chosen: Views = "none"
    for name in VIEWS:
        if name != chosen and scores[name] - scores[chosen] >= WORTH:
            chosen = name
        elif name != chosen:
            break
    return chosen


def score(bundle: Bundle, folder: DatasetFolder, modality: str, split: str, names: Collection[Views]) -> dict[str, Any]:
    """Mean Dice in per cent over a list's images, under some sets of views."""
    found: dict[Views, list[float]] = {name: [] for name in names}
    needed = {view for name in names for view in VIEWS[name]}
    with Segmenter.load(bundle, modality, "fp32", "onnxruntime-cpu") as segmenter:
        for id_ in folder.ids(split):
            sample = folder.load(id_)
            image = preprocess(sample.image, segmenter.image_size, bundle.manifest.input.normalization)
            truth = resize_mask(sample.mask, (SIZE, SIZE))
            logits = {view: average(segmenter.choice.backend.run, image, [view], 1)[0, 0] for view in needed}
            for name in names:
                mean = np.mean([logits[view] for view in VIEWS[name]], axis=0)
                found[name].append(dice(mask_from_logits(mean, (SIZE, SIZE), bundle.manifest.threshold), truth))
    return {
        "images": len(found["none"]),
        "dice": {name: round(100 * float(np.mean(x)), 2) for name, x in found.items()},
    }


def cost(bundle: Bundle, modality: str, folder: DatasetFolder) -> float:
    """How many times as long a frame takes with ``--tta``: the median over frames, each segmented both ways in turn."""
    ratios = []
    with (
        Segmenter.load(bundle, modality, "fp32", "onnxruntime-cpu") as plain,
        Segmenter.load(bundle, modality, "fp32", "onnxruntime-cpu", tta=True) as averaging,
    ):
        for id_ in folder.ids("valid")[:TIMED]:
            frame, seconds = folder.load_image(id_), []
            for segmenter in (plain, averaging):
                begin = time.perf_counter()
                segmenter.segment(frame)
                seconds.append(time.perf_counter() - begin)
            ratios.append(seconds[1] / seconds[0])
    return round(float(np.median(ratios)), 1)


def measure(data: Path, out: Path, name: str) -> None:
    """Score and time what has not been, and write the result after each modality."""
    file = RESULTS / f"{name}.json"
    modalities = json.loads(file.read_text())["modalities"] if file.is_file() else {}
    arrays, _ = read_packed(WEIGHTS / CHECKPOINT)
    for modality, (dataset, _) in REQUIRED.items():
        before, weights, allowed = modalities.get(modality, {}), weights_of(arrays, modality), views_of(modality)
        entry = dict(before) if before.get("weights") == weights else {}
        if entry.get("allowed") == allowed:
            continue
        bundle, _ = bundle_of(modality, out / weights[:12], data, ["fp32"], 0)
        folder = DatasetFolder.open(data / modality / dataset)
        if not entry:
            entry = {"dataset": dataset, "weights": weights, "valid": score(bundle, folder, modality, "valid", VIEWS)}
            entry["worth"] = best_views(entry["valid"]["dice"])
        entry["test"] = score(bundle, folder, modality, "test", {"none", allowed})
        entry |= {"allowed": allowed, "cost": cost(bundle, modality, folder)}
        modalities[modality] = entry
        print(modality, entry, flush=True)
        result = {
            "schema": 1,
            "kind": "tta",
            "environment": collect_environment(),
            "size": SIZE,
            "modalities": {key: modalities[key] for key in REQUIRED if key in modalities},
        }
        atomic_write(file, json.dumps(result, indent=1, default=str) + "\n")


def table(result: dict[str, Any], name: str) -> str:
    """The result as Markdown."""
    lines = [
        f"From `benchmarks/results/{name}.json`: mean Dice in per cent, FP32, at 1024 x 1024; cost is how many",
        "times as long a frame takes, the two ways measured in turn.",
        "",
        "| | validation images | alone | mirror (2) | flips (4) | turns (8) | `--tta` takes "
        "| test images | alone | `--tta` | cost |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for modality, entry in result["modalities"].items():
        valid, test, allowed = entry["valid"], entry["test"], entry["allowed"]
        cells = [modality, valid["images"], *(f"{valid['dice'][views]:.2f}" for views in VIEWS), allowed]
        cells += [
            test["images"],
            *(f"{test['dice'][views]:.2f}" for views in ("none", allowed)),
            f"{entry['cost']:.1f}",
        ]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def main() -> None:
    """Measure, or write the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("measure")
    run.add_argument("--data", type=Path, required=True, help="folder with MODALITY/DATASET as in docs/data.md")
    run.add_argument("--out", type=Path, default=Path("runs/accuracy"))
    for command in (run, commands.add_parser("page")):
        command.add_argument("--name", required=True)
    arguments = parser.parse_args()
    if arguments.command == "measure":
        measure(arguments.data, arguments.out, arguments.name)
    write_table("tta", table(json.loads((RESULTS / f"{arguments.name}.json").read_text()), arguments.name))


if __name__ == "__main__":
    main()
