"""tools/accuracy.py measures again what changed, and nothing else."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest


@pytest.fixture
def accuracy(load_script: Callable[[str], Any]) -> Any:
    return load_script("tools/accuracy.py")


def _arrays() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    names = ["encoder.weight", "controller.xray.0.bias", "controller.fundus.0.bias", "decoder.queries.xray"]
    return {name: rng.standard_normal(4).astype(np.float32) for name in names}


def test_a_modalitys_weights_are_its_own_and_the_shared_ones(accuracy: Any) -> None:
    before = _arrays()

    def changed(name: str) -> set[str]:
        after = {**before, name: before[name] + 1}
        return {m for m in ("xray", "fundus") if accuracy.weights_of(after, m) != accuracy.weights_of(before, m)}

    assert changed("encoder.weight") == {"xray", "fundus"}
    assert changed("controller.xray.0.bias") == {"xray"}
    assert changed("decoder.queries.xray") == {"xray"}
    assert changed("controller.fundus.0.bias") == {"fundus"}


def test_figures_of_other_weights_are_not_kept(accuracy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accuracy, "RESULTS", tmp_path)
    result = {
        "weights_of": {"xray": "a", "fundus": "b"},
        "scores": {"xray": {"set": {"fp32": {"dice": 1}}}, "fundus": {"drive": {"fp32": {"dice": 2}}}},
        "gate": {"xray/int8": "refused", "fundus/int8": {}},
        "best_median_worst": {"xray/set": [], "fundus/drive": []},
        "images_dice": [{"modality": "xray", "dice": 1}, {"modality": "fundus", "dice": 2}],
    }
    (tmp_path / "old.json").write_text(json.dumps(result))
    kept = accuracy.kept("old", {"xray": "a", "fundus": "changed"})
    assert kept == {
        "scores": {"xray": {"set": {"fp32": {"dice": 1}}}},
        "gate": {"xray/int8": "refused"},
        "best_median_worst": {"xray/set": []},
        "images_dice": [{"modality": "xray", "dice": 1}],
    }
    assert not any(accuracy.kept("none", {"xray": "a"}).values())
