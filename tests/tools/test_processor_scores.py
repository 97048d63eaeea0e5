"""tools/processor_scores.py: the table says what each arithmetic adds to FP32's Dice, between its marks in the page."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest


@pytest.fixture
def scores(load_script: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch) -> Any:
    for package in ("torch", "modelopt"):
        pytest.importorskip(package, reason="calibrates (extra calibrate)")
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "tools")  # as Python does for a script
    return load_script("tools/processor_scores.py")


def test_the_page_gets_a_row_a_dataset_and_keeps_the_rest(
    scores: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dice = np.random.default_rng(3).uniform(60, 95, len(scores.CASES)).round(3)
    rows = {
        case: {"images": 7, "dice": value, "equal_pixels_worst": 0.99951}
        for case, value in zip(scores.CASES, dice.tolist(), strict=True)
    }
    (tmp_path / "made.json").write_text(json.dumps({"scores": {"fundus": {"drive": rows}}}))
    page = tmp_path / "precision.md"
    begin, end = scores._BEGIN, scores._END
    page.write_text(f"before\n\n{begin}\n\nold\n\n{end}\n\nafter\n")
    monkeypatch.setattr(scores, "RESULTS", tmp_path)
    monkeypatch.setattr(scores, "PAGE", page)
    for _ in range(2):  # a second time changes nothing
        scores.page("made")
        lines = page.read_text().splitlines()
        assert (lines[0], lines[-1]) == ("before", "after")
        (row,) = [line for line in lines if line.startswith("| fundus")]
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        assert cells[:2] == ["fundus, drive (7)", f"{dice[0]:.2f}"]
        assert [float(cell) for cell in cells[2:6]] == pytest.approx(dice[1:] - dice[0], abs=0.006)
        assert cells[6] == "99.951 %"
        assert "old" not in page.read_text()
