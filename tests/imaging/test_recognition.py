"""Recognising a modality: right on what it was made for, unsure on what is none, independent of a picture's size."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import softmax

from espmedsam_edge.imaging import recognition
from espmedsam_edge.imaging.dataset import DatasetFolder
from espmedsam_edge.imaging.recognition import OTHER, features, fitted, recognise
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


@pytest.mark.data
@pytest.mark.parametrize("modality", PAPER_MODALITIES)
def test_test_images_are_never_taken_for_another_modality(modality: str, data_root: Path) -> None:
    for path in sorted((data_root / modality).iterdir()):
        folder = DatasetFolder.open(path)
        for id_ in folder.ids("test"):
            guess = recognise(folder.load_image(id_), PAPER_MODALITIES)
            assert guess is not None
            assert guess.modality == modality or not guess.sure, (path.name, id_)
