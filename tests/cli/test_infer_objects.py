"""Objects in what ``espmedsam-edge infer`` writes: counted, measured, drawn, cleaned up and followed."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import tifffile
from skimage.measure import label, regionprops
from toy_bundles import save_toy_bundle

from espmedsam_edge.bundle import Bundle
from espmedsam_edge.imaging.overlay import color_of
from espmedsam_edge.runtime.run import finding
from espmedsam_edge.runtime.sinks import sink

Outcome = tuple[int, str, str]
Infer = Callable[..., Outcome]

DISCS = [(30, 40, 14), (52, 40, 14), (110, 30, 12), (100, 100, 20), (20, 110, 4)]  # x, y, radius; two touch


def picture(discs: list[tuple[int, int, int]] = DISCS, size: tuple[int, int] = (128, 160)) -> Any:
    image = np.zeros((*size, 3), np.uint8)
    for x, y, radius in discs:
        cv2.circle(image, (x, y), radius, (0, 0, 255), -1)  # red is what the toy network finds
    return image


@pytest.fixture
def toy_bundle(tmp_path: Path) -> Bundle:
    """In place of the other tests' one: fine enough to see two that touch."""
    return save_toy_bundle(tmp_path / "toy.bundle", ("histopathology",), image_size=512)


@pytest.fixture
def many(tmp_path: Path) -> Path:
    """A bundle of a modality whose pictures show many objects."""
    return save_toy_bundle(tmp_path / "many.bundle", ("microscopy",), image_size=512).path


@pytest.fixture
def cells(infer: Infer) -> Path:
    assert cv2.imwrite("cells.png", picture())
    return Path("cells.png")


def lines(path: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def rows(path: str) -> list[dict[str, str]]:
    with Path(path).open(newline="") as stream:
        return list(csv.DictReader(stream))


def test_objects_are_counted_and_measured_everywhere(infer: Infer, cells: Path) -> None:
    options = ("--masks", "m", "--labels", "l", "--csv", "a.csv", "--jsonl", "r.jsonl", "--objects", "o.csv")
    code, _, err = infer(cells, "--instances", *options)
    assert (code, err) == (0, "")
    mask: Any = cv2.imread("m/cells.png", cv2.IMREAD_UNCHANGED)
    labels: Any = cv2.imread("l/cells.png", cv2.IMREAD_UNCHANGED)
    assert labels.dtype == np.uint16
    assert ((labels > 0) == (mask > 0)).all()
    (line,) = lines("r.jsonl")
    assert line["objects"] == len(line["instances"]) == labels.max() == len(DISCS)
    assert label(mask).max() == len(DISCS) - 1  # the two that touch are one part
    assert rows("a.csv")[0]["objects"] == str(len(DISCS))
    table = rows("o.csv")
    references = regionprops(labels)
    assert len(table) == len(references)
    for instance, row, reference in zip(line["instances"], table, references, strict=True):
        assert instance["id"] == int(row["id"]) == reference.label
        assert instance["area"] == int(float(row["area_px"])) == reference.area
        assert (float(row["y"]), float(row["x"])) == pytest.approx(reference.centroid, abs=0.006)
        assert instance["perimeter"] == pytest.approx(reference.perimeter, abs=1e-3)
        assert 0.5 < instance["probability"] <= 1
        assert (row["unit"], row["area"], row["gap"], row["frame"]) == ("", "", "0", "0")


def test_by_default_they_are_told_apart_where_there_are_many(infer: Infer, cells: Path, many: Path) -> None:
    assert infer(cells, "--modality", "microscopy", "--jsonl", "a.jsonl", bundle=many)[0] == 0
    assert lines("a.jsonl")[0]["objects"] == len(DISCS)
    assert infer(cells, "--modality", "microscopy", "--jsonl", "a.jsonl", "--no-instances", bundle=many)[0] == 0
    assert "objects" not in lines("a.jsonl")[0]
    assert infer(cells, "--jsonl", "a.jsonl")[0] == 0
    assert "objects" not in lines("a.jsonl")[0]
    assert infer(cells, "--labels", "l")[0] == 0  # asked for by a result: connected parts
    assert cv2.imread("l/cells.png", cv2.IMREAD_UNCHANGED).max() == len(DISCS) - 1


def test_clean_up_changes_every_result_alike(infer: Infer, cells: Path) -> None:
    assert infer(cells, "--masks", "m", "--jsonl", "a.jsonl")[0] == 0
    whole = cv2.imread("m/cells.png", cv2.IMREAD_UNCHANGED)
    parts = regionprops(label(whole))
    for options, expected in (
        (("--min-area", "200"), [part for part in parts if part.area >= 200]),
        (("--largest", "1"), sorted(parts, key=lambda part: -part.area)[:1]),
        (("--min-area", "200", "--largest", "2"), sorted(parts, key=lambda part: -part.area)[:2]),
        (("--min-area", "1000000"), []),
    ):
        wanted = ("--masks", "m", "--jsonl", "a.jsonl", "--out", "o.png", "--overwrite")
        code, _, err = infer(cells, *options, *wanted)
        assert (code, err) == (0, "")
        mask: Any = cv2.imread("m/cells.png", cv2.IMREAD_UNCHANGED)
        kept = np.zeros_like(mask)
        for part in expected:
            kept[tuple(part.coords.T)] = 255
        assert (mask == kept).all()
        (line,) = lines("a.jsonl")
        assert line["area"] == sum(part.area for part in expected)
        assert (line["bounding_box"] is None) == (not expected)
        overlay: Any = cv2.imread("o.png")
        changed = (overlay != picture()).any(axis=2)
        assert not (changed & (mask == 0)).any()
    for options in (("--min-area", "0"), ("--largest", "0"), ("--min-area", "-3")):
        code, _, err = infer(cells, *options)
        assert (code, err.count("\n")) == (2, 1)


def test_overlays_show_where_objects_touch_and_how_many_there_are(infer: Infer, cells: Path) -> None:
    assert infer(cells, "--out", "plain.png", "--labels", "l", "--no-instances")[0] == 0
    assert infer(cells, "--out", "told.png", "--instances", "--labels", "l")[0] == 0
    labels: Any = cv2.imread("l/cells.png", cv2.IMREAD_UNCHANGED)
    plain, told = (cv2.imread(name).astype(int) for name in ("plain.png", "told.png"))
    beside = (labels[:, 1:] != labels[:, :-1]) & (labels[:, 1:] > 0) & (labels[:, :-1] > 0)
    assert beside.any()
    assert (told[:, 1:][beside] == color_of("histopathology")).all()
    assert (plain[:, 1:][beside] != color_of("histopathology")).any(axis=1).mean() > 0.8
    strip = told[:12, :40]
    assert (strip > 200).all(axis=2).any()  # white letters


def test_a_mask_of_specks_is_counted_and_says_why_no_more(
    infer: Infer, cells: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(finding, "MOST", 3)
    monkeypatch.setattr("espmedsam_edge.objects.measures.MOST", 3)
    cv2.imwrite("again.png", picture())
    code, _, err = infer(cells, "again.png", "--instances", "--jsonl", "a.jsonl", "--objects", "o.csv", "--labels", "l")
    assert code == 0
    for line, name in zip(err.splitlines(), ("cells.png", "again.png"), strict=True):
        assert line.startswith(f"{name}: of 5 objects only the number is given, over 3 none is measured")
    assert [(line["objects"], "instances" in line) for line in lines("a.jsonl")] == [(5, False)] * 2
    assert rows("o.csv") == []
    assert cv2.imread("l/cells.png", cv2.IMREAD_UNCHANGED).max() == 5


def test_numbers_over_16_bits_are_a_tiff(infer: Infer, cells: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def many(self: Any) -> Any:
        return self.labels.astype(np.uint32) + (self.labels > 0) * np.uint32(70_000)

    monkeypatch.setattr("espmedsam_edge.objects.instance.Instances.label_map", property(many))
    assert infer(cells, "--instances", "--labels", "l")[0] == 0
    labels = tifffile.imread("l/cells.tif")
    assert (labels.dtype, labels.max(), labels.shape) == (np.uint32, 70_005, (128, 160))
    assert not Path("l/cells.png").exists()
    assert infer(cells, "--instances", "--labels", "l")[0] == 0  # ours, so it is replaced
    Path("l/cells.tif").write_bytes(b"mine")
    code, _, err = infer(cells, "--instances", "--labels", "l")
    assert (code, "l/cells.tif" in err) == (1, True)
    assert Path("l/cells.tif").read_bytes() == b"mine"
    assert sink.LabelMaps.__doc__ is not None


def test_what_is_missing_is_named_once(infer: Infer, cells: Path, monkeypatch: pytest.MonkeyPatch, many: Path) -> None:
    monkeypatch.setattr(finding, "why_missing", lambda module, extra: f"{module} is not installed. Install it: {extra}")
    code, _, err = infer(cells, "--instances")
    assert (code, err.count("\n"), "skimage is not installed. Install it: objects" in err) == (2, 1, True)
    cv2.imwrite("again.png", picture())
    options = ("--modality", "microscopy", "--jsonl", "a.jsonl")
    code, _, err = infer(cells, "again.png", *options, bundle=many)
    assert (code, err.count("skimage is not installed")) == (
        0,
        1,
    )  # also that what the bundle takes for microscopy may look otherwise
    assert "objects" not in lines("a.jsonl")[0]


def clip(name: str, frames: int, *, gone: range = range(0)) -> None:
    """Two discs that cross a dark field; the second is gone for a while."""
    writer = cv2.VideoWriter(name, cv2.VideoWriter.fourcc(*"MJPG"), 10, (160, 128))
    assert writer.isOpened()
    for number in range(frames):
        found = [(24 + 3 * number, 34, 14)]
        found += [] if number in gone else [(130 - 3 * number, 94, 18)]
        writer.write(picture(found))
    writer.release()


def test_objects_of_a_video_keep_their_numbers(infer: Infer) -> None:
    clip("clip.avi", 24, gone=range(8, 12))
    code, _, err = infer("clip.avi", "--track", "--objects", "o.csv", "--jsonl", "r.jsonl", "--labels", "l")
    assert (code, err) == (0, "")
    table = rows("o.csv")
    assert {row["id"] for row in table} == {"1", "2"}
    for row in table:
        wanted = 34 if row["id"] == "1" else 94
        assert float(row["y"]) == pytest.approx(wanted, abs=2)
    assert [row["gap"] for row in table if row["gap"] != "0"] == ["4"]
    assert [line["objects"] for line in lines("r.jsonl")] == [2] * 8 + [1] * 4 + [2] * 12
    for number in (0, 9, 23):
        labels: Any = cv2.imread(f"l/clip/{number:06d}.png", cv2.IMREAD_UNCHANGED)
        assert set(np.unique(labels)) == ({0, 1} if number == 9 else {0, 1, 2})
    assert infer("clip.avi", "--objects", "-")[1].count("\n") == 1 + len(table)


def test_pictures_are_not_followed(infer: Infer, cells: Path) -> None:
    code, _, err = infer(cells, "--track")
    assert (code, err.count("\n"), "--track" in err) == (2, 1, True)
