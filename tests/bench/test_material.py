"""The bench's frames come from whatever the user names, timed, and overlays go where such frames would go."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import cv2
import numpy as np
import pytest

from espmedsam_edge.bench import material as bench_material
from espmedsam_edge.bench.material import read_material, time_encoding
from espmedsam_edge.bundle import Bundle
from espmedsam_edge.errors import UserError
from espmedsam_edge.runtime.segmenter import Segmenter
from espmedsam_edge.runtime.video.writing import open_writer


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    path = tmp_path / "clip.mp4"
    writer = open_writer(path, (48, 64), Fraction(25))
    rng = np.random.default_rng(2)
    for index in range(40):
        writer.write(rng.integers(0, 256, (48, 64, 3), np.uint8), index / 25)
    writer.finish()
    return path


def test_frames_of_a_video_are_limited_in_number_and_timed(clip: Path) -> None:
    material = read_material(str(clip), "fundus")
    assert len(material.frames) == len(material.decode) == bench_material.MAX_FRAMES == 32
    assert material.moving
    assert material.description == "32 frames of clip.mp4, 64 x 48"
    assert min(material.decode) > 0


def test_frames_are_limited_in_memory(clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_material, "MAX_BYTES", 5 * 48 * 64 * 3)
    assert len(read_material(str(clip), "fundus").frames) == 5


def test_a_folder_of_pictures_is_read_and_a_broken_one_passed_over(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    for name in ("a", "b"):
        cv2.imwrite(str(tmp_path / f"{name}.png"), rng.integers(0, 256, (40, 50, 3), np.uint8))
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    material = read_material(str(tmp_path), "fundus")
    assert len(material.frames) == 2
    assert not material.moving


def test_nothing_to_read_says_why(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no images"):
        read_material(str(tmp_path), "fundus")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    with pytest.raises(UserError, match=r"broken\.png"):
        read_material(str(tmp_path), "fundus")


def test_without_a_source_a_clip_is_generated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_material, "GENERATED_SIZE", (90, 160))
    material = read_material(None, "ultrasound")
    assert material.description == "4 frames of a generated ultrasound clip, 160 x 90"
    assert material.moving
    assert len({frame.tobytes() for frame in material.frames}) == 4


def test_overlays_are_timed_as_video_or_as_pictures(clip: Path, tmp_path: Path, toy_bundle: Bundle) -> None:
    cv2.imwrite(str(tmp_path / "one.png"), np.random.default_rng(4).integers(0, 256, (40, 50, 3), np.uint8))
    with Segmenter.load(toy_bundle) as segmenter:
        moving = time_encoding(read_material(str(clip), "fundus"), segmenter)
        still = time_encoding(read_material(str(tmp_path / "one.png"), "fundus"), segmenter)
    assert (len(moving.encode), len(still.encode)) == (32, 1)
    assert min(*moving.encode, *still.encode) > 0
    assert "video by" in moving.encoder
    assert still.encoder == "PNG files"
