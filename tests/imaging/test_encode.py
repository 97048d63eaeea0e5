"""Pictures written are the pictures read back."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest

from espmedsam_edge.errors import UserError
from espmedsam_edge.imaging.encode import encode_image, write_image


@pytest.mark.parametrize("shape", [(31, 47), (31, 47, 3)])
def test_png_is_lossless(tmp_path: Path, shape: tuple[int, ...]) -> None:
    picture = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    write_image(tmp_path / "a.png", picture)
    np.testing.assert_array_equal(cv2.imread(str(tmp_path / "a.png"), cv2.IMREAD_UNCHANGED), picture)


def test_jpeg_by_suffix(tmp_path: Path) -> None:
    write_image(tmp_path / "a.JPG", np.full((16, 16, 3), 90, np.uint8))
    assert (tmp_path / "a.JPG").read_bytes().startswith(b"\xff\xd8\xff")


def test_other_suffixes_are_refused() -> None:
    with pytest.raises(UserError, match=r"cannot write '\.gif' images"):
        encode_image(np.zeros((8, 8), np.uint8), ".gif")


def test_a_picture_too_large_for_the_format_is_one_line() -> None:
    with pytest.raises(UserError, match="cannot write a 70000x1 image"):
        encode_image(np.zeros((1, 70_000, 3), np.uint8), ".jpg")
