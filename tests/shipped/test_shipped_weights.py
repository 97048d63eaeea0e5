"""The weights that come with the program: whole, and the same in ONNX Runtime, without torch, as in torch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from espmedsam_edge.bundle import Bundle
from espmedsam_edge.cli import build_app
from espmedsam_edge.imaging.geometry import preprocess
from espmedsam_edge.modalities import PAPER_MODALITIES
from espmedsam_edge.phantoms import phantom
from espmedsam_edge.runtime.segmenter import Segmenter
from espmedsam_edge.shipped.bundles import CHECKPOINT, WEIGHTS, shipped_bundle, shipped_scores


def test_every_modality_of_the_paper_has_a_measured_score() -> None:
    scores = shipped_scores()
    assert set(scores) == set(PAPER_MODALITIES)
    for name, score in scores.items():
        assert score.images > 0
        assert score.experimental == (score.dice < score.required)
        assert name in score.line(name)


def test_a_bundle_made_from_them_computes_what_torch_computes(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="needs torch (extra export)")
    from espmedsam_edge.model.checkpoint import load_checkpoint

    bundle = shipped_bundle("microscopy", tmp_path / "microscopy.bundle")
    assert bundle.manifest.preset == "espmedsam-s"
    assert bundle.manifest.weights.origin == "trained"
    model, info = load_checkpoint(WEIGHTS / CHECKPOINT)
    assert info.modalities == list(PAPER_MODALITIES)
    frame, _ = phantom("microscopy", 5, (200, 260))
    with Segmenter.load(bundle, backend="onnxruntime-cpu") as segmenter:
        found = segmenter.segment(frame).logits
        size = segmenter.image_size
    image = torch.from_numpy(preprocess(frame, size, info.normalization))
    with torch.inference_mode():
        expected = model(image, "microscopy").low_res_logits[0, 0].numpy()
    assert np.abs(found - expected).max() <= 1e-3 * np.ptp(expected)
    assert np.mean((found >= 0) == (expected >= 0)) >= 0.9999


def test_the_command_lists_and_writes_them(tmp_path: Path) -> None:
    app = build_app("weights")
    listed = CliRunner().invoke(app, ["weights"])
    assert listed.exit_code == 0
    assert all(name in listed.stdout for name in PAPER_MODALITIES)
    assert "not a medical device" in listed.stdout
    out = tmp_path / "derm.bundle"
    written = CliRunner().invoke(app, ["weights", "--modality", "dermoscopy", "--out", str(out)])
    assert written.exit_code == 0, written.output
    assert Bundle.open(out).manifest.modalities == ["dermoscopy"]


def test_as_a_plain_checkpoint_they_are_the_same_tensors(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="needs torch (extra export)")
    from espmedsam_edge.model.checkpoint import read_checkpoint

    done = CliRunner().invoke(build_app("weights"), ["weights", "--checkpoint", str(tmp_path / "w.safetensors")])
    assert done.exit_code == 0, done.output
    packed, info = read_checkpoint(WEIGHTS / CHECKPOINT)
    plain, same = read_checkpoint(tmp_path / "w.safetensors")
    assert info == same
    assert set(packed) == set(plain)
    assert all(torch.equal(packed[name], plain[name]) for name in packed)
