"""What ``weights`` writes: a checkpoint that counts as the bundles' own, and a bundle with its report and scales."""

from __future__ import annotations

from pathlib import Path

import pytest

from espmedsam_edge.bundle import REPORT_TITLE
from espmedsam_edge.files import sha256_file
from espmedsam_edge.shipped.bundles import CHECKPOINT, WEIGHTS, is_checkpoint, shipped_bundle, shipped_checkpoint


def test_the_written_checkpoint_is_the_bundles(tmp_path: Path) -> None:
    bundle = shipped_bundle("fundus", tmp_path / "fundus.bundle")
    named = bundle.manifest.weights.checkpoint_sha256
    file = tmp_path / "shipped.safetensors"
    shipped_checkpoint(file)
    assert is_checkpoint(sha256_file(file), named)
    assert is_checkpoint(sha256_file(WEIGHTS / CHECKPOINT), named)
    assert not is_checkpoint(sha256_file(file), "ab" * 32)
    report = (bundle.path / "report.md").read_text(encoding="utf-8")
    assert report.startswith(REPORT_TITLE)
    assert bundle.manifest.weights.note in report


def test_both_checkpoints_state_the_scales_that_bundles_have(tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="needs torch (extra export)")
    from espmedsam_edge.model.checkpoint import read_checkpoint

    expected = shipped_bundle(None, tmp_path / "all.bundle").manifest.scales
    assert expected["microscopy"].tile == 256
    shipped_checkpoint(tmp_path / "shipped.safetensors")
    for file in (WEIGHTS / CHECKPOINT, tmp_path / "shipped.safetensors"):
        assert read_checkpoint(file)[1].scales == expected
