"""What OpenVINO makes of the weights that ship, in each arithmetic, on the test images; the table in docs/precision.md.

    python tools/processor_scores.py measure --data DATA --out runs/processor-scores --name processor-scores-MACHINE
    python tools/processor_scores.py page --name processor-scores-MACHINE

``measure`` makes a bundle a modality, calibrates it to INT8 for processors on training images, and scores FP32 in ONNX
Runtime, and FP32, bfloat16, INT8 and INT8 with bfloat16 in OpenVINO, on the test lists: Dice, and the part of the
pixels in which masks of the picture's own size equal those of ONNX Runtime. Half an hour on two cores; what ``--out``
and the result hold already is not done again. ``page`` writes the table.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from accuracy import RESULTS, ROOT, bundle_of, weights_of

from espmedsam_edge.bundle import Bundle
from espmedsam_edge.evaluation.candidates import BundleCandidate
from espmedsam_edge.evaluation.evaluate import Task, evaluate, plan_tasks
from espmedsam_edge.evaluation.report import summary
from espmedsam_edge.files import atomic_write
from espmedsam_edge.imaging.dataset import DatasetFolder
from espmedsam_edge.imaging.geometry import mask_from_logits
from espmedsam_edge.machine.environment import collect_environment
from espmedsam_edge.modalities import PAPER_MODALITIES
from espmedsam_edge.shipped.bundles import CHECKPOINT, WEIGHTS
from espmedsam_edge.shipped.packed import read_packed

REFERENCE = "fp32 onnxruntime-cpu"
CASES = (REFERENCE, "fp32 openvino", "fp32 openvino:bf16", "int8 openvino", "int8 openvino:bf16")
PAGE = ROOT / "docs" / "precision.md"
_BEGIN, _END = "<!-- processor scores, by tools/processor_scores.py -->", "<!-- end -->"


def candidate_of(bundle: Bundle, case: str) -> BundleCandidate:
    """``fp32 openvino:bf16`` of a bundle."""
    precision, _, backend = case.partition(" ")
    return BundleCandidate(bundle, precision, backend)


def masks_of(bundle: Bundle, case: str, task: Task) -> list[np.ndarray]:
    """The mask of each image, at its own size."""
    found = []
    candidate = candidate_of(bundle, case)
    with candidate.predictor(task.modality) as predict:
        for id_ in task.ids:
            image = task.folder.load(id_).image
            found.append(mask_from_logits(predict(image), image.shape[:2], candidate.threshold))
    return found


def measure_modality(modality: str, bundle: Bundle, data: Path) -> dict[str, Any]:
    """Each case on each of the modality's datasets that has a test list."""
    found: dict[str, Any] = {}
    folders = [path for path in sorted((data / modality).iterdir()) if DatasetFolder.open(path).mask_files]
    for task in plan_tasks(candidate_of(bundle, REFERENCE), folders, modality, "test"):
        expected = masks_of(bundle, REFERENCE, task)
        rows = found[task.folder.name] = {}
        for case in CASES:
            entry = summary(evaluate(candidate_of(bundle, case), [task]))[modality][task.folder.name]
            equal = [np.mean(a == b) for a, b in zip(masks_of(bundle, case, task), expected, strict=True)]
            rows[case] = {
                "images": entry["images"],
                "dice": round(entry["dice"], 3),
                "equal_pixels_mean": round(float(np.mean(equal)), 6),
                "equal_pixels_worst": round(float(np.min(equal)), 6),
            }
            print(f"  {modality} {task.folder.name} {case}: {rows[case]}", flush=True)
    return found


def measure(data: Path, out: Path, name: str, modalities: Sequence[str]) -> None:
    """Some modalities, into one file, which is written after each."""
    file, arrays = RESULTS / f"{name}.json", read_packed(WEIGHTS / CHECKPOINT)[0]
    result = json.loads(file.read_text()) if file.is_file() else {}
    result = {"schema": 2, "kind": "processor-scores", "weights_of": {}, "scores": {}, "gate": {}} | result
    for modality in modalities:
        weights = weights_of(arrays, modality)
        if result["weights_of"].get(modality) == weights:
            continue
        bundle, failed = bundle_of(modality, out / weights[:12], data, ["fp32", "int8"], 32, target="cpu")
        if failed:
            raise SystemExit(f"{modality}: {failed}")
        result["environment"] = collect_environment()
        result["gate"] |= {key: value for key, value in bundle.manifest.accuracy.items() if "/int8" in key}
        result["scores"][modality] = measure_modality(modality, bundle, data)
        result["weights_of"][modality] = weights
        atomic_write(file, json.dumps(result, indent=1) + "\n")


def page(name: str) -> None:
    """Write the table between its marks in the page."""
    result = json.loads((RESULTS / f"{name}.json").read_text())
    text = PAGE.read_text()
    before, rest = text.split(_BEGIN)
    after = rest.split(_END)[1]
    atomic_write(PAGE, "\n".join([before + _BEGIN, "", *table(result["scores"]), "", _END + after]))


def table(scores: dict[str, Any]) -> list[str]:
    """A row a dataset: FP32's Dice, what the others add to it, and equal pixels of FP32 in both runtimes."""
    lines = [
        "| test images | ONNX Runtime, FP32 | OpenVINO, FP32 | bfloat16 | INT8 | INT8, bfloat16 | equal pixels, FP32 |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for modality, datasets in sorted(scores.items()):
        for dataset, rows in datasets.items():
            reference = rows[REFERENCE]
            cells = [f"{rows[case]['dice'] - reference['dice']:+.2f}" for case in CASES[1:]]
            equal = f"{100 * rows['fp32 openvino']['equal_pixels_worst']:.3f} %"
            title = f"{modality}, {dataset} ({reference['images']})"
            lines.append("| " + " | ".join([title, f"{reference['dice']:.2f}", *cells, equal]) + " |")
    return lines


def main() -> None:
    """Measure, or write the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("measure")
    run.add_argument("--data", type=Path, required=True, help="folder with MODALITY/DATASET as in docs/data.md")
    run.add_argument("--out", type=Path, default=Path("runs/processor-scores"))
    run.add_argument("--modality", nargs="+", choices=PAPER_MODALITIES, default=PAPER_MODALITIES)
    for options in (run, commands.add_parser("page")):
        options.add_argument("--name", required=True)
    arguments = parser.parse_args()
    if arguments.command == "measure":
        measure(arguments.data, arguments.out, arguments.name, arguments.modality)
    else:
        page(arguments.name)


if __name__ == "__main__":
    main()
