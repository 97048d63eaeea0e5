"""What batch normalisation does to training on batches of one modality each: Dice on the training images themselves.

    python benchmarks/batch_norm.py [--fractions 1 0.5 0.05 0] [--json FILE]

The tiny preset from scratch on 8 phantoms of each of the six modalities at 128 pixels, without augmentation. "loss" is
the mean over the last epoch's steps, in training; "dice" is measured on the same images at inference.
"""

from __future__ import annotations

import argparse
import csv
import json
import tempfile
from dataclasses import replace
from pathlib import Path
from unittest import mock

import torch

from espmedsam_edge.bundle import Normalization
from espmedsam_edge.files import atomic_write
from espmedsam_edge.machine.environment import collect_environment
from espmedsam_edge.model.config import ModelConfig
from espmedsam_edge.training import stages
from espmedsam_edge.training.collection import Collection, labelled_images
from espmedsam_edge.training.recipe import Recipe, load_recipe

EPOCHS, STEPS = 10, 60
SETTINGS = (
    "model.image_size=128", "data.folders={}", "data.phantoms=8", "data.augment=none", "data.balance=1",
    "optimizer.name=adamw", "optimizer.lr=2e-3", "optimizer.gradient_clip=1", "schedule.name=cosine",
    "schedule.warmup_epochs=1", "loss.pixel=bce", "loss.weight=1", "run.batch_size=4", f"run.epochs={EPOCHS}",
    f"run.steps_per_epoch={STEPS}", f"run.validate_every={EPOCHS}", "run.accelerator=cpu",
)  # fmt: skip


def main() -> None:
    """Train once a fraction, print and, with ``--json``, keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fractions", nargs="+", type=float, default=[1.0, 0.5, 0.05, 0.0])
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    environment = collect_environment()
    torch.set_num_threads(1)
    rows = []
    for fraction in arguments.fractions:
        with tempfile.TemporaryDirectory() as folder, mock.patch.object(stages, "labelled_images", on_training_images):
            recipe = load_recipe("smoke", [*SETTINGS, f"run.batch_norm_fraction={fraction}"])
            _, progress = stages.run_stage("segment", recipe, Path(folder))
            with (Path(folder) / "train.csv").open(encoding="utf-8") as stream:
                losses = [float(row["loss"]) for row in csv.DictReader(stream)][-STEPS:]
        assert progress.best is not None
        rows.append({"fraction": fraction, "loss": round(sum(losses) / STEPS, 4), "dice": round(progress.best, 4)})
        print(rows[-1], flush=True)
    if arguments.json:
        result = {"schema": 1, "kind": "batch-norm", "settings": SETTINGS, "rows": rows, "environment": environment}
        atomic_write(arguments.json, json.dumps(result, indent=2) + "\n")


def on_training_images(recipe: Recipe, config: ModelConfig, normalization: Normalization) -> Collection:
    """The recipe's images, validated on what they are trained on."""
    images = labelled_images(recipe, config, normalization)
    return replace(images, valid=images.train)


if __name__ == "__main__":
    main()
