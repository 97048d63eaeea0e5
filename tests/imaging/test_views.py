"""Views of a square and the mean over them, against flips and transposes written out."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from espmedsam_edge.imaging.views import VIEWS, average
from espmedsam_edge.modalities import PAPER_MODALITIES, Views, register, views_of

NAMES: tuple[Views, ...] = ("none", "mirror", "flips", "turns")


def arrangements(square: np.ndarray, name: Views) -> list[np.ndarray]:
    """The views of a set, made without turning: by mirroring and exchanging the axes."""
    flips = {"none": [()], "mirror": [(), (-1,)]}.get(name, [(), (-1,), (-2,), (-2, -1)])
    sources = [square, square.swapaxes(-2, -1)] if name == "turns" else [square]
    return [np.flip(source, axes) for source, axes in itertools.product(sources, flips)]


@pytest.mark.parametrize("name", NAMES)
def test_views_are_the_arrangements_they_are_named_after_and_are_undone(name: Views) -> None:
    square = np.random.default_rng(1).random((2, 3, 5, 5), np.float32)
    made = [view.of(square) for view in VIEWS[name]]
    expected = arrangements(square, name)
    assert len(made) == len(expected) == {"none": 1, "mirror": 2, "flips": 4, "turns": 8}[name]
    assert {one.tobytes() for one in made} == {one.tobytes() for one in expected}
    for view, one in zip(VIEWS[name], made, strict=True):
        np.testing.assert_array_equal(view.undone(one), square)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("batch", [1, 3, 8])
def test_the_mean_is_that_of_each_view_alone(name: Views, batch: int) -> None:
    rng = np.random.default_rng(batch)
    field = rng.standard_normal((3, 8, 8)).astype(np.float32)  # what a network makes of a pixel depends on its place
    images = rng.standard_normal((3, 3, 8, 8)).astype(np.float32)

    def run(given: np.ndarray) -> np.ndarray:
        assert given.shape == (batch, 3, 8, 8)
        assert given.flags.c_contiguous
        sums = (given * field).sum(1, keepdims=True)
        return np.tanh(sums.reshape(batch, 1, 2, 4, 2, 4).mean((3, 5)))

    def by_hand(image: np.ndarray) -> np.ndarray:
        """A network's answer to a view, undone, is the plain image's under the field in that view's arrangement."""
        answers = [
            np.tanh((image * view).sum(0).reshape(2, 4, 2, 4).mean((1, 3))) for view in arrangements(field, name)
        ]
        return np.mean(answers, axis=0)

    found = average(run, images, VIEWS[name], batch)
    assert found.shape == (3, 1, 2, 2)
    np.testing.assert_allclose(found[:, 0], [by_hand(image) for image in images], atol=1e-6)


def test_what_is_not_a_number_stays_none() -> None:
    found = average(
        lambda given: np.full((1, 1, 2, 2), np.nan, np.float32), np.zeros((1, 3, 8, 8), np.float32), VIEWS["flips"], 1
    )
    assert np.isnan(found).all()


def test_each_modality_says_which_views_it_allows() -> None:
    assert {views_of(name) for name in PAPER_MODALITIES} <= set(NAMES)
    assert views_of("something_new") == "turns"
    before = views_of("xray")
    register("xray", "ribs")
    assert views_of("xray") == before  # another target does not turn a chest film over
