"""The weights that come with the program: whole, and the same in ONNX Runtime, without torch, as in torch."""

from __future__ import annotations

import atexit
import errno
import hashlib
import json
import lzma
import os
import stat
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from plain_graphs import plain_graph
from typer.testing import CliRunner

from espmedsam_edge.bundle import MANIFEST, Bundle
from espmedsam_edge.cli import build_app
from espmedsam_edge.imaging.geometry import preprocess
from espmedsam_edge.modalities import PAPER_MODALITIES
from espmedsam_edge.phantoms import phantom
from espmedsam_edge.runtime.auto.gates import passed
from espmedsam_edge.runtime.segmenter import Segmenter
from espmedsam_edge.shipped import bundles
from espmedsam_edge.shipped.bundles import (
    CHECKPOINT,
    CHECKS,
    SUMS,
    UNPACKED,
    WEIGHTS,
    checks_of,
    make_bundle,
    shipped_bundle,
    shipped_scores,
    skeleton_name,
)


def test_every_modality_of_the_paper_has_a_measured_score() -> None:
    scores = shipped_scores()
    assert set(scores) == set(PAPER_MODALITIES)
    for name, score in scores.items():
        assert score.images > 0
        assert score.experimental == (score.dice < score.required)
        assert name in score.line(name)


def test_a_bundle_made_from_them_computes_what_torch_computes(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="needs torch (extra export)")
    from written_headers import check_bundle

    from espmedsam_edge.model.checkpoint import load_checkpoint

    bundle = shipped_bundle("microscopy", tmp_path / "microscopy.bundle")
    assert bundle.manifest.preset == "espmedsam-s"
    check_bundle(bundle)
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


def test_a_bundle_planted_in_the_cache_does_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Another graph with a manifest that fits it, where the program keeps the bundle of its own weights."""
    monkeypatch.setenv("ESPMEDSAM_CACHE", str(tmp_path / "cache"))
    bundle = shipped_bundle("fundus")
    expected = bundle.read_graph(bundle.graph())
    modes = {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "cache").rglob("*") if path.is_file()}
    folders = {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "cache").rglob("*") if path.is_dir()}
    assert (modes, folders) == ({0o600}, {0o700})

    planted = plain_graph(size=bundle.graph().image_size)
    bundle.graph_path(bundle.graph()).write_bytes(planted)
    manifest = json.loads((bundle.path / MANIFEST).read_text())
    manifest["graphs"][0]["sha256"] = hashlib.sha256(planted).hexdigest()
    manifest["threshold"] = 0.001
    (bundle.path / MANIFEST).write_text(json.dumps(manifest))
    opened = Bundle.open(bundle.path)
    assert opened.read_graph(opened.graph()) == planted  # it is a fitting bundle

    again = shipped_bundle("fundus")
    assert again.read_graph(again.graph()) == expected
    assert again.manifest == bundle.manifest == Bundle.open(bundle.path).manifest
    assert "is not what the weights that came with the program make" in caplog.text


def test_unpacked_weights_planted_in_the_cache_are_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ESPMEDSAM_CACHE", str(tmp_path / "cache"))
    expected = shipped_bundle("xray").manifest
    (kept,) = (tmp_path / "cache" / "weights").iterdir()
    content = bytearray(kept.read_bytes())
    content[-100] ^= 0x40
    kept.write_bytes(content)
    assert shipped_bundle("xray").manifest == expected
    assert kept.read_bytes() != content  # and made again


@pytest.mark.parametrize("fault", ["others may write", "above it", "a file", "read-only"])
def test_without_a_cache_they_are_made_for_the_run_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: list[str], fault: str
) -> None:
    place = tmp_path / "above" / "cache"
    place.mkdir(parents=True)
    if fault == "others may write":
        place.chmod(0o777)
    elif fault == "above it":
        place.parent.chmod(0o777)
    elif fault == "a file":
        place.rmdir()
        place.write_text("mine")
    else:
        monkeypatch.setattr(bundles, "make_private", _refused)
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setenv("ESPMEDSAM_CACHE", str(place))
    left: list[Callable[[], object]] = []
    monkeypatch.setattr(atexit, "register", left.append)
    bundle = shipped_bundle("fundus")
    assert sorted(tmp_path.rglob("*")) == before
    assert not bundle.path.is_relative_to(tmp_path / "above")
    assert bundle.read_graph(bundle.graph())
    assert stat.S_IMODE(bundle.path.parent.stat().st_mode) == 0o700
    assert "Prepared for this run alone." in said[-1]
    for leave in left:
        leave()
    assert not bundle.path.parent.exists()


def _refused(folder: Path, root: Path) -> None:
    raise PermissionError(errno.EROFS, os.strerror(errno.EROFS), str(folder))


@pytest.mark.parametrize("size", [448, 1024])
def test_the_networks_without_weights_state_only_what_they_use(size: int) -> None:
    onnx = pytest.importorskip("onnx", reason="needs onnx (extra export)")
    from written_headers import check_header

    check_header(onnx.load_from_string(lzma.decompress((WEIGHTS / skeleton_name(size)).read_bytes())))


def test_what_was_checked_with_them_is_in_their_bundles(tmp_path: Path) -> None:
    manifest = make_bundle(["microscopy"], tmp_path / "m.bundle").manifest
    (graph,) = manifest.graphs
    assert passed(manifest, graph, "openvino:bf16")
    assert set(json.loads((WEIGHTS / CHECKS).read_text())["checks"]) == set(shipped_scores())


@pytest.mark.parametrize("change", [("checkpoint_sha256", "0" * 64), ("checks", {"Fundus!": {}}), ("more", 1)])
def test_a_check_of_other_weights_counts_for_nothing(tmp_path: Path, change: tuple[str, object]) -> None:
    found = json.loads((WEIGHTS / CHECKS).read_text())
    (tmp_path / CHECKS).write_text(json.dumps(found))
    assert checks_of(tmp_path, found["checkpoint_sha256"]) == found["checks"]
    (tmp_path / CHECKS).write_text(json.dumps(found | {change[0]: change[1]}))
    assert checks_of(tmp_path, found["checkpoint_sha256"]) == {}
    assert checks_of(tmp_path / "missing", found["checkpoint_sha256"]) == {}


def test_every_sum_is_of_what_is_there() -> None:
    lines = (line.split("  ") for line in (WEIGHTS / SUMS).read_text().splitlines())
    contents = {path.name: path.read_bytes() for path in WEIGHTS.glob("*.xz")}
    contents[UNPACKED] = lzma.decompress(contents[CHECKPOINT])
    assert {name: sha256 for sha256, name in lines} == {
        name: hashlib.sha256(content).hexdigest() for name, content in contents.items()
    }
