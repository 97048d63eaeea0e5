"""Masks on disk: what numpy packs at once, and each mask again, whatever their size."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from espmedsam_edge.runtime.dicom.packed_masks import PackedMasks


@pytest.mark.parametrize("size", [(8, 8), (3, 5), (37, 51), (1, 1)])
@pytest.mark.parametrize("count", [1, 2, 9])
def test_masks_follow_each_other_bit_by_bit(tmp_path: Path, size: tuple[int, int], count: int) -> None:
    masks = np.random.default_rng(0).random((count, *size)) < 0.4
    with PackedMasks(size, tmp_path) as packed:
        for mask in masks:
            packed.append(mask.astype(np.uint8) * 255)
        stored = packed.stored().read()
        for index in reversed(range(count)):
            np.testing.assert_array_equal(packed.frame(index), masks[index])
    whole = np.packbits(masks, bitorder="little").tobytes()
    assert stored == whole + b"\0" * (len(whole) % 2)
    assert packed.count == count
    assert os.listdir(tmp_path) == []
