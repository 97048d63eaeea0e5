"""tools/tta.py: which views the validation scores speak for, and its table."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from espmedsam_edge.modalities import PAPER_MODALITIES, views_of


@pytest.fixture
def tta(load_script: Callable[[str], Any]) -> Any:
    load_script("tools/accuracy.py")
    return load_script("tools/tta.py")


@pytest.mark.parametrize(
    ("scores", "best"),
    [
        ((90.0, 90.05, 90.09, 90.09), "none"),
        ((90.0, 90.2, 90.1, 90.0), "mirror"),
        ((90.0, 90.2, 90.25, 95.0), "mirror"),
        ((90.0, 90.2, 90.4, 90.45), "flips"),
        ((70.5, 71.2, 71.4, 71.6), "turns"),
        ((90.0, 80.0, 99.0, 99.0), "none"),
    ],
)
def test_every_doubling_must_be_worth_it(tta: Any, scores: tuple[float, ...], best: str) -> None:
    assert tta.best_views(dict(zip(("none", "mirror", "flips", "turns"), scores, strict=True))) == best


def test_modalities_allow_what_the_last_measurement_speaks_for(tta: Any) -> None:
    measured = json.loads((tta.RESULTS / "tta-epyc-2core.json").read_text())["modalities"]
    assert {name: entry["worth"] for name, entry in measured.items()} == {name: views_of(name) for name in measured}
    assert set(measured) == set(PAPER_MODALITIES)


def test_the_table_shows_what_the_allowed_views_gain(tta: Any) -> None:
    entry = {
        "valid": {"images": 14, "dice": {"none": 93.9, "mirror": 94.27, "flips": 92.29, "turns": 87.8}},
        "test": {"images": 15, "dice": {"none": 92.8, "mirror": 93.0}},
        "allowed": "mirror",
        "cost": 1.94,
    }
    lines = tta.table({"modalities": {"xray": entry}}, "some").splitlines()
    assert lines[-1] == "| xray | 14 | 93.90 | 94.27 | 92.29 | 87.80 | mirror | 15 | 92.80 | 93.00 | 1.9 |"
    assert lines[-1].count("|") == lines[-2].count("|") == lines[-3].count("|")
