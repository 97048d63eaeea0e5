"""Runs small enough for a test: the tiny preset at 64 pixels on phantoms."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from espmedsam_edge.training import loop
from espmedsam_edge.training.recipe import Recipe, load_recipe
from espmedsam_edge.training.stages import run_stage

SMALL = (
    "model.image_size=64",
    "data.phantoms=4",
    "data.workers=0",
    "run.epochs=1",
    "run.batch_size=2",
    "run.sheet_images=1",
    "run.accelerator=cpu",
)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def small_recipe() -> Callable[..., Recipe]:
    """The smoke recipe at 64 pixels with changes of the test's own."""

    def make(*changes: str) -> Recipe:
        return load_recipe("smoke", [*SMALL, *changes])

    return make


@pytest.fixture(scope="session")
def trained_student(tmp_path_factory: pytest.TempPathFactory, small_recipe: Callable[..., Recipe]) -> Path:
    """A complete checkpoint of fundus and dermoscopy."""
    return run_stage("segment", small_recipe(), tmp_path_factory.mktemp("student"))[0]


@pytest.fixture
def always_better(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every validation gives a better score than the one before, so that what is written is what was trained last."""
    scores = itertools.count()
    monkeypatch.setattr(loop, "validate", lambda _, images, *__: dict.fromkeys(images.sizes, float(next(scores))))
