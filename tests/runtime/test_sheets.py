"""Sheets are told by their lines, and each of their pictures is segmented for itself."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import pytest
from test_tiling import scaled
from toy_bundles import save_toy_bundle

from espmedsam_edge.imaging.dataset import DatasetFolder
from espmedsam_edge.phantoms import phantom
from espmedsam_edge.runtime import tiling
from espmedsam_edge.runtime.segmenter import Segmenter
from espmedsam_edge.runtime.sheets import grid_of

SIZE = (160, 200)


def texture(seed: int, size: tuple[int, int] = SIZE) -> np.ndarray:
    """A picture of blobs of some size, brightness and contrast."""
    rng = np.random.default_rng(seed)
    sigma, level, contrast = rng.uniform(2, 12), rng.uniform(60, 190), rng.uniform(15, 50)
    smooth = cv2.GaussianBlur(rng.normal(size=(*size, 3)).astype(np.float32), (0, 0), sigma)
    noise = rng.normal(0, 2, (*size, 3))
    return np.asarray(np.clip(level + contrast * smooth / smooth.std() + noise, 0, 255), np.uint8)


def joined(pictures: list[np.ndarray], columns: int) -> np.ndarray:
    return np.vstack([np.hstack(pictures[n : n + columns]) for n in range(0, len(pictures), columns)])


def as_jpeg(frame: np.ndarray) -> np.ndarray:
    return np.asarray(cv2.imdecode(cv2.imencode(".jpg", frame)[1], cv2.IMREAD_COLOR), np.uint8)


@pytest.mark.parametrize("gutter", [0, 6])
@pytest.mark.parametrize("grid", [(2, 3), (1, 2), (1, 4), (5, 1), (4, 4)])
def test_the_grid_of_a_sheet_is_found(grid: tuple[int, int], gutter: int) -> None:
    for first in (0, 100, 200):
        pictures = [texture(first + n) for n in range(grid[0] * grid[1])]
        if gutter:
            pictures = [
                cv2.copyMakeBorder(one, *[gutter] * 4, cv2.BORDER_CONSTANT, value=(9, 9, 9)) for one in pictures
            ]
        frame = joined(pictures, grid[1])
        assert grid_of(frame) == grid
        assert grid_of(as_jpeg(frame)) == grid


def test_one_picture_is_no_sheet() -> None:
    for seed in range(8):
        assert grid_of(texture(seed, (480, 640))) == (1, 1)
    for kind in ("fundus", "xray", "dermoscopy", "ultrasound", "colonoscopy", "microscopy"):
        assert grid_of(phantom(kind, 0, (480, 640))[0]) == (1, 1)
    assert grid_of(np.full((480, 640, 3), 80, np.uint8)) == (1, 1)
    assert grid_of(np.zeros((40, 3, 3), np.uint8)) == (1, 1)


@pytest.mark.parametrize(
    "name", ["dermoscopy/ph2", "xray/covid_cxr_lungs", "ultrasound/busi", "colonoscopy/cvc_clinicdb"]
)
def test_sheets_of_real_pictures_are_told_from_large_ones(data_root: Path, name: str) -> None:
    folder = DatasetFolder.open(data_root / name)
    found = Counter[tuple[int, int]]()
    pictures = [folder.load_image(id_) for id_ in folder.ids("train")[:40]]
    for picture in pictures[:10]:
        found[grid_of(np.asarray(cv2.resize(picture, None, fx=3, fy=3, interpolation=cv2.INTER_CUBIC), np.uint8))] += 1
    assert found == {(1, 1): 10}
    size = Counter(picture.shape for picture in pictures).most_common(1)[0][0]
    alike = [picture for picture in pictures if picture.shape == size]
    assert grid_of(joined(alike[:6], 3)) == (2, 3)


def test_each_picture_of_a_sheet_is_segmented_for_itself(tmp_path: Path, said: list[str]) -> None:
    bundle = scaled(save_toy_bundle(tmp_path / "b.bundle"), largest=200)
    frame = joined([phantom("fundus", seed, SIZE)[0] for seed in range(6)], 3)
    with Segmenter.load(bundle) as segmenter, Segmenter.load(bundle, tile="off") as whole:
        found, as_one = segmenter.segment(frame), whole.segment(frame)
        for row in range(2):
            for column in range(3):
                place = np.s_[160 * row : 160 * (row + 1), 200 * column : 200 * (column + 1)]
                own = segmenter.segment(np.ascontiguousarray(frame[place]))
                cells = np.s_[16 * row : 16 * (row + 1), 16 * column : 16 * (column + 1)]
                assert np.abs(found.logits[cells] - own.logits).max() < 1e-5
                assert np.mean(found.mask[place] == own.mask) > 0.95  # but for where logits of two meet
    assert as_one.logits.shape == (16, 16)
    (line,) = (line for line in said if "side by side" in line)
    assert line.startswith("A picture of 600x320 pixels looks like 6 pictures side by side, of 200x160 each")


def test_a_sheet_of_other_pictures_is_taken_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = scaled(save_toy_bundle(tmp_path / "b.bundle"), largest=200)
    with Segmenter.load(bundle) as segmenter:
        assert segmenter.segment(joined([texture(seed) for seed in range(6)], 3)).logits.shape == (16, 16)
        monkeypatch.setattr(tiling, "grid_of", lambda frame: pytest.fail("was looked for"))
        segmenter.segment(texture(0))  # no larger than those of the training: costs nothing
