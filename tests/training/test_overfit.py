"""The tiny preset, from random weights, learns eight images by heart: what is left to learn is data, not code.

One modality runs by default; ESPMEDSAM_SLOW_TESTS=1 runs all six, which takes a quarter of an hour on one core.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from espmedsam_edge.bundle import Normalization
from espmedsam_edge.model.config import ModelConfig
from espmedsam_edge.training import stages
from espmedsam_edge.training.collection import Collection, labelled_images
from espmedsam_edge.training.recipe import Recipe

SLOW = pytest.mark.skipif("ESPMEDSAM_SLOW_TESTS" not in os.environ, reason="minutes; set ESPMEDSAM_SLOW_TESTS=1")

# The logits have a quarter of the input's side: thin vessels need a large one to be drawn at all.
CASES = [
    pytest.param("dermoscopy", 64, 240, id="dermoscopy"),
    pytest.param("xray", 128, 400, id="xray", marks=SLOW),
    pytest.param("colonoscopy", 128, 400, id="colonoscopy", marks=SLOW),
    pytest.param("ultrasound", 128, 400, id="ultrasound", marks=SLOW),
    pytest.param("microscopy", 256, 600, id="microscopy", marks=SLOW),
    pytest.param("fundus", 512, 800, id="fundus", marks=SLOW),
]


@pytest.mark.parametrize(("modality", "size", "steps"), CASES)
def test_tiny_preset_learns_eight_images_by_heart(
    modality: str,
    size: int,
    steps: int,
    tmp_path: Path,
    small_recipe: Callable[..., Recipe],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def scored_on_training_images(recipe: Recipe, config: ModelConfig, normalization: Normalization) -> Collection:
        images = labelled_images(recipe, config, normalization)
        return replace(images, valid=images.train)

    monkeypatch.setattr(stages, "labelled_images", scored_on_training_images)
    recipe = small_recipe(
        "data.phantoms=8",
        f"data.folders={{{modality}=[]}}",
        "data.augment=none",
        f"model.image_size={size}",
        "optimizer.name=adamw",
        "optimizer.lr=2e-3",
        "optimizer.gradient_clip=1",
        "schedule.name=cosine",
        "schedule.warmup_epochs=1",
        "loss.pixel=bce",
        "loss.weight=1",
        "run.batch_size=4",
        "run.epochs=8",
        f"run.steps_per_epoch={steps // 8}",
        "run.batch_norm_fraction=0.05",
        "run.small_fraction=0.6",
        f"run.small_size={max(64, size // 2)}",
        "run.validate_every=8",
    )
    _, progress = stages.run_stage("segment", recipe, tmp_path / "run")
    assert progress.best is not None
    assert progress.best >= 0.95
