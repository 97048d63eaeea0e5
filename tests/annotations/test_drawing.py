"""Polygons are drawn as the tools draw them, wherever they lie."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import pytest

from espmedsam_edge.annotations.drawing import by_centres, by_pillow, by_pixels, checked

tools = pytest.importorskip("pycocotools.mask", reason="needs pycocotools (extra annotations)")


@pytest.mark.parametrize("seed", range(60))
def test_polygons_are_filled_as_pycocotools_fills_them_on_the_whole_picture(seed: int) -> None:
    """At its borders, too, and far beyond them; of several the union."""
    rng = np.random.default_rng(seed)
    size = (int(rng.integers(5, 60)), int(rng.integers(5, 60)))
    middle, spread = rng.uniform(-10, 70, 2), rng.uniform(1, 40)
    polygons = [
        middle + rng.normal(0, spread, (int(rng.integers(3, 9)), 2)).round(int(rng.integers(0, 3)))
        for _ in range(int(rng.integers(1, 4)))
    ]
    packed = tools.frPyObjects([one.ravel().tolist() for one in polygons], *size)
    expected = tools.decode(tools.merge(packed)) * 255
    canvas = np.zeros(size, np.uint8)
    canvas[: size[0] // 2, ::3] = 255
    before = canvas.copy()
    by_centres(polygons, canvas)
    assert np.array_equal(canvas, before | expected)


@pytest.mark.parametrize(
    "points", [None, [], "ab", [[1, 2], [3]], {"x": 1}, [[1, 2]] * 2, [[1, 2, 3, 4]], [["1", "x"]] * 3, [[1, None]] * 4]
)
def test_what_is_no_polygon_is_said_in_a_few_words(points: object) -> None:
    with pytest.raises(ValueError, match=r"^its? "):
        checked(points, (10, 10))


@pytest.mark.parametrize("seed", range(60))
def test_shapes_are_filled_as_pillow_fills_them_on_the_whole_picture(seed: int) -> None:
    pytest.importorskip("PIL", reason="needs Pillow (extra annotations)")
    from PIL import Image, ImageDraw

    rng = np.random.default_rng(seed)
    size = (int(rng.integers(5, 60)), int(rng.integers(5, 60)))
    shape = ("polygon", "rectangle", "circle")[seed % 3]
    count = 2 if shape != "polygon" else int(rng.integers(3, 9))
    points = rng.uniform(-10, 70, 2) + rng.normal(0, rng.uniform(1, 40), (count, 2)).round(int(rng.integers(0, 3)))
    canvas = np.zeros(size, np.uint8)
    canvas[: size[0] // 2, ::3] = 255
    picture = Image.fromarray(canvas)
    draw = ImageDraw.Draw(picture)
    if shape == "polygon":
        draw.polygon([tuple(point) for point in points.tolist()], outline=255, fill=255)
    elif shape == "rectangle":
        draw.rectangle((*points.min(axis=0), *points.max(axis=0)), outline=255, fill=255)
    else:
        radius = np.hypot(*(points[1] - points[0]))
        draw.ellipse((*(points[0] - radius), *(points[0] + radius)), outline=255, fill=255)
    by_pillow(shape, points, canvas)
    assert np.array_equal(canvas, np.asarray(picture))


def _coco(points: np.ndarray, canvas: np.ndarray) -> None:
    by_centres([points], canvas)


def _labelme(points: np.ndarray, canvas: np.ndarray) -> None:
    by_pillow("polygon", points, canvas)


@pytest.mark.parametrize("draw", [_coco, _labelme, by_pixels])
@pytest.mark.parametrize("form", ["zigzag", "still"])
def test_an_outline_takes_no_longer_than_the_longest_that_is_taken(
    draw: Callable[[np.ndarray, np.ndarray], None], form: str
) -> None:
    """A hundred thousand lines across a picture took gigabytes, a million points that stay in place minutes."""
    size = (4000, 4000)
    long = np.tile([[0.0, 0.0], [3999.0, 3999.0]], (50_000, 1))
    still = np.concatenate([np.full((3_000_000, 2), 5.0), [[3000, 3999], [20, 3000]]])
    with pytest.raises(ValueError, match="far longer"):
        checked(long if form == "zigzag" else still, size)
    points = np.concatenate([long[:262], [[4, 3]]]) if form == "zigzag" else still[-1_030_000:]
    begin = time.process_time()
    draw(checked(points, size), np.zeros(size, np.uint8))
    assert time.process_time() - begin < 10
