"""Photographs for the first distillation: all of a folder without lists, the train list of one that has it."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest

pytest.importorskip("torchvision", reason="needs torchvision (extra train)")

from espmedsam_edge.model.config import model_config
from espmedsam_edge.training.collection import NATURAL, natural_images
from espmedsam_edge.training.recipe import DataSection, Recipe


@pytest.mark.parametrize(
    ("split", "expected"),
    [(None, 3), ({"origin": "derived", "unlabelled": 3}, 3), ({"train": ["0", "1"], "valid": ["2"], "test": []}, 2)],
)
def test_photographs_are_those_listed_or_all(tmp_path: Path, split: dict[str, object] | None, expected: int) -> None:
    (tmp_path / "photos" / "images").mkdir(parents=True)
    for number in range(3):
        picture = np.random.default_rng(number).integers(0, 256, (40, 50, 3), np.uint8)
        cv2.imwrite(str(tmp_path / "photos" / "images" / f"{number}.png"), picture)
    if split is not None:
        (tmp_path / "photos" / "split.json").write_text(json.dumps(split))
    recipe = Recipe(data=DataSection(natural=[tmp_path / "photos"]))
    assert natural_images(recipe, model_config("espmedsam-tiny")).train.sizes == {NATURAL: expected}
