"""Recognising a modality: right on what it was made for, unsure on what is none, independent of a picture's size."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit, softmax

from espmedsam_edge.imaging import recognition
from espmedsam_edge.imaging.dataset import DatasetFolder
from espmedsam_edge.imaging.recognition import DOUBTFUL, OTHER, confidences, features, fitted, lab_of, look, recognise
from espmedsam_edge.modalities import PAPER_MODALITIES
from espmedsam_edge.phantoms import phantom


def test_probabilities_are_a_softmax_of_linear_scores() -> None:
    classifier = fitted()
    frame, _ = phantom("fundus", 1, (200, 300))
    z = np.clip((features(frame) - classifier.mean) / classifier.scale, -5, 5)
    expected = softmax(z @ classifier.weights + classifier.bias)
    guess = recognise(frame, PAPER_MODALITIES)
    assert guess is not None
    assert guess.modality == "fundus"
    assert guess.probability == pytest.approx(expected[classifier.classes.index("fundus")])


def test_a_guess_is_sure_only_where_the_picture_is_like_its_class(monkeypatch: pytest.MonkeyPatch) -> None:
    """However likely: softmax compares the classes alone."""
    classifier = fitted()
    frame, _ = phantom("fundus", 1, (200, 300))
    z = np.clip((features(frame) - classifier.mean) / classifier.scale, -4, 4)
    place = classifier.classes.index("fundus")
    own = float(z @ classifier.own_weights[:, place] + classifier.own_bias[place])
    for least, familiar in ((own - 1e-6, True), (own + 1e-6, False)):
        changed = replace(classifier, least=least)
        monkeypatch.setattr(recognition, "fitted", lambda changed=changed: changed)
        guess = recognise(frame, PAPER_MODALITIES)
        assert guess is not None
        assert guess.modality == "fundus"
        assert guess.probability > recognition.SURE
        assert guess.sure == guess.familiar == familiar


def test_only_the_modalities_asked_for_are_answered() -> None:
    frame, _ = phantom("fundus", 1, (200, 300))
    guess = recognise(frame, ["xray", "ultrasound", OTHER])
    assert guess is not None
    assert guess.modality in ("xray", "ultrasound")
    assert not guess.sure  # it is a fundus picture
    assert recognise(frame, ["histopathology"]) is None


@given(seed=st.integers(0, 2**16), height=st.integers(1, 90), width=st.integers(1, 90))
@settings(max_examples=40, deadline=None)
def test_any_picture_gives_finite_features_and_a_probability(seed: int, height: int, width: int) -> None:
    rng = np.random.default_rng(seed)
    frame = rng.integers(0, 256, (height, width, 3), np.uint8)
    assert np.isfinite(features(frame)).all()
    guess = recognise(frame, PAPER_MODALITIES)
    assert guess is not None
    assert 0 <= guess.probability <= 1


def test_a_larger_copy_looks_the_same() -> None:
    frame, _ = phantom("xray", 4, (256, 256))
    large = np.asarray(cv2.resize(frame, (1024, 1024), interpolation=cv2.INTER_LINEAR), np.uint8)
    first, second = recognise(frame, PAPER_MODALITIES), recognise(large, PAPER_MODALITIES)
    assert first is not None
    assert second is not None
    assert first.modality == second.modality == "xray"
    assert first.probability == pytest.approx(second.probability, abs=0.05)  # resampling smooths edges a little


def test_confidence_is_a_logistic_function_of_the_log_odds() -> None:
    classifier = fitted()
    frame, _ = phantom("xray", 4, (200, 180))
    z = np.clip((features(frame) - classifier.mean) / classifier.scale, -4, 4)
    p = softmax(z @ classifier.weights + classifier.bias)
    found = confidences(frame)
    assert tuple(found) == PAPER_MODALITIES
    for name, value in found.items():
        place = classifier.classes.index(name)
        slope, bound = classifier.kinds[name]
        rest = p.sum() - p[place]
        assert value == pytest.approx(expit(slope * (np.log(p[place]) - np.log(rest) - bound)), rel=1e-6)
    assert confidences(look(frame)) == found


@pytest.mark.parametrize("modality", PAPER_MODALITIES)
def test_phantoms_are_of_their_kind_and_pages_and_noise_of_none(modality: str) -> None:
    rng = np.random.default_rng(8)
    assert min(confidences(phantom(modality, 300 + seed, (180, 220))[0])[modality] for seed in range(6)) >= DOUBTFUL
    page = np.full((200, 300, 3), 255, np.uint8)
    for row in range(20, 190, 14):
        cv2.putText(page, "Lorem ipsum dolor sit amet", (8, row), cv2.FONT_HERSHEY_SIMPLEX, 0.5, (0, 0, 0))
    for frame in (page, rng.integers(0, 256, (200, 300, 3), np.uint8)):
        assert confidences(frame)[modality] < DOUBTFUL


@pytest.mark.data
@pytest.mark.parametrize("modality", PAPER_MODALITIES)
def test_photographs_and_other_modalities_are_refused_and_test_images_are_not(modality: str, data_root: Path) -> None:
    """On what it was neither fitted nor calibrated on: of each set a few."""

    def of(path: Path, ids: list[str]) -> list[float]:
        folder = DatasetFolder.open(path)
        return [confidences(folder.load_image(id_))[modality] for id_ in ids]

    own, others = list[float](), list[float]()
    for name in PAPER_MODALITIES:
        for path in sorted((data_root / name).iterdir()):
            ids = DatasetFolder.open(path).ids("test")
            (own if name == modality else others).extend(of(path, ids if name == modality else ids[::4]))
    photographs = data_root / "natural" / "bsds500"
    outside = of(photographs, sorted(DatasetFolder.open(photographs).image_files)[1::4])
    assert np.mean(np.array(own) < DOUBTFUL) <= 0.02
    assert np.mean(np.array(others) < DOUBTFUL) >= 0.9
    assert np.mean(np.array(outside) < DOUBTFUL) >= 0.9


@pytest.mark.data
@pytest.mark.parametrize("modality", PAPER_MODALITIES)
def test_test_images_are_never_taken_for_another_modality(modality: str, data_root: Path) -> None:
    for path in sorted((data_root / modality).iterdir()):
        folder = DatasetFolder.open(path)
        for id_ in folder.ids("test"):
            guess = recognise(folder.load_image(id_), PAPER_MODALITIES)
            assert guess is not None
            assert guess.modality == modality or not guess.sure, (path.name, id_)


def test_lab_is_equal_to_opencvs() -> None:
    colours = np.random.default_rng(0).integers(0, 256, (1000, 1000, 3), dtype=np.uint8)
    corners = np.array(np.meshgrid(*[[0, 1, 10, 11, 254, 255]] * 3), np.uint8).reshape(3, 1, -1).transpose(1, 2, 0)
    for image in (colours, np.ascontiguousarray(corners)):
        np.testing.assert_array_equal(lab_of(image), cv2.cvtColor(image, cv2.COLOR_BGR2LAB))
