"""What docs/accuracy.md says of the confidence is of the calibration that ships, and is what was promised."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from espmedsam_edge.imaging.recognition import DOUBTFUL, fitted
from espmedsam_edge.modalities import PAPER_MODALITIES

ROOT = Path(__file__).parents[2]
RESULT = json.loads((ROOT / "benchmarks" / "results" / "confidence-epyc-2core.json").read_text())


def test_the_result_is_of_what_ships() -> None:
    assert {name: tuple(pair) for name, pair in RESULT["calibration"].items()} == fitted().kinds
    assert RESULT["refused_below"] == DOUBTFUL


@pytest.mark.parametrize("name", PAPER_MODALITIES)
def test_few_of_its_own_and_most_of_all_others_are_refused(name: str) -> None:
    found = RESULT["modalities"][name]
    shares = {what: entry["refused"] / entry["images"] for what, entry in found.items() if what != "roc"}
    assert shares["own_test_images"] <= 0.02
    assert shares["photographs"] >= 0.9
    assert shares["other_modalities"] >= 0.9
    row = next(
        line for line in (ROOT / "docs" / "accuracy.md").read_text().splitlines() if line.startswith(f"| {name} | 0")
    )
    for what in ("own_test_images", "photographs", "other_modalities"):
        assert f"{found[what]['refused']} of {found[what]['images']} ({100 * shares[what]:.1f} %)" in row
