"""Tiles of a picture, and their logits joined."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from espmedsam_edge.imaging.geometry import mask_from_logits, upsample_logits
from espmedsam_edge.runtime.tiles import Tiles


@given(st.tuples(st.integers(1, 500), st.integers(1, 500)), st.integers(32, 300), st.sampled_from([16, 64, 112]))
@settings(max_examples=25, deadline=None)
def test_every_pixel_lies_in_a_tile_and_neighbours_overlap(size: tuple[int, int], tile: int, cells: int) -> None:
    tiles = Tiles(size, tile, cells)
    covered = np.zeros(size, np.uint8)
    places = list(tiles)
    assert len(places) == len(tiles)
    for place in places:
        place.check(size)
        assert (place.height, place.width) == (min(size[0], tile), min(size[1], tile))
        place.of(covered)[:] += 1
    assert covered.min() > 0
    for before, after in pairwise(places):
        if after.y == before.y:
            assert before.x + before.width - after.x >= tile / 8 - tile / cells - 1


def test_logits_that_agree_are_joined_to_themselves() -> None:
    random = np.random.default_rng(0)
    whole = random.normal(size=(75, 130)).astype(np.float32)  # one logit for each 4x4 pixels
    tiles = Tiles((300, 520), 128, 32)
    parts = [whole[place.y // 4 : place.y // 4 + 32, place.x // 4 : place.x // 4 + 32] for place in tiles]
    assert all(place.x % 4 == 0 and place.y % 4 == 0 for place in tiles)
    assert np.abs(tiles.join(parts) - whole).max() < 1e-5


def test_the_seam_between_tiles_that_differ_is_smooth_and_each_keeps_its_middle() -> None:
    tiles = Tiles((64, 112), 64, 64, overlap=0.25)
    assert [place.x for place in tiles] == [0, 48]
    joined = tiles.join([np.zeros((64, 64), np.float32), np.ones((64, 64), np.float32)])
    row = joined[32]
    assert row[:48].max() == 0
    assert row[64:].min() == pytest.approx(1)
    assert (np.diff(row) >= -1e-6).all()
    assert np.diff(row).max() < 0.25  # of the step of 1: no seam
    at, other = 50, 61  # the weights are squared sines of the distance from a tile's edge
    first, second = (np.sin(np.pi * (x + 0.5) / 64) ** 2 for x in (at, at - 48))
    assert row[at] == pytest.approx(second / (first + second), rel=1e-4)
    assert row[at] + row[48 + 63 - other] < 1


def test_a_picture_no_larger_than_a_tile_is_one_tile() -> None:
    (place,) = Tiles((40, 64), 64, 16)
    assert place == (0, 0, 64, 40)


def test_a_large_mask_is_what_the_resized_logits_give(monkeypatch: pytest.MonkeyPatch) -> None:
    """Made in bands of rows, so that no picture of numbers as large as it is held."""
    random = np.random.default_rng(1)
    logits = random.normal(size=(57, 91)).astype(np.float32)
    size = (501, 777)
    expected = upsample_logits(logits, size)
    monkeypatch.setattr("espmedsam_edge.imaging.geometry._BAND", 9000)
    mask = mask_from_logits(logits, size, 0.6)
    sure = np.abs(expected - np.log(0.6 / 0.4)) > 1e-4
    assert sure.mean() > 0.999
    assert np.array_equal(mask[sure] > 0, (expected > np.log(0.6 / 0.4))[sure])
