"""Phantoms: repeatable to the byte, moving smoothly, with masks that a threshold cannot find."""

from __future__ import annotations

import itertools
import subprocess
import sys
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from espmedsam_edge.errors import UserError
from espmedsam_edge.metrics import dice
from espmedsam_edge.modalities import PAPER_MODALITIES
from espmedsam_edge.phantoms import SMALLEST, phantom, phantom_clip

pytestmark = pytest.mark.filterwarnings("error")

MODALITIES = (*PAPER_MODALITIES, "histopathology", "dental")


@pytest.mark.parametrize("modality", MODALITIES)
def test_a_phantom_is_an_image_and_a_binary_mask(modality: str) -> None:
    for seed in range(12):
        image, mask = phantom(modality, seed, (96, 128))
        assert image.shape == (96, 128, 3)
        assert image.dtype == mask.dtype == np.uint8
        assert set(np.unique(mask)) == {0, 255}
        assert 0.005 < (mask > 0).mean() < 0.5
        assert image.std() > 8  # not a flat picture


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(MODALITIES),
    st.integers(0, 2**63),
    st.tuples(st.integers(SMALLEST, 90), st.integers(SMALLEST, 90)),
    st.integers(0, 500),
)
def test_any_seed_size_and_frame_gives_a_target(modality: str, seed: int, size: tuple[int, int], frame: int) -> None:
    image, mask = phantom(modality, seed, size, frame)
    assert image.shape[:2] == mask.shape == size
    assert 0 < np.count_nonzero(mask) < mask.size


def test_the_bytes_repeat_in_another_process() -> None:
    code = (
        "import zlib; from espmedsam_edge.phantoms import phantom\n"
        f"for m in {MODALITIES!r}:\n"
        "    image, mask = phantom(m, 7, (64, 80), 3); print(zlib.crc32(image.tobytes() + mask.tobytes()))"
    )
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    ours = []
    for modality in reversed(MODALITIES):  # another order: nothing may leak from one call to the next
        image, mask = phantom(modality, 7, (64, 80), 3)
        ours.append(str(zlib.crc32(image.tobytes() + mask.tobytes())))
    assert other == ours[::-1]


@pytest.mark.parametrize("modality", MODALITIES)
def test_seeds_and_names_give_different_scenes(modality: str) -> None:
    assert not np.array_equal(phantom(modality, 0, (64, 64))[1], phantom(modality, 1, (64, 64))[1])
    assert not np.array_equal(phantom(modality, 0, (64, 64))[0], phantom(f"{modality}2", 0, (64, 64))[0])


@pytest.mark.parametrize("modality", MODALITIES)
def test_the_scene_does_not_depend_on_the_resolution(modality: str) -> None:
    fine, coarse = phantom(modality, 4, (256, 256))[1], phantom(modality, 4, (128, 128))[1]
    # Outlines shift by up to half a coarse pixel, and a vessel is never thinner than a pixel.
    assert dice(fine[1::2, 1::2], coarse) > (0.6 if modality == "fundus" else 0.93)


@pytest.mark.parametrize("modality", MODALITIES)
def test_a_clip_moves_smoothly_and_keeps_moving(modality: str) -> None:
    clip = list(phantom_clip(modality, 2, 20, (128, 128)))
    for image, mask in (clip[0], clip[19]):
        frame = 0 if mask is clip[0][1] else 19
        expected = phantom(modality, 2, (128, 128), frame)
        assert np.array_equal(image, expected[0])
        assert np.array_equal(mask, expected[1])
    steps = [dice(before[1], after[1]) for before, after in itertools.pairwise(clip)]
    assert min(steps) > (0.7 if modality == "fundus" else 0.9)
    assert dice(clip[0][1], clip[19][1]) < 0.999
    assert not np.array_equal(clip[0][0], clip[1][0])


@pytest.mark.parametrize("modality", PAPER_MODALITIES)
def test_no_global_threshold_finds_the_target(modality: str) -> None:
    pairs = [phantom(modality, seed, (96, 96)) for seed in range(10)]
    best = 0.0
    for level in range(10, 250, 10):
        for channel in range(3):
            found = [(image[..., channel] >= level, mask) for image, mask in pairs]
            above = np.mean([dice(prediction, mask) for prediction, mask in found])
            below = np.mean([dice(~prediction, mask) for prediction, mask in found])
            best = max(best, float(above), float(below))
    assert best < 0.85


def test_too_small_or_negative_is_refused() -> None:
    with pytest.raises(UserError, match="too small"):
        phantom("fundus", 0, (16, 64))
    with pytest.raises(UserError, match="negative"):
        phantom("fundus", -1)
