"""Objects that are followed keep their number: through motion, contact, gaps and crowds, and in flat memory."""

from __future__ import annotations

import json
import math
import pickle
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from espmedsam_edge.imaging.masks import read_mask
from espmedsam_edge.objects.instance import Instances
from espmedsam_edge.objects.measures import find_instances, instances_of
from espmedsam_edge.objects.separation import Labels, in_order
from espmedsam_edge.objects.tracking import PATIENCE, Tracker

Disc = tuple[float, float, float]


def drawing(places: Sequence[Disc], size: int) -> Labels:
    """Discs of (x, y, radius), numbered as they are given; the first ones hide others."""
    y, x = np.mgrid[:size, :size]
    labels = np.zeros((size, size), np.int32)
    for number, (across, down, radius) in reversed(list(enumerate(places, 1))):
        labels[np.hypot(x - across, y - down) <= radius] = number
    return labels


def discs(places: Sequence[Disc], size: int = 120) -> Instances:
    """The objects of a frame with discs."""
    return instances_of(in_order(drawing(places, size)))


def ids(found: Instances) -> list[int]:
    return [one.id for one in found.measured]


def test_numbers_stay_though_the_order_of_objects_changes() -> None:
    tracker = Tracker()
    for step in range(40):
        places = [(20 + 2 * step, 20, 9), (100 - 2 * step, 60, 7), (60, 110 - step / 2, 5)]
        order = [0, 1, 2] if step % 2 == 0 else [2, 0, 1]
        found = tracker.followed(discs([places[index] for index in order]))
        assert ids(found) == [1, 2, 3]
        for one, (x, y, radius) in zip(found.measured, places, strict=True):
            label = found.labels[round(y), round(x)]
            assert label == one.id
            assert one.area == int((found.labels == one.id).sum()) == pytest.approx(math.pi * radius**2, rel=0.15)


def test_an_object_that_is_back_has_its_number_and_says_how_long_it_was_gone() -> None:
    tracker = Tracker()
    one, other = (30, 30, 10), (80, 80, 12)
    assert ids(tracker.followed(discs([one, other]))) == [1, 2]
    for _ in range(PATIENCE):
        assert ids(tracker.followed(discs([other]))) == [2]
    found = tracker.followed(discs([(33, 31, 10), other]))
    assert [(each.id, each.gap) for each in found.measured] == [(1, PATIENCE), (2, 0)]
    for _ in range(PATIENCE + 1):
        tracker.followed(discs([other]))
    assert ids(tracker.followed(discs([other, one]))) == [2, 3]  # too long ago: it is a new one


def test_a_jump_is_followed_and_a_speck_beside_it_takes_no_number_away() -> None:
    tracker = Tracker()
    tracker.followed(discs([(30, 30, 12)]))
    found = tracker.followed(discs([(32, 48, 0.5), (50, 50, 13)]))  # no overlap; the speck is nearer
    assert [(one.id, one.area > 100) for one in found.measured] == [(1, True), (2, False)]


@pytest.mark.parametrize("speed", [0.3, 0.6])
def test_few_numbers_are_lost_in_a_crowd(speed: float) -> None:
    """Discs of 14 to 22 pixels wander in and out of a frame that they fill to a quarter, behind each other too."""
    rng = np.random.default_rng(5)
    count, size = 40, 200
    radii = rng.uniform(7, 11, count)
    places, ways = rng.uniform(-60, size + 60, (count, 2)), rng.normal(0, 1, (count, 2))
    tracker, last = Tracker(), dict[int, tuple[int, int]]()
    kept = lost = 0
    for frame in range(30):
        ways += rng.normal(0, 0.5, (count, 2))
        places += speed * 9 * ways / np.linalg.norm(ways, axis=1, keepdims=True)
        drawn = drawing([(x, y, radius) for (x, y), radius in zip(places.tolist(), radii.tolist(), strict=True)], size)
        present = np.unique(drawn)[1:]
        found = tracker.followed(instances_of(in_order(drawn.copy())))
        for disc in present.tolist():
            number = int(found.labels[drawn == disc][0])
            if disc in last and last[disc][1] == frame - 1:
                kept, lost = kept + (last[disc][0] == number), lost + (last[disc][0] != number)
            last[disc] = (number, frame)
    assert kept + lost > 300
    assert lost <= 0.01 * kept


def test_ten_thousand_frames_are_followed_in_flat_memory() -> None:
    rng = np.random.default_rng(2)
    frames = [discs([(*rng.uniform(0, 40, 2), 3) for _ in range(rng.integers(0, 4))], 40) for _ in range(50)]
    tracker, held = Tracker(), []
    for number in range(10_000):
        found = tracker.followed(frames[rng.integers(50)])
        if number % 100 == 99:
            held.append(len(pickle.dumps(tracker)))
    assert found.labels.max() > 300  # objects came and went
    assert max(held[50:]) <= 1.2 * max(held[:50]), held


def test_a_frame_of_another_size_begins_anew() -> None:
    tracker = Tracker()
    assert ids(tracker.followed(discs([(30, 30, 10)]))) == [1]
    assert ids(tracker.followed(discs([(30, 30, 10)], 100))) == [2]
    assert tracker.followed(find_instances(np.zeros((100, 100), np.uint8), split=False)).count == 0


@pytest.mark.data
def test_the_one_polyp_of_a_clip_is_one_object(data_root: Path) -> None:
    clips = json.loads((data_root / "video" / "clinicdb_sequences.json").read_text())
    assert len(clips) == 3
    for clip in clips.values():
        tracker = Tracker()
        for name in clip["frame_ids"]:
            mask: NDArray[np.uint8] = read_mask(data_root / clip["masks"].replace("<id>", name)).mask
            found = tracker.followed(find_instances(mask, split=False))
            assert max(found.measured, key=lambda one: one.area).id == 1
