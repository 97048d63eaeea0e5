"""What ``calibrate`` takes: minutes and peak memory, by precision, image size and number of images.

    python benchmarks/calibrate_cost.py --name calibrate-cost-MACHINE [--images 128] [--image-size 1024] [FOLDER...]

Exports a bundle of one modality with random weights (or takes ``--bundle`` and its first modality), and calibrates
copies of it in processes of their own, so that each one's peak of resident memory is its own. Without FOLDER the images
are drawn (phantoms of the modality). The gate may refuse a network with random weights: the work is the same, and the
result says so. Writes JSON into ``benchmarks/results/``. At 1024x1024 with 128 images it needs a quiet machine, 10 GB
and an hour.
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
from espmedsam_edge.files import atomic_write
from espmedsam_edge.imaging.encode import write_image
from espmedsam_edge.phantoms import phantom_clip
from espmedsam_edge.runtime.environment import collect_environment

RESULTS = Path(__file__).parent / "results"
MODALITY = "fundus"
PHANTOM_SIZE = (480, 640)
HELD_OUT = 16


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
    for number in range(count):
        ((image, _),) = phantom_clip(modality, number, 1, PHANTOM_SIZE)
        write_image(folder / f"{number:04}.png", image)
    return folder


def measure(bundle: Path, precision: str, images: list[str], count: int) -> dict[str, Any]:
    """Calibrate a copy of a bundle in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy.bundle"
        shutil.copytree(bundle, copy)
        command = [sys.executable, __file__, "--one", str(copy), precision, "--images", str(count), *images]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode or '"exit_code": 2' in done.stdout:
        raise SystemExit(f"calibrate ended with code {done.returncode}:\n{done.stdout[-500:]}{done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    refusal = done.stderr.strip().splitlines()
    return {**found, "refusal": refusal[-1] if found["exit_code"] and refusal else None}


def one(bundle: Path, precision: str, images: list[str], count: int) -> None:
    """The child: calibrate, and print seconds, the most memory and how it ended."""
    from espmedsam_edge.cli import main as command

    begin = time.perf_counter()
    modality = Bundle.open(bundle).manifest.modalities[0]
    arguments = ["calibrate", str(bundle), *images, "--modality", modality, "--precision", precision, "--no-pictures"]
    try:
        command([*arguments, "--images", str(count), "--held-out", str(HELD_OUT)])
        code: Any = 0
    except SystemExit as ended:
        code = ended.code
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    seconds = time.perf_counter() - begin
    row = {"precision": precision, "images": count, "minutes": seconds / 60, "peak_gb": peak / 1e9, "exit_code": code}
    row["graph_written"] = (modality, precision) in [
        (graph.modality, graph.precision) for graph in Bundle.open(bundle).manifest.graphs
    ]
    print("\n" + json.dumps(row))


def main() -> None:
    """Measure each precision and write the result."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folders", nargs="*", help="images, as calibrate takes them")
    parser.add_argument("--name", help="of the file in benchmarks/results/, without its ending")
    parser.add_argument("--bundle", type=Path)
    parser.add_argument("--preset", default="espmedsam-s")
    parser.add_argument("--image-size", type=int, default=1024)
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--precision", nargs="+", default=["fp16", "int8"])
    parser.add_argument("--one", nargs=2, metavar=("BUNDLE", "PRECISION"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        one(Path(arguments.one[0]), arguments.one[1], arguments.folders, arguments.images)
        return
    if not arguments.name:
        parser.error("--name is needed")
    environment = collect_environment()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        bundle = arguments.bundle or random_bundle(folder, arguments.preset, arguments.image_size)
        images = arguments.folders
        if not images:
            modality = Bundle.open(bundle).manifest.modalities[0]
            (folder / "images").mkdir()
            images = [str(draw_images(folder / "images", modality, arguments.images + HELD_OUT))]
        rows = [measure(bundle, precision, images, arguments.images) for precision in arguments.precision]
        graph = Bundle.open(bundle).manifest.graphs[0]
    result = {
        "schema": 1,
        "kind": "calibrate-cost",
        "environment": environment,
        "preset": arguments.preset if arguments.bundle is None else None,
        "image_size": graph.image_size,
        "weights": "random" if arguments.bundle is None else "the bundle's",
        "pictures": "drawn phantoms" if not arguments.folders else "given",
        "rows": rows,
    }
    atomic_write(RESULTS / f"{arguments.name}.json", json.dumps(result, indent=2) + "\n")
    print(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
