"""The frames that the benchmark makes, and where ``auto`` finds the picture in them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import cv2
import numpy as np

from espmedsam_edge.imaging.crop import Crop, find_picture


def test_the_picture_is_found_where_it_was_put(load_script: Callable[[str], ModuleType], data_root: Path) -> None:
    script = load_script("benchmarks/capture_frame.py")
    put = Crop(*script.PLACE, script.SHOWN[1], script.SHOWN[0])
    paths = sorted((data_root / "colonoscopy/cvc_clinicdb/images").iterdir())[:24]
    for number, path in enumerate(paths):
        picture = cv2.imread(str(path))
        frame = script.captured(picture, number)
        assert frame.shape == (1080, 1920, 3)
        found = find_picture([frame])
        assert found is not None
        assert found.x >= put.x - 20  # no text
        lit = cv2.boundingRect((put.of(frame).max(axis=2) > 60).astype(np.uint8))
        assert found.x <= put.x + lit[0] + 20
        assert found.x + found.width >= put.x + lit[0] + lit[2] - 20
        assert found.y <= put.y + lit[1] + 20
        assert found.y + found.height >= put.y + lit[1] + lit[3] - 20
