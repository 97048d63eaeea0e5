"""Objects of a mask: taken apart where they touch, and measured as scikit-image and brute force measure them."""

from __future__ import annotations

import math

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.spatial.distance import pdist
from skimage.draw import ellipse
from skimage.measure import label, regionprops
from skimage.morphology import reconstruction

from espmedsam_edge.objects import measures, separation
from espmedsam_edge.objects.instance import Instance
from espmedsam_edge.objects.measures import find_instances, measure
from espmedsam_edge.objects.separation import Labels, separated

_TURNS = 900
SPACINGS = [(1.0, 1.0), (0.25, 0.25), (0.4, 0.15), (0.02, 0.05)]


def scattered(seed: int, size: int = 110, count: int = 10) -> NDArray[np.uint8]:
    """Ellipses of any size and turn, overlapping or not, some cut by the border, and single pixels."""
    rng = np.random.default_rng(seed)
    mask = np.zeros((size, size + 30), np.uint8)
    for _ in range(count):
        rows, columns = ellipse(
            *rng.uniform(0, size, 2), *rng.uniform(1, 14, 2), shape=mask.shape, rotation=rng.uniform(0, math.pi)
        )
        mask[rows, columns] = 255
    for _ in range(count):
        mask[rng.integers(size), rng.integers(size)] ^= 255
    return mask


def brute_force(coordinates: NDArray[np.int64], spacing: tuple[float, float]) -> tuple[float, float]:
    """Longest and shortest extent over many directions of the middles of all of an object's pixels' sides."""
    points = np.concatenate([coordinates + half for half in ([0.5, 0], [-0.5, 0], [0, 0.5], [0, -0.5])]) * spacing
    turns = np.linspace(0, math.pi, _TURNS, endpoint=False)
    extents = np.ptp(points @ np.stack([np.sin(turns), np.cos(turns)]), axis=0)
    return float(pdist(points).max()), float(extents.min())


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("spacing", SPACINGS)
def test_measures_are_those_of_regionprops_and_diameters_those_of_brute_force(
    seed: int, spacing: tuple[float, float]
) -> None:
    mask = scattered(seed)
    rng = np.random.default_rng(seed)
    probability = rng.random(mask.shape, np.float32)
    labels = separated(mask, split=seed % 2 == 0)
    found = measure(labels, probability, spacing)
    expected = regionprops(labels, probability, spacing=spacing)
    plain = regionprops(labels)
    assert len(found) == len(expected) > 7
    for one, reference, pixels in zip(found, expected, plain, strict=True):
        assert one.physical is not None
        top, left, bottom, right = reference.bbox
        assert (one.id, one.box) == (reference.label, (left, top, right - left, bottom - top))
        assert one.area == pixels.area
        assert one.centroid == pytest.approx((pixels.centroid[1], pixels.centroid[0]))
        assert one.pixels.equivalent_diameter == pytest.approx(pixels.equivalent_diameter_area)
        assert one.pixels.perimeter == pytest.approx(pixels.perimeter)
        assert one.probability == pytest.approx(reference.intensity_mean, rel=1e-5)
        assert one.physical.area == pytest.approx(reference.area)
        assert one.physical.equivalent_diameter == pytest.approx(reference.equivalent_diameter_area)
        # regionprops rounds differently where the small axis is next to nothing
        assert one.eccentricity == pytest.approx(reference.eccentricity, abs=1e-6)
        for size, steps in ((one.pixels, (1.0, 1.0)), (one.physical, spacing)):
            longest, shortest = brute_force(pixels.coords, steps)
            assert size.longest == pytest.approx(longest)
            assert size.shortest - 1e-9 <= shortest <= size.shortest + longest * math.pi / _TURNS
        # its hull is drawn in pixels before it is measured, which may add to it
        assert -1e-9 <= pixels.feret_diameter_max - one.pixels.longest <= 1.5
        if spacing[0] == spacing[1]:
            assert one.physical.perimeter == pytest.approx(reference.perimeter)


@pytest.mark.parametrize("ratio", [2.0, 0.5, 1.3, 3.7])
def test_sizes_between_pixels_that_are_not_square_are_those_of_the_true_shape(ratio: float) -> None:
    true = np.zeros((400, 400), np.uint8)
    true[ellipse(200, 200, 130, 60, rotation=0.5)] = 255
    seen = np.zeros((math.ceil(400 / ratio), 400), np.uint8)
    rows, columns = np.mgrid[: seen.shape[0], :400]
    seen[:] = true[np.clip(np.rint((rows + 0.5) * ratio - 0.5), 0, 399).astype(int), columns]
    (square,), (flat,) = measure(label(true).astype(np.int32)), measure(label(seen).astype(np.int32), None, (ratio, 1))
    assert flat.physical is not None
    for name in ("area", "longest", "shortest"):
        assert getattr(flat.physical, name) == pytest.approx(getattr(square.pixels, name), rel=0.02), name
    assert flat.physical.perimeter is None  # scikit-image has none for such pixels either
    assert flat.eccentricity == pytest.approx(square.eccentricity, abs=0.01)


def test_an_empty_mask_has_no_objects_and_a_full_one_has_one() -> None:
    nothing = find_instances(np.zeros((7, 9), np.uint8))
    assert (nothing.count, nothing.measured) == (0, ())
    everything = find_instances(np.full((7, 9), 255, np.uint8))
    assert [one.area for one in everything.measured] == [63]
    assert find_instances(np.full((1, 1), 255, np.uint8)).count == 1
    for size in ((0, 0), (0, 9), (1, 1), (1, 30), (30, 1)):
        assert find_instances(np.zeros(size, np.uint8)).measured == ()


def test_two_that_touch_are_two_and_a_long_one_is_one() -> None:
    mask = np.zeros((80, 220), np.uint8)
    mask[ellipse(40, 40, 20, 20)] = mask[ellipse(40, 72, 20, 20)] = 255  # a fifth of a diameter in common
    mask[ellipse(40, 160, 10, 45)] = 255
    found = find_instances(mask)
    assert found.count == 3
    assert (found.labels > 0).tolist() == (mask > 0).tolist()
    assert found.measured[0].area == pytest.approx(found.measured[1].area, rel=0.05)
    assert find_instances(mask, split=False).count == 2


def test_every_pixel_has_a_number_whatever_the_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    """All masks of 3 by 3, apart and at a picture's border, and noise; lines of one pixel stay whole."""
    bits = (np.arange(512)[:, None] >> np.arange(9) & 1).astype(np.uint8).reshape(-1, 3, 3) * np.uint8(255)
    tiled = np.pad(bits, ((0, 0), (1, 1), (1, 1))).reshape(16, 32, 5, 5).swapaxes(1, 2).reshape(80, 160)
    noise = [(np.random.default_rng(seed).random((61, 47)) < 0.2 + 0.2 * seed) * np.uint8(255) for seed in range(4)]
    for fine in (separation.FINE, 0):
        monkeypatch.setattr(separation, "FINE", fine)
        for mask in (*bits, tiled, *noise):
            assert ((separated(mask) > 0) == (mask > 0)).all()
        for line in (np.eye(9), np.eye(9)[::-1], np.ones((1, 9)), np.ones((9, 1))):
            assert separated(np.pad(line.astype(np.uint8) * np.uint8(255), 2)).max() == 1


def test_a_part_is_cut_the_same_whatever_is_around_it() -> None:
    """Also where others are so near that a blur would reach them; and at a picture's edge."""
    mask = scattered(3, 300, 150)
    mask = np.asarray(np.where(np.random.default_rng(0).random(mask.shape) < 0.01, 255 - mask, mask), np.uint8)
    found, parts = separated(mask), separated(mask, split=False)
    assert parts.max() < found.max() < 3 * parts.max()
    elsewhere = 0
    for number in range(1, parts.max() + 1):
        alone = separated(np.where(parts == number, np.uint8(255), np.uint8(0)))
        both = np.zeros((alone.max() + 1, found.max() + 1), np.int64)
        np.add.at(both, (alone[alone > 0], found[alone > 0]), 1)
        assert np.count_nonzero(both.any(axis=0)) == alone.max()
        elsewhere += both.sum() - both.max(axis=1).sum()
    assert elsewhere < 1e-3 * np.count_nonzero(mask)  # pixels of a seam that are as far from the one as from the other


def test_specks_have_no_neck(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every connected shape of so few pixels; one more pixel, and some have."""
    bits = (np.arange(1 << 16)[:, None] >> np.arange(16) & 1).astype(np.uint8).reshape(-1, 4, 4)
    monkeypatch.setattr(separation, "SPECK", 0)
    for most in (3, 4):
        shapes = [one for one in bits[bits.sum(axis=(1, 2)) <= most] if cv2.connectedComponents(one)[0] == 2]
        sheet = np.hstack([np.pad(one * np.uint8(255), 4) for one in shapes])
        assert (separated(sheet).max() > len(shapes)) == (most > 3)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("patience", [0, 1 << 20])
def test_a_flood_is_reconstruction_by_dilation(monkeypatch: pytest.MonkeyPatch, seed: int, patience: int) -> None:
    """Of hills, of noise, and of a winding path, along which it goes pixel by pixel."""
    random = np.random.default_rng(seed)
    ceiling = np.rint(cv2.GaussianBlur(random.normal(size=(90, 110)).astype(np.float32), (0, 0), 1 + seed % 3) * 999)
    ceiling = np.pad(np.maximum(ceiling, 0), 2)
    if seed == 5:
        ceiling[:] = 0
        ceiling[4::4, 4:-4] = 50
        for row in range(4, len(ceiling) - 4, 4):  # from one line to the next, by turns at the left and the right
            ceiling[row : row + 4, 4 if row % 8 else -5] = 50
        level = np.zeros_like(ceiling)
        level[4, 60] = 40
    else:
        level = np.maximum(ceiling - np.float32(random.integers(1, 300)), 0)
    monkeypatch.setattr(separation, "_PATIENCE", patience)
    expected = reconstruction(level, ceiling)
    assert (expected > level).any()
    assert (separation._flooded(level, ceiling) == expected).all()


@pytest.mark.parametrize(("at_once", "side"), [(1, 1), (400, 40), (5000, 100)])
def test_a_large_picture_is_done_part_by_part_with_the_same_result(
    monkeypatch: pytest.MonkeyPatch, at_once: int, side: int
) -> None:
    mask = scattered(7, 220, 60)
    probability = np.random.default_rng(1).random(mask.shape, np.float32)
    whole = find_instances(mask, probability, (0.3, 0.2))
    for name, value in (("SHEET", side), ("BAND", at_once)):
        monkeypatch.setattr(separation, name, value)
    monkeypatch.setattr(measures, "BAND", at_once)
    parts = find_instances(mask, probability, (0.3, 0.2))
    # The seam of two that touch may differ by pixels that are as far from the one as from the other.
    assert ((parts.labels > 0) == (whole.labels > 0)).all()
    assert parts.count == whole.count
    matched = [np.bincount(whole.labels[parts.labels == one.id]).max() / one.area for one in parts.measured]
    assert min(matched) > 0.8
    assert np.mean(matched) > 0.98
    labels = separated(mask, split=False)
    for one, other in zip(measure(labels, probability), _in_one(labels, probability, monkeypatch), strict=True):
        assert (one.pixels, one.box) == (other.pixels, other.box)
        assert one.probability == pytest.approx(other.probability)
        assert one.eccentricity == pytest.approx(other.eccentricity)


def _in_one(labels: Labels, probability: NDArray[np.float32], monkeypatch: pytest.MonkeyPatch) -> list[Instance]:
    monkeypatch.setattr(measures, "BAND", 1 << 30)
    return measure(labels, probability)


def test_a_part_that_is_too_large_stays_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    mask = np.zeros((80, 220), np.uint8)
    mask[ellipse(40, 40, 20, 20)] = mask[ellipse(40, 72, 20, 20)] = 255
    mask[ellipse(40, 130, 10, 10)] = mask[ellipse(40, 146, 10, 10)] = 255
    assert find_instances(mask).count == 4
    monkeypatch.setattr(separation, "LARGEST", 1000)
    found = find_instances(mask)
    assert [one.box[0] > 100 for one in found.measured] == [False, True, True]
    assert (found.labels > 0).tolist() == (mask > 0).tolist()


@pytest.mark.parametrize("seed", range(3))
def test_specks_without_number_do_not_hang(seed: int) -> None:
    """A quarter of a million, of which only the number is given, in the time of a picture."""
    random = np.random.default_rng(seed)
    mask = np.zeros((1000, 1000), np.uint8)
    mask[:: 2 + seed % 2, ::2] = 255
    mask[random.random(mask.shape) < 0.01] = 0
    found = find_instances(mask)
    assert found.measured == ()
    assert found.count == label(mask, connectivity=2).max() > 100_000
