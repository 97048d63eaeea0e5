"""Make the bundle that `make demo` runs: train the tiny preset by the recipe `demo`, export it into the package.

    python tools/demo_bundle.py --data DATA --out runs/demo

DATA holds the dataset folders that the recipe names. Beside them the recipe wants phantoms/MODALITY, which this script
generates into the output folder. Takes about half an hour on two CPU cores.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from espmedsam_edge.export.exporter import export_bundle
from espmedsam_edge.imaging.encode import write_image
from espmedsam_edge.modalities import PAPER_MODALITIES
from espmedsam_edge.phantoms import phantom
from espmedsam_edge.runtime.demo import BUNDLE

TRAINING, VALIDATION = 80, 8  # phantoms a modality; the demo's own start at seed 9000


def write_phantoms(folder: Path, modality: str) -> None:
    """A dataset folder of phantoms of one modality."""
    names = {}
    for split, seeds in (("train", range(TRAINING)), ("valid", range(TRAINING, TRAINING + VALIDATION))):
        names[split] = [f"{seed:03d}" for seed in seeds]
        for seed in seeds:
            image, mask = phantom(modality, seed, (256, 320))
            write_image(folder / "images" / f"{seed:03d}.png", image)
            write_image(folder / "masks" / f"{seed:03d}.png", mask)
    (folder / "split.json").write_text(json.dumps({"origin": "generated", **names, "test": []}))


def main() -> None:
    """Generate, train, export."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of dataset folders")
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="where the run goes")
    parser.add_argument("--set", dest="settings", action="append", default=[], help="a recipe's KEY=VALUE")
    arguments = parser.parse_args()
    data: Path = arguments.out / "data"
    data.mkdir(parents=True, exist_ok=True)
    for modality in PAPER_MODALITIES:
        if not (data / modality).exists():
            (data / modality).symlink_to((arguments.data / modality).resolve())
        if not (data / "phantoms" / modality / "split.json").is_file():
            write_phantoms(data / "phantoms" / modality, modality)
    command = [sys.executable, "-m", "espmedsam_edge", "train", "segment", "demo", "--data", str(data)]
    command += ["--out", str(arguments.out)]
    for setting in arguments.settings:
        command += ["--set", setting]
    subprocess.run(command, check=True)
    bundle, exported = export_bundle(arguments.out / "weights.safetensors", BUNDLE, storage="float16")
    print(f"{bundle.path}: {sum(graph.megabytes for graph in exported):.1f} MB")


if __name__ == "__main__":
    main()
