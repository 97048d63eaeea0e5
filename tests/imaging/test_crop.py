"""Which part of a frame is segmented: what is written, and the picture that is found inside borders and panels."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest

from espmedsam_edge.errors import UserError
from espmedsam_edge.imaging.crop import Crop, PictureFinder, find_picture, parse_crop

SIZE = (480, 854)


def texture(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Something like tissue: smooth, bright enough, with a camera's noise."""
    coarse = rng.integers(60, 220, (6, 8, 3)).astype(np.uint8)
    smooth = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC).astype(np.int16)
    return np.clip(smooth + rng.normal(0, 3, smooth.shape), 30, 255).astype(np.uint8)


def capture(
    rng: np.random.Generator, crop: Crop, panel: tuple[int, int, int] = (0, 0, 0), noise: float = 2.0
) -> np.ndarray:
    """A frame of a capture card: a picture on black, beside it a panel with lines of text."""
    height, width = SIZE
    frame = np.zeros((height, width, 3), np.uint8)
    frame[:, : crop.x - 20] = panel
    for line in range(9):
        text = "".join(chr(rng.integers(65, 91)) for _ in range(9))
        cv2.putText(frame, text, (8, 40 + 44 * line), cv2.FONT_HERSHEY_SIMPLEX, 0.7, (240, 240, 240), 2)
    frame = np.clip(frame + np.abs(rng.normal(0, noise, frame.shape)), 0, 255).astype(np.uint8)
    crop.of(frame)[:] = texture(rng, crop.height, crop.width)
    return frame


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("panel", [(0, 0, 0), (90, 40, 20), (70, 70, 70)])
def test_the_picture_is_found_beside_a_panel_of_text(seed: int, panel: tuple[int, int, int]) -> None:
    rng = np.random.default_rng(seed)
    crop = Crop(230 + int(rng.integers(60)), 20 + int(rng.integers(30)), 480, 400)
    found = find_picture([capture(rng, crop, panel, 2.0 if panel == (0, 0, 0) else 0.5)])
    assert found is not None
    assert np.abs(np.subtract(found, crop)).max() <= 3


def test_an_octagon_and_a_fan_are_kept_whole() -> None:
    rng = np.random.default_rng(1)
    crop = Crop(200, 30, 440, 420)
    for off, corners in (
        (3, [(90, 0), (350, 0), (439, 90), (439, 330), (350, 419), (90, 419), (0, 330), (0, 90)]),
        (16, [(180, 0), (260, 0), (439, 330), (340, 419), (100, 419), (0, 330)]),  # tips thinner than 2 cells of 8
    ):
        inside = np.zeros(SIZE, np.uint8)
        cv2.fillPoly(inside, [np.add(corners, (crop.x, crop.y))], 1)
        frame = capture(rng, crop) * inside[..., None]
        found = find_picture([frame])
        assert found is not None
        x, y, width, height = cv2.boundingRect(inside)
        assert 0 <= found.x - x <= off
        assert 0 <= found.y - y <= off
        assert 0 <= x + width - found.x - found.width <= off
        assert 0 <= y + height - found.y - found.height <= off


@pytest.mark.parametrize("size", [(48, 64), (480, 640), (1, 1), (2, 300)])
def test_nothing_is_cut_where_there_is_nothing_to_cut(size: tuple[int, int]) -> None:
    rng = np.random.default_rng(2)
    assert find_picture([texture(rng, *size)]) is None
    assert find_picture([np.zeros((*size, 3), np.uint8)]) is None
    assert find_picture([np.full((*size, 3), 255, np.uint8)]) is None
    scattered = np.zeros((*size, 3), np.uint8)  # nuclei on black are no picture of their own
    for _ in range(40):
        cv2.circle(scattered, (int(rng.integers(size[1])), int(rng.integers(size[0]))), size[0] // 40, (0, 200, 90), -1)
    assert find_picture([scattered]) is None


def test_several_frames_give_what_one_that_is_dark_on_a_side_does_not() -> None:
    rng = np.random.default_rng(3)
    crop = Crop(260, 40, 480, 400)
    bright, dark = capture(rng, crop), capture(rng, crop)
    dark[:, 500:] = 0
    alone, together = find_picture([dark]), find_picture([dark, bright])
    assert alone is not None
    assert alone.width < 260
    assert together is not None
    assert np.abs(np.subtract(together, crop)).max() <= 3
    finder = PictureFinder()
    assert finder.found() is None
    finder.add(dark)
    finder.add(bright)
    assert finder.found() == together


def test_real_endoscopes_and_dermatoscopes(data_root: Path) -> None:
    for path in sorted((data_root / "colonoscopy/cvc_clinicdb/images").iterdir())[:20]:
        picture = cv2.imread(str(path))
        found = find_picture([picture])  # 384x288 with black at the sides
        assert found is not None
        assert 0.68 < found.width * found.height / picture[..., 0].size < 0.85
        assert find_picture([found.of(picture)]) in (None, Crop(0, 0, found.width, found.height))
    for path in sorted((data_root / "dermoscopy/ph2/images").iterdir())[:20]:
        assert find_picture([cv2.imread(str(path))]) is None


@pytest.mark.parametrize(
    "text",
    ["", "1,2,3", "1,2,3,4,5", "1,2,3,x", "-1,2,3,4", "1.5,2,3,4", "1;2;3;4", "0,0,0,5", "0,0,5,0", "1,2,3,", "autom"],
)  # fmt: skip
def test_what_is_no_crop_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_crop(text)
    assert "\n" not in str(caught.value)
    assert "X,Y,WIDTH,HEIGHT" in str(caught.value) or "at least 1" in str(caught.value)


def test_what_is_written() -> None:
    assert parse_crop("auto") is None
    assert parse_crop("Auto ") is None
    assert parse_crop("1, 2,3,4") == (1, 2, 3, 4)
    crop = Crop(1, 2, 3, 4)
    assert parse_crop(str(crop)) == crop
    frame = np.arange(60).reshape(6, 10)
    np.testing.assert_array_equal(crop.of(frame), frame[2:6, 1:4])
    assert np.shares_memory(crop.of(frame), frame)
    crop.check((6, 4))
    for size in ((5, 4), (6, 3)):
        with pytest.raises(UserError, match="not inside"):
            crop.check(size)
