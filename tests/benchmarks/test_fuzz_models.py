"""Changed bundles, graphs, checkpoints, recipes and dataset folders are used or refused in one line, and in bounds."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import pytest

pytest.importorskip("torch", reason="needs torch (extra export)")
pytest.importorskip("onnx", reason="needs onnx (extra export)")


def test_changed_ones_are_used_or_refused(
    monkeypatch: pytest.MonkeyPatch, load_script: Callable[..., ModuleType]
) -> None:
    """The short version of benchmarks/fuzz_models.py, which also reads whole ones of each kind."""
    fuzzing = load_script("benchmarks/fuzzing.py")
    monkeypatch.setattr(fuzzing, "SECONDS", 60.0)  # a machine under tests is slow
    module = load_script("benchmarks/fuzz_models.py")
    tally = module.fuzz(36, 7_000_000)
    assert tally.findings == []
    assert tally.of("refused") >= 18
    assert tally.of("refused") + tally.of("read") == 36
    assert tally.most_memory < fuzzing.MEMORY
