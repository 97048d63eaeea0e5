"""Dataset folders: odd ids, splits, modality by place, and one clear line for each thing that can be wrong."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from espmedsam_edge.errors import UserError
from espmedsam_edge.imaging.dataset import DatasetFolder, infer_modality, read_split
from espmedsam_edge.phantoms import phantom

IDS = ["benign (12)", "ryct.2020200034.fig5-day7", "17", "a b.c (d)"]


def _write(folder: Path, split: dict[str, Any] | None = None, ids: list[str] = IDS) -> DatasetFolder:
    (folder / "images").mkdir(parents=True)
    (folder / "masks").mkdir()
    for seed, id_ in enumerate(ids):
        image, mask = phantom("fundus", seed, (40, 48))
        cv2.imwrite(str(folder / "images" / f"{id_}.jpg"), image)
        cv2.imwrite(str(folder / "masks" / f"{id_}.png"), mask)
    if split is None:
        split = {"origin": "derived", "train": ids[:2], "valid": ids[2:3], "test": ids[3:]}
    (folder / "split.json").write_text(json.dumps(split))
    return DatasetFolder.open(folder)


def test_ids_keep_spaces_parentheses_and_dots(tmp_path: Path) -> None:
    folder = _write(tmp_path / "drive")
    assert folder.name == "drive"
    assert folder.ids() == sorted(IDS)
    assert folder.ids("train") == IDS[:2]
    assert folder.ids("test") == ["a b.c (d)"]
    for seed, id_ in enumerate(IDS):
        sample = folder.load(id_)
        assert np.array_equal(sample.mask, phantom("fundus", seed, (40, 48))[1])
        assert sample.image.shape == (40, 48, 3)
        assert sample.note == ""


def test_nothing_is_read_before_it_is_asked_for(tmp_path: Path) -> None:
    folder = _write(tmp_path / "drive")
    (folder.path / "images" / "17.jpg").write_bytes(b"broken")
    assert folder.load("benign (12)").mask.any()
    with pytest.raises(UserError, match=r"17\.jpg"):
        folder.load("17")


def test_a_folder_that_vanishes_is_one_error_with_the_file_named(tmp_path: Path) -> None:
    folder = _write(tmp_path / "drive")
    folder.load("17")
    folder.path.rename(tmp_path / "gone")
    with pytest.raises(UserError, match=r"17\.jpg") as caught:
        folder.load("17")
    assert caught.value.exit_code == 1


def test_a_mask_of_another_size_is_named_with_both_sizes(tmp_path: Path) -> None:
    folder = _write(tmp_path / "drive")
    cv2.imwrite(str(folder.path / "masks" / "17.png"), np.full((20, 48), 255, np.uint8))
    with pytest.raises(UserError, match=r"17\.png is 48x20 pixels but its image is 48x40"):
        folder.load("17")


def test_a_mask_that_went_through_jpeg_is_read_with_a_note(tmp_path: Path) -> None:
    folder = _write(tmp_path / "drive")
    _, mask = phantom("colonoscopy", 2, (40, 48))
    (folder.path / "masks" / "17.png").unlink()
    cv2.imwrite(str(folder.path / "masks" / "17.jpg"), mask)
    sample = DatasetFolder.open(folder.path).load("17")
    assert "17.jpg" in sample.note
    assert (sample.mask != mask).mean() < 0.01


def test_a_missing_mask_is_an_error_that_names_the_image(tmp_path: Path) -> None:
    folder = _write(tmp_path / "drive")
    (folder.path / "masks" / "17.png").unlink()
    with pytest.raises(UserError, match=r"17\.jpg has no mask"):
        folder.load("17")


def test_unlabelled_folders_have_images_only(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    cv2.imwrite(str(tmp_path / "images" / "one.png"), phantom("fundus", 0, (40, 40))[0])
    (tmp_path / "images" / ".hidden.png").write_bytes(b"")
    (tmp_path / "images" / "notes.txt").write_text("not an image")
    folder = DatasetFolder.open(tmp_path)
    assert folder.ids() == ["one"]
    assert folder.mask_files == {}
    with pytest.raises(UserError, match=r"no split\.json"):
        folder.ids("test")


@pytest.mark.parametrize(
    ("split", "message"),
    [
        ({"train": ["17"], "test": ["17"]}, "lists '17' in train and in test"),
        ({"train": ["17", "17"]}, "lists '17' in train and in train"),
        ({"train": "17"}, "train"),
        ({"train": [1]}, r"train\.0"),
        (["17"], "the whole"),
    ],
)
def test_a_wrong_split_file_says_which_field(tmp_path: Path, split: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        _write(tmp_path / "drive", split)


def test_a_split_that_is_not_json_is_one_line(tmp_path: Path) -> None:
    _write(tmp_path / "drive")
    (tmp_path / "drive" / "split.json").write_text("{")
    with pytest.raises(UserError, match="is not JSON"):
        DatasetFolder.open(tmp_path / "drive")


def test_a_split_is_utf_8_with_or_without_an_editors_mark(tmp_path: Path) -> None:
    text = json.dumps({"train": ["17"], "val": [], "test": []})
    for encoding in ("utf-8", "utf-8-sig"):
        (tmp_path / "split.json").write_bytes(text.encode(encoding))
        assert read_split(tmp_path / "split.json").train == ["17"]
    for encoding in ("utf-16", "utf-16-le", "utf-32"):
        (tmp_path / "split.json").write_bytes(text.encode(encoding))
        with pytest.raises(UserError, match="is not JSON"):
            read_split(tmp_path / "split.json")


def test_empty_unknown_and_broken_lists_are_refused(tmp_path: Path) -> None:
    folder = _write(tmp_path / "drive", {"train": ["17", "lost"]})
    with pytest.raises(UserError, match=r"test list in .* is empty"):
        folder.ids("test")
    with pytest.raises(UserError, match="Did you mean 'test'"):
        folder.ids("tets")
    with pytest.raises(UserError, match=r"1 of 2 train ids .* 'lost'"):
        folder.ids("train")


def test_two_files_of_one_id_are_refused(tmp_path: Path) -> None:
    folder = _write(tmp_path / "drive")
    cv2.imwrite(str(folder.path / "images" / "17.png"), np.zeros((40, 48, 3), np.uint8))
    with pytest.raises(UserError, match=r"both 17\.jpg and 17\.png"):
        DatasetFolder.open(folder.path).ids()


@pytest.mark.parametrize("name", ["nowhere", "empty"])
def test_what_is_no_dataset_folder_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no dataset folder|no images/"):
        DatasetFolder.open(tmp_path / name)


def test_the_modality_comes_from_the_split_file_then_the_place(tmp_path: Path) -> None:
    known = ["fundus", "xray"]
    by_place = _write(tmp_path / "fundus" / "drive")
    assert infer_modality(by_place, known, "the model") == "fundus"
    by_name = _write(tmp_path / "sets" / "xray")
    assert infer_modality(by_name, known, "the model") == "xray"
    stated = _write(tmp_path / "fundus" / "films", {"train": ["17"], "modality": "xray"})
    assert infer_modality(stated, known, "the model") == "xray"
    with pytest.raises(UserError, match="the model has no modality 'xray'"):
        infer_modality(stated, ["fundus"], "the model")
    with pytest.raises(UserError, match="--modality NAME"):
        infer_modality(_write(tmp_path / "sets" / "other"), known, "the model")


def test_the_development_images_are_such_folders(data_root: Path) -> None:
    folder = DatasetFolder.open(data_root / "ultrasound" / "busi")
    ids = folder.ids("train")
    assert len(ids) == 79
    sample = folder.load(ids[0])
    assert sample.mask.shape == sample.image.shape[:2]
    assert infer_modality(folder, ["ultrasound", "fundus"], "the model") == "ultrasound"


def test_lists_are_read_from_ordinary_files_alone(tmp_path: Path) -> None:
    _write(tmp_path)
    split = tmp_path / "split.json"
    for make in (lambda: split.symlink_to("/dev/zero"), lambda: os.mkfifo(split), split.mkdir):
        split.unlink(missing_ok=True)
        make()
        with pytest.raises(UserError, match=r"cannot read .*split\.json"):
            DatasetFolder.open(tmp_path)
    split.rmdir()
    split.touch()
    os.truncate(split, 1 << 33)
    with pytest.raises(UserError, match="is over 256 MiB"):
        DatasetFolder.open(tmp_path)
