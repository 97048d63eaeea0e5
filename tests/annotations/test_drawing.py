"""Polygons are drawn as the tools draw them, wherever they lie."""

from __future__ import annotations

import numpy as np
import pytest

from espmedsam_edge.annotations.drawing import by_centres, checked

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
