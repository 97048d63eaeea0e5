"""What ``calibrate`` takes: minutes and peak memory, by precision, image size and number of images.

    python benchmarks/calibrate_cost.py --name calibrate-cost-MACHINE [--images 128] [--image-size 1024]
    python benchmarks/calibrate_cost.py --name calibrate-cost-MACHINE --bundle s.bundle --data DATA

The first exports a bundle of one modality with random weights and calibrates it on drawn images; the gate may refuse
such a network: the work is the same, and the result says so. The second takes every modality of a bundle, its training
images in DATA/MODALITY to measure ranges on and its validation images for the gate.

Each precision calibrates a copy of the bundle in a process of its own, so that each one's peak of resident memory is
its own and nothing is reused; with ``--reuse`` the precisions of a modality share one copy, and so the ranges measured
for the first. The result is written after each modality, as JSON into ``benchmarks/results/``. At 1024x1024 with 128
images it needs a quiet machine, 10 GB and up to half an hour for each modality and precision.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from espmedsam_edge.bundle import Bundle
from espmedsam_edge.calibration.images import DEFAULT_HELD_OUT
from espmedsam_edge.files import atomic_write
from espmedsam_edge.imaging.dataset import DatasetFolder
from espmedsam_edge.imaging.encode import write_image
from espmedsam_edge.machine.environment import collect_environment
from espmedsam_edge.phantoms import phantom_clip

RESULTS = Path(__file__).parent / "results"
MODALITY = "fundus"
PHANTOM_SIZE = (480, 640)


def random_bundle(folder: Path, preset: str, image_size: int) -> Path:
    """A bundle of one modality with random weights."""
    import torch

    from espmedsam_edge.export.exporter import export_bundle
    from espmedsam_edge.model.checkpoint import CheckpointInfo, save_checkpoint
    from espmedsam_edge.model.config import model_config
    from espmedsam_edge.model.esp_medsam import EspMedSam

    torch.manual_seed(0)
    model = EspMedSam(model_config(preset), [MODALITY]).eval()
    weights = folder / "random.safetensors"
    save_checkpoint(weights, model, CheckpointInfo(config=model.config, origin="random"))
    bundle, _ = export_bundle(weights, folder / "random.bundle", image_size=image_size)
    return bundle.path


def draw_images(folder: Path, modality: str, count: int) -> Path:
    """Phantoms of a modality as PNG files."""
    folder.mkdir()
    for number in range(count):
        ((image, _),) = phantom_clip(modality, number, 1, PHANTOM_SIZE)
        write_image(folder / f"{number:04}.png", image)
    return folder


def training_images(data: Path, modality: str) -> Path:
    """The modality's first dataset folder with a training list."""
    for folder in sorted((data / modality).iterdir()):
        split = DatasetFolder.open(folder).split
        if split is not None and split.train:
            return folder
    raise SystemExit(f"{data / modality} has no dataset folder with a training list.")


def measure(bundle: Path, images: Path, modality: str, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Calibrate one modality of a bundle to each precision, each in a process of its own."""
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy.bundle"
        for precision in arguments.precision:
            reused = copy.exists() and arguments.reuse
            if not reused:
                shutil.rmtree(copy, ignore_errors=True)
                shutil.copytree(bundle, copy)
            command = [sys.executable, __file__, "--one", str(copy), modality, precision, str(images)]
            command += ["--images", str(arguments.images), "--held-out", str(arguments.held_out)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode or '"exit_code": 2' in done.stdout:
                raise SystemExit(
                    f"calibrate ended with code {done.returncode}:\n{done.stdout[-500:]}{done.stderr[-2000:]}"
                )
            row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
            refusal = done.stderr.strip().splitlines()
            rows.append(
                {**row, "ranges_reused": reused, "refusal": refusal[-1] if row["exit_code"] and refusal else None}
            )
            print(rows[-1], flush=True)
    return rows


def one(bundle: Path, modality: str, precision: str, images: str, count: int, held_out: int) -> None:
    """The child: calibrate, and print seconds, the most memory, how it ended and what the gate found."""
    from espmedsam_edge.cli import main as command

    begin = time.perf_counter()
    arguments = ["calibrate", str(bundle), images, "--modality", modality, "--precision", precision, "--no-pictures"]
    try:
        command([*arguments, "--images", str(count), "--held-out", str(held_out)])
        code: Any = 0
    except SystemExit as ended:
        code = ended.code
    seconds = time.perf_counter() - begin
    row = {
        "modality": modality,
        "precision": precision,
        "minutes": seconds / 60,
        "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
        "exit_code": code,
        "gate": Bundle.open(bundle).manifest.accuracy.get(f"{modality}/{precision}"),
    }
    print("\n" + json.dumps(row))


def main() -> None:
    """Measure each precision and write the result."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--name", help="of the file in benchmarks/results/, without its ending")
    parser.add_argument("--bundle", type=Path)
    parser.add_argument("--data", type=Path, help="folder with MODALITY/DATASET as in docs/data.md")
    parser.add_argument("--modality", nargs="+", help="of the bundle; default: all")
    parser.add_argument("--preset", default="espmedsam-s")
    parser.add_argument("--image-size", type=int, default=1024)
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--held-out", type=int, default=DEFAULT_HELD_OUT)
    parser.add_argument("--precision", nargs="+", default=["fp16", "int8"])
    parser.add_argument("--reuse", action="store_true", help="one copy of the bundle for all precisions")
    parser.add_argument("--one", nargs=4, metavar=("BUNDLE", "MODALITY", "PRECISION", "IMAGES"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        bundle, modality, precision, images = arguments.one
        one(Path(bundle), modality, precision, images, arguments.images, arguments.held_out)
        return
    if not arguments.name or (arguments.bundle is None) != (arguments.data is None):
        parser.error("--name is needed, and --bundle and --data only go together")
    result: dict[str, Any] = {
        "schema": 1,
        "kind": "calibrate-cost",
        "environment": collect_environment(),
        "images_asked": arguments.images,
        "weights": "random" if arguments.bundle is None else "the bundle's",
        "pictures": "drawn phantoms" if arguments.data is None else "training images",
        "rows": [],
    }
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        path = arguments.bundle or random_bundle(folder, arguments.preset, arguments.image_size)
        manifest = Bundle.open(path).manifest
        result["image_size"] = {graph.modality: graph.image_size for graph in manifest.graphs}
        for modality in arguments.modality or manifest.modalities:
            if arguments.data is None:
                pictures = draw_images(folder / modality, modality, arguments.images + arguments.held_out)
            else:
                pictures = training_images(arguments.data, modality)
            result["rows"] += measure(path, pictures, modality, arguments)
            atomic_write(RESULTS / f"{arguments.name}.json", json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
