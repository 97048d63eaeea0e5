"""The demo segments every modality of its bundle, scores what it can, and shows it on one sheet."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from toy_bundles import save_toy_bundle

from espmedsam_edge.bundle import Bundle
from espmedsam_edge.demo import demo as demo_module
from espmedsam_edge.demo import sheet as sheet_module
from espmedsam_edge.demo.demo import Demo, Row, demo_bundles
from espmedsam_edge.demo.sheet import TILE, contact_sheet
from espmedsam_edge.errors import UserError
from espmedsam_edge.imaging.decode import read_image
from espmedsam_edge.imaging.recognition import confidences
from espmedsam_edge.runtime.video.reading import open_video
from espmedsam_edge.shipped.bundles import shipped_bundle


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few small frames, and no pictures that depend on what else is installed."""
    monkeypatch.setattr(demo_module, "CLIP_FRAMES", 8)
    monkeypatch.setattr(demo_module, "PICTURE_SIZE", (96, 128))
    monkeypatch.setattr(demo_module, "CLIP_SIZE", (72, 96))
    monkeypatch.setattr(demo_module, "find_spec", lambda name: None)


def show(bundle: Bundle, out: Path, say: Callable[[Row], None] = lambda row: None, *, shipped: bool = False) -> Demo:
    return demo_module.run_demo(demo_bundles(bundle.path), out, say, shipped=shipped)


def read_mask(path: Path) -> np.ndarray:
    return read_image(path)[..., 0] > 127


def by_hand(found: np.ndarray, truth: np.ndarray) -> float:
    return 2 * float(np.sum(found & truth)) / float(np.sum(found) + np.sum(truth))


def test_pictures_masks_overlays_and_clip_are_written_and_scored(toy_bundle_of_two: Bundle, tmp_path: Path) -> None:
    said: list[Row] = []
    out = tmp_path / "new" / "demo"
    demo = show(toy_bundle_of_two, out, said.append)
    assert said == demo.rows
    assert [(row.name, row.frames) for row in demo.rows] == [("fundus", 2), ("colonoscopy", 2), ("colonoscopy clip", 8)]
    assert demo.rows[0].target == "retinal vessels"
    names = [f"{modality}-{number}.png" for modality in ("fundus", "colonoscopy") for number in (1, 2)]
    for folder in ("pictures", "truth", "overlays", "masks"):
        assert sorted(path.name for path in (out / folder).iterdir()) == sorted(names)
    for modality, row in zip(("fundus", "colonoscopy"), demo.rows, strict=False):
        scores = [
            by_hand(read_mask(out / "masks" / f"{modality}-{n}.png"), read_mask(out / "truth" / f"{modality}-{n}.png"))
            for n in (1, 2)
        ]
        assert row.dice == pytest.approx(np.mean(scores))
        assert row.seconds > 0
    for name in ("clip.mp4", "clip-overlay.mp4"):
        assert len(list(open_video(out / name))) == 8
    lines = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert len(lines) == 2 + 2 + 8
    assert {line["weights"] for line in lines} == {"trained"}


def test_a_second_demo_replaces_the_first(toy_bundle: Bundle, tmp_path: Path) -> None:
    show(toy_bundle, tmp_path)
    before = (tmp_path / "masks" / "fundus-1.png").read_bytes()
    show(toy_bundle, tmp_path)
    assert (tmp_path / "masks" / "fundus-1.png").read_bytes() == before


def test_random_weights_get_no_score_and_a_notice_in_every_overlay(tmp_path: Path) -> None:
    trained = show(save_toy_bundle(tmp_path / "a.bundle"), tmp_path / "a")
    random = show(save_toy_bundle(tmp_path / "b.bundle", origin="random"), tmp_path / "b")
    assert trained.trained
    assert not random.trained
    assert {row.dice for row in random.rows} == {None}
    plain, marked = (read_image(tmp_path / name / "overlays" / "fundus-1.png") for name in ("a", "b"))
    assert np.any(plain[:20] != marked[:20])


def test_the_clip_is_of_the_first_modality_where_there_is_no_colonoscopy(toy_bundle: Bundle, tmp_path: Path) -> None:
    assert [row.name for row in show(toy_bundle, tmp_path).rows] == ["fundus", "fundus clip"]


def test_scikit_images_pictures_are_shown_where_it_is_installed(
    toy_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("skimage", reason="shows scikit-image's pictures")
    monkeypatch.undo()
    monkeypatch.setattr(demo_module, "CLIP_FRAMES", 2)
    demo = show(toy_bundle, tmp_path)
    assert [shown.path.name for shown in demo.photographs] == ["scikit-image-retina.png"]
    assert demo.photographs[0].dice is None
    assert (tmp_path / "overlays" / "scikit-image-retina.png").exists()
    assert contact_sheet(demo).shape[1] > 6 * TILE[1]


def test_the_sheet_has_a_row_a_modality_and_one_for_the_clip(toy_bundle_of_two: Bundle, tmp_path: Path) -> None:
    demo = show(toy_bundle_of_two, tmp_path)
    sheet = contact_sheet(demo)
    demo.clip = []
    without_clip = contact_sheet(demo)
    row = sheet.shape[0] - without_clip.shape[0]
    assert row > TILE[0]
    assert sheet.dtype == np.uint8
    assert sheet.shape[0] // row == 3
    # The pictures are in it: the sheet holds far more colours than paper and ink.
    assert len(np.unique(sheet.astype(np.int32) @ [1, 256, 65536])) > 1000


def test_shipped_weights_are_shown_on_photographs_and_a_clip_over_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    skimage = pytest.importorskip("skimage", reason="shows scikit-image's pictures")
    monkeypatch.undo()
    monkeypatch.setattr(demo_module, "_PAN_FRAMES", 4)
    asked: list[str] = []

    def toy(modality: str) -> Bundle:
        asked.append(modality)
        return save_toy_bundle(tmp_path / f"{modality}.bundle", (modality,))

    monkeypatch.setattr(demo_module, "shipped_bundle", toy)
    demo = demo_module.run_demo(demo_bundles(), tmp_path / "out", shipped=True)
    assert asked == ["fundus", "microscopy"]
    assert [(row.name, row.frames, row.dice) for row in demo.rows] == [
        ("scikit-image-retina", 1, None),
        ("fundus clip", 4, None),
        ("scikit-image-ihc", 1, None),
    ]
    assert demo.pictures == []
    frames = list(open_video(tmp_path / "out" / "clip.mp4"))
    photograph = read_image(Path(skimage.__file__).parent / "data" / "retina.jpg")
    side = int(photograph.shape[0] * demo_module._PAN_SHARE) // 2 * 2
    assert frames[0][0].shape == (side, side, 3)
    # The first frame is a part of the photograph, but for what the codec changes.
    first = photograph[:side, round(0.5 * (photograph.shape[1] - side)) :][:, :side]
    assert np.abs(frames[0][0].astype(int) - first.astype(int)).mean() < 8
    assert contact_sheet(demo).shape[1] > 6 * TILE[1]


def test_tiles_and_counted_objects_are_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("skimage", reason="counts objects, and has the picture")
    monkeypatch.undo()
    monkeypatch.setattr(demo_module, "_PAN_FRAMES", 2)
    bundle = save_toy_bundle(tmp_path / "cells.bundle", ("microscopy",))
    manifest = json.loads((bundle.path / "manifest.json").read_text())
    manifest |= {"scales": {"microscopy": {"largest": 300, "tile": 256}}, "threshold": 0.25}  # of dark pictures
    (bundle.path / "manifest.json").write_text(json.dumps(manifest))
    written: list[str] = []
    monkeypatch.setattr(sheet_module, "_write", lambda paper, text, *rest: written.append(text))
    demo = show(bundle, tmp_path / "out", shipped=True)
    (shown,) = demo.photographs
    line = json.loads((tmp_path / "out" / "results.jsonl").read_text().splitlines()[0])
    assert shown.objects == line["objects"] == len(line["instances"]) > 1
    assert {row.name: row.objects for row in demo.rows}["scikit-image-ihc"] == shown.objects
    assert np.array_equal(shown.drawn, read_image(tmp_path / "out" / "overlays" / "scikit-image-ihc.png"))
    contact_sheet(demo)
    (caption,) = [text for text in written if "ihc" in text]
    assert f"in {shown.tiles} tiles, {shown.objects} objects told apart" in caption
    assert shown.tiles > 1


def test_the_stain_of_the_nuclei_is_bright_where_the_tissue_is_blue() -> None:
    pytest.importorskip("skimage", reason="separates the colours")
    blue, brown, white = (190, 110, 90), (60, 110, 160), (245, 245, 245)  # BGR: haematoxylin, DAB, glass
    picture = np.full((90, 90, 3), white, np.uint8)
    picture[:, 30:60], picture[:, 60:] = blue, brown
    stain = demo_module.nuclear_stain(picture).astype(int)
    assert stain.shape == picture.shape
    assert stain[:, 30:60].min() > stain[:, 60:].max() + 50
    assert stain[:, 30:60].min() > stain[:, :30].max() + 50


def test_tissue_is_shown_as_the_network_knows_it(tmp_path: Path) -> None:
    skimage = pytest.importorskip("skimage", reason="has the picture")
    tissue = read_image(Path(skimage.__file__).parent / "data" / "ihc.png")
    assert confidences(tissue)["microscopy"] < 0.1
    assert confidences(demo_module.nuclear_stain(tissue))["microscopy"] > 0.8  # under 0.5 it is marked in the overlay


def test_an_installation_without_weights_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(modality: str) -> Bundle:
        return shipped_bundle(modality, folder=tmp_path / "absent")

    monkeypatch.setattr(demo_module, "shipped_bundle", absent)
    with pytest.raises(UserError, match="without weights"):
        demo_bundles()
    with pytest.raises(UserError, match="no bundle at"):
        demo_bundles(tmp_path / "absent")


def test_an_output_that_is_a_file_is_refused(toy_bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("not a folder")
    with pytest.raises(UserError, match="taken"):
        show(toy_bundle, tmp_path / "taken")
