"""Photographs for the first distillation: all of a folder without lists, the train list of one that has it."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest

pytest.importorskip("torchvision", reason="needs torchvision (extra train)")

from espmedsam_edge.errors import UserError
from espmedsam_edge.model.config import model_config
from espmedsam_edge.phantoms import phantom
from espmedsam_edge.training.collection import NATURAL, labelled_images, modalities_of, natural_images
from espmedsam_edge.training.data.augmentation import default_augmentation, strong_augmentation
from espmedsam_edge.training.data.sampler import BatchPlan, Draw
from espmedsam_edge.training.recipe import Recipe
from espmedsam_edge.training.sections import DataSection


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


def _folder(path: Path, modality: str, masks: bool = True) -> Path:
    for number in range(3):
        image, mask = phantom(modality, number, (40, 50))
        for kind, picture in (("images", image), ("masks", mask))[: 2 if masks else 1]:
            (path / kind).mkdir(parents=True, exist_ok=True)
            cv2.imwrite(str(path / kind / f"{number}.png"), picture)
    if masks:
        (path / "split.json").write_text(json.dumps({"train": ["0", "1"], "valid": ["2"], "test": []}))
    return path


def test_only_some_of_a_recipes_modalities(tmp_path: Path) -> None:
    folders = {name: [_folder(tmp_path / name, name)] for name in ("fundus", "xray")}
    recipe = Recipe(data=DataSection(folders=folders, only=["xray"]))
    assert modalities_of(recipe) == ["xray"]
    train = labelled_images(recipe, model_config("espmedsam-tiny")).train
    assert train.sizes == {"xray": 2}
    assert (train.longest("xray"), train.longest("fundus")) == (50, 0)
    with pytest.raises(UserError, match="no images of 'xrays'") as wrong:
        modalities_of(Recipe(data=DataSection(folders=folders, only=["xrays"])))
    assert "xray" in wrong.value.hint


def test_negatives_have_empty_masks_and_are_only_trained_on(tmp_path: Path) -> None:
    data = DataSection(
        folders={"xray": [_folder(tmp_path / "xray", "xray")]},
        negatives={"xray": [_folder(tmp_path / "hands", "fundus", masks=False)]},
        augment="none",
    )
    images = labelled_images(Recipe(data=data), model_config("espmedsam-tiny"))
    assert images.valid is not None
    assert (images.train.sizes, images.valid.sizes) == ({"xray": 5}, {"xray": 1})
    batch = images.train.batch(BatchPlan("xray", tuple(Draw(index, 0) for index in range(5))))
    assert batch.masks is not None
    assert (batch.masks.flatten(1).amax(1) > 0).tolist() == [True, True, False, False, False]


def test_augmentation_by_name_and_of_a_modality_alone(tmp_path: Path) -> None:
    folders = {name: [_folder(tmp_path / name, name)] for name in ("fundus", "xray")}
    own = default_augmentation("xray").model_copy(update={"blur": 0.9})
    data = DataSection(folders=folders, augment="strong", augmentations={"xray": own})
    train = labelled_images(Recipe(data=data), model_config("espmedsam-tiny")).train
    assert train.settings_of("fundus") == strong_augmentation("fundus")
    assert train.settings_of("xray") == own
