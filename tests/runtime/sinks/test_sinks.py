"""Results written are complete under their name or absent."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from video_files import clip_frame

from espmedsam_edge.imaging.overlay import OverlayStyle, draw_overlay
from espmedsam_edge.runtime.segmentation import Segmentation, Timings
from espmedsam_edge.runtime.sinks import sink as sinks
from espmedsam_edge.runtime.sinks.sink import MaskImages, OverlayImages, Paced
from espmedsam_edge.runtime.sources.source import SourceFrame

STYLE = OverlayStyle((0, 255, 255))


def result_for(image: np.ndarray) -> Segmentation:
    mask = np.zeros(image.shape[:2], np.uint8)
    mask[5:15, 10:30] = 255
    return Segmentation(mask, "fundus", np.zeros((16, 16), np.float32), 0.5, Timings(0.001, 0.002, 0.003))


def test_overlay_images_show_the_mask(tmp_path: Path) -> None:
    image = clip_frame(2)
    with OverlayImages({Path("a.jpg"): tmp_path / "o" / "a.png"}, STYLE) as sink:
        sink.write(SourceFrame(image, Path("a.jpg")), result_for(image))
    written = cv2.imread(str(tmp_path / "o" / "a.png"))
    np.testing.assert_array_equal(written, draw_overlay(image, result_for(image).mask, STYLE))


def test_a_style_that_viewers_change_is_that_of_the_next_picture(tmp_path: Path) -> None:
    image, style = clip_frame(2), STYLE
    sink = OverlayImages({Path(name): tmp_path / name for name in ("a.png", "b.png")}, lambda modality: style)
    sink.write(SourceFrame(image, Path("a.png")), result_for(image))
    style = replace(STYLE, opacity=1.0)
    sink.write(SourceFrame(image, Path("b.png")), result_for(image))
    for name, drawn_in in (("a.png", STYLE), ("b.png", style)):
        expected = draw_overlay(image, result_for(image).mask, drawn_in)
        np.testing.assert_array_equal(cv2.imread(str(tmp_path / name)), expected)


def test_masks_are_grey_pngs(tmp_path: Path) -> None:
    image = clip_frame(0)
    with MaskImages({Path("a.jpg"): tmp_path / "a.png"}) as sink:
        sink.write(SourceFrame(image, Path("a.jpg")), result_for(image))
    with MaskImages({Path("c.mp4"): tmp_path / "c"}, numbered=True) as sink:
        for number in (0, 1, 12):
            sink.write(SourceFrame(image, Path("c.mp4"), number, 0.0), result_for(image))
    for file in (tmp_path / "a.png", tmp_path / "c" / "000012.png"):
        np.testing.assert_array_equal(cv2.imread(str(file), cv2.IMREAD_UNCHANGED), result_for(image).mask)
    assert sorted(os.listdir(tmp_path / "c")) == ["000000.png", "000001.png", "000012.png"]


def test_a_paced_video_goes_at_its_own_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    now, slept, image = [100.0], list[float](), clip_frame(0)

    def sleep(seconds: float) -> None:
        slept.append(round(seconds, 3))
        now[0] += seconds

    monkeypatch.setattr(sinks.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(sinks.time, "sleep", sleep)
    sink = Paced()
    for index in (0, 1, 2, 5, 200):
        sink.write(SourceFrame(image, Path("c.mp4"), index, index / 25), result_for(image))
        now[0] += 0.01  # segmenting and showing it
    now[0] += 60  # a pause
    for index in (201, 202):
        sink.write(SourceFrame(image, Path("c.mp4"), index, index / 25), result_for(image))
    assert slept == [0, 0.03, 0.03, 0.11, 0.99, 0, 0.04]
