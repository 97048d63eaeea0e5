"""The check of a dataset folder finds each kind of trouble, names it, and says nothing about a folder in order."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from espmedsam_edge.imaging.dataset import DatasetFolder
from espmedsam_edge.phantoms import phantom
from espmedsam_edge.training.data.check import check

SIZE = (96, 96)


def _folder(path: Path, count: int = 10, modality: str = "fundus", **split: Any) -> Path:
    (path / "images").mkdir(parents=True)
    (path / "masks").mkdir()
    for seed in range(count):
        image, mask = phantom(modality, seed, SIZE)
        cv2.imwrite(str(path / "images" / f"{seed}.png"), image)
        cv2.imwrite(str(path / "masks" / f"{seed}.png"), mask)
    ids = [str(seed) for seed in range(count)]
    lists = {"train": ids[: count - 3], "valid": ids[count - 3 : count - 2], "test": ids[count - 2 :], **split}
    (path / "split.json").write_text(json.dumps(lists))
    return path


def _findings(path: Path, **options: Any) -> dict[str, list[str]]:
    return {finding.kind: finding.examples for finding in check(DatasetFolder.open(path), **options).findings}


@pytest.mark.parametrize("modality", ["fundus", "xray", "ultrasound", "microscopy"])
def test_a_folder_in_order_has_no_findings(tmp_path: Path, modality: str) -> None:
    report = check(DatasetFolder.open(_folder(tmp_path / "set", modality=modality)))
    assert report.findings == []
    assert report.images == 10
    assert report.lists == {"train": 7, "valid": 1, "test": 2}


def _unlink(name: str) -> Callable[[Path], object]:
    return lambda path: (path / name).unlink()


def _write(name: str, array: np.ndarray) -> Callable[[Path], object]:
    return lambda path: cv2.imwrite(str(path / name), array)


def _grey(path: Path) -> None:
    mask = cv2.imread(str(path / "masks" / "3.png"), cv2.IMREAD_GRAYSCALE)
    values = np.where(mask > 0, 253, 2).astype(np.uint8)
    values[0, 0] = 9  # two values alone would be a mask without doubt
    cv2.imwrite(str(path / "masks" / "3.png"), values)


def _turned(path: Path) -> None:
    Image = pytest.importorskip("PIL.Image")
    exif = Image.Exif()
    exif[274] = 3  # the camera was upside down; the sizes still agree
    with Image.open(path / "images" / "3.png") as picture:
        picture.save(path / "images" / "3.png", exif=exif)


def _pages(path: Path) -> None:
    mask = cv2.imread(str(path / "masks" / "3.png"), cv2.IMREAD_GRAYSCALE)
    (path / "masks" / "3.png").unlink()
    cv2.imwritemulti(str(path / "masks" / "3.tif"), [mask, mask])


def _from_white(path: Path) -> None:
    tifffile = pytest.importorskip("tifffile")
    mask = cv2.imread(str(path / "masks" / "3.png"), cv2.IMREAD_GRAYSCALE)
    (path / "masks" / "3.png").unlink()
    tifffile.imwrite(path / "masks" / "3.tif", mask, photometric="miniswhite")


@pytest.mark.parametrize(
    ("spoil", "kind", "example"),
    [
        (_unlink("masks/3.png"), "image without mask", "3"),
        (_unlink("images/3.png"), "mask without image", "3"),
        (_unlink("images/3.png"), "listed in split.json but not there", "3 (train)"),
        (lambda path: (path / "images/3.png").write_bytes(b"x"), "image that cannot be read", "3.png"),
        (lambda path: (path / "masks/3.png").write_bytes(b"x"), "mask that cannot be read", "3.png"),
        (_write("masks/3.png", np.full((50, 96), 255, np.uint8)), "mask of another size", "96x50, image 96x96"),
        (_write("masks/3.png", np.zeros(SIZE, np.uint8)), "empty mask", "3"),
        (_write("masks/3.png", np.full(SIZE, 255, np.uint8)), "mask that covers the whole image", "3"),
        (_grey, "mask with grey values", f"3 ({SIZE[0] * SIZE[1]} pixels)"),
        (_pages, "mask of several pictures", "3 (2 pictures)"),
        (_from_white, "mask that counts down from white (MinIsWhite)", "3"),
        (_turned, "photograph turned by its Exif tag, its mask not", "3"),
        (_unlink("split.json"), "no split.json", "set"),
    ],
)
def test_each_kind_of_trouble_is_named(tmp_path: Path, spoil: Callable, kind: str, example: str) -> None:
    path = _folder(tmp_path / "set")
    spoil(path)
    findings = _findings(path)
    (found,) = (examples for name, examples in findings.items() if kind in name)
    assert len(found) == 1
    assert example in found[0]


def test_copies_are_found_within_and_across_lists(tmp_path: Path) -> None:
    path = _folder(tmp_path / "set")
    (path / "images" / "1.png").write_bytes((path / "images" / "0.png").read_bytes())
    cv2.imwrite(str(path / "images" / "9.bmp"), cv2.imread(str(path / "images" / "2.png")))  # same pixels, other file
    (path / "images" / "9.png").unlink()
    assert _findings(path) == {
        "same image twice": ["0 = 1"],
        "same image in two lists": ["2 = 9 [train, test]"],
    }


@pytest.mark.parametrize("modality", ["fundus", "dermoscopy"])
def test_changed_copies_are_found(tmp_path: Path, modality: str) -> None:
    path = _folder(tmp_path / "set", modality=modality)
    image = cv2.imread(str(path / "images" / "0.png"))
    brighter = cv2.convertScaleAbs(image, alpha=0.9, beta=12)
    (path / "images" / "8.png").unlink()
    cv2.imwrite(str(path / "images" / "8.jpg"), brighter, [cv2.IMWRITE_JPEG_QUALITY, 80])
    smaller = cv2.resize(cv2.imread(str(path / "images" / "4.png")), (80, 80), interpolation=cv2.INTER_AREA)
    cv2.imwrite(str(path / "images" / "5.png"), smaller)
    (path / "masks" / "5.png").unlink()
    findings = _findings(path)
    assert [line.split(" (")[0] for line in findings["nearly the same image in two lists"]] == ["0 ~ 8"]
    assert [line.split(" (")[0] for line in findings["nearly the same image twice"]] == ["4 ~ 5"]
    assert "nearly the same image twice" not in _findings(path, similarity=1)


def test_consecutive_frames_of_a_clip_count_as_nearly_the_same(tmp_path: Path) -> None:
    path = _folder(tmp_path / "set", modality="dermoscopy")
    cv2.imwrite(str(path / "images" / "9.png"), phantom("dermoscopy", 0, SIZE, frame=1)[0])
    assert "0 ~ 9" in _findings(path)["nearly the same image in two lists"][0]


def test_a_patient_in_two_lists_is_named(tmp_path: Path) -> None:
    path = _folder(tmp_path / "set", patient={"0": "A", "1": "A", "2": "B", "9": "B"})
    assert _findings(path) == {"patient in several lists": ["B (test, train)"]}


def test_unlabelled_photographs_need_no_masks(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for seed in range(3):
        cv2.imwrite(str(tmp_path / "images" / f"{seed}.png"), phantom("dental", seed, SIZE)[0])
    (tmp_path / "split.json").write_text(json.dumps({"train": ["0", "1", "2"]}))
    assert _findings(tmp_path) == {}


def test_plain_pictures_do_not_look_alike(tmp_path: Path) -> None:
    path = _folder(tmp_path / "set")
    for id_, value in (("0", 40), ("1", 41)):
        cv2.imwrite(str(path / "images" / f"{id_}.png"), np.full((*SIZE, 3), value, np.uint8))
    assert _findings(path) == {}
