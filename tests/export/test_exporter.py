"""Export as a user runs it: a checkpoint in, a verified bundle out, or one line and nothing written."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from networks import scrambled_model
from once import exported_graph
from onnx import ModelProto, numpy_helper
from safetensors import safe_open
from written_headers import check_bundle

from espmedsam_edge.bundle import Bundle
from espmedsam_edge.cli import main
from espmedsam_edge.export import exporter
from espmedsam_edge.export.graph import GraphError
from espmedsam_edge.imaging.geometry import mask_from_logits, preprocess
from espmedsam_edge.modalities import Scale
from espmedsam_edge.model.checkpoint import CheckpointInfo, save_checkpoint
from espmedsam_edge.phantoms import phantom
from espmedsam_edge.runtime.segmenter import Segmenter


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = scrambled_model()
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    save_checkpoint(path, model, CheckpointInfo(config=model.config, origin="random"))
    return path


@pytest.fixture
def shared_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the graphs of ``weights``, those that other tests have built already: here they are only what is handed on."""
    modalities = {64: "fundus", 128: "xray"}
    monkeypatch.setattr(
        exporter, "build_graph", lambda _, size, batch: exported_graph(size, batch, modality=modalities[size])
    )


def leave_with(code: int, arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == code


def test_export_writes_a_bundle_that_segments_as_the_checkpoint(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    modalities = iter(("fundus", "xray"))  # of the graphs, in the order in which they are built
    monkeypatch.setattr(
        exporter, "build_graph", lambda _, size, batch: exported_graph(size, batch, modality=next(modalities))
    )
    out = tmp_path / "two.bundle"
    leave_with(0, ["export", str(weights), "--out", str(out), "--image-size", "128"])
    bundle = Bundle.open(out)
    assert bundle.manifest.modalities == ["fundus", "xray"]
    check_bundle(bundle)
    assert {p.name for p in out.iterdir()} == {"manifest.json", "report.md", "fundus-fp32.onnx", "xray-fp32.onnx"}
    assert "never trained" in capsys.readouterr().out
    frame, _ = phantom("xray", 3, (90, 110))
    with Segmenter.load(out, modality="xray") as segmenter:
        mask = segmenter.segment(frame).mask
    image = torch.from_numpy(preprocess(frame, 128, bundle.manifest.input.normalization))
    with torch.no_grad():
        logits = scrambled_model()(image, "xray").low_res_logits[0, 0].numpy()
    expected = mask_from_logits(logits, (90, 110))
    assert np.mean(mask == expected) >= 0.9999
    assert 0 < expected.mean() < 255


def test_one_modality_half_storage_and_batch(weights: Path, tmp_path: Path) -> None:
    out = tmp_path / "one.bundle"
    options = ["--modality", "fundus", "--image-size", "64", "--batch", "2", "--dtype-storage", "float16"]
    leave_with(0, ["export", str(weights), "--out", str(out), *options])
    check_bundle(Bundle.open(out))
    graph = Bundle.open(out).graph()
    assert (graph.file, graph.image_size, graph.batch) == ("fp32.onnx", 64, 2)


@pytest.mark.usefixtures("shared_graphs")
def test_each_modality_is_exported_at_the_size_it_was_trained_for(tmp_path: Path) -> None:
    model = scrambled_model()
    config = model.config.model_copy(update={"image_size": 64, "image_sizes": {"xray": 128}})
    save_checkpoint(tmp_path / "w.safetensors", model, CheckpointInfo(config=config, origin="random"))
    bundle, _ = exporter.export_bundle(tmp_path / "w.safetensors", tmp_path / "b")
    assert {graph.modality: graph.image_size for graph in bundle.manifest.graphs} == {"fundus": 64, "xray": 128}


@pytest.mark.usefixtures("shared_graphs")
def test_an_exported_bundle_tiles_as_its_checkpoint_says(tmp_path: Path) -> None:
    model = scrambled_model()
    scales = {"fundus": Scale(largest=96, tile=48), "xray": Scale(largest=200)}
    info = CheckpointInfo(config=model.config, origin="trained", scales=scales)
    save_checkpoint(tmp_path / "w.safetensors", model, info)
    bundle, _ = exporter.export_bundle(tmp_path / "w.safetensors", tmp_path / "b", modalities=["fundus"], image_size=64)
    assert bundle.manifest.scales == {"fundus": scales["fundus"]}
    frame, _ = phantom("fundus", 3, (70, 120))
    with Segmenter.load(bundle) as auto, Segmenter.load(bundle, tile=48) as tiled, Segmenter.load(bundle) as other:
        assert np.array_equal(auto.segment(frame).logits, tiled.segment(frame).logits)
        assert other.segment(frame[:64, :64]).logits.shape == (16, 16)


@pytest.mark.usefixtures("shared_graphs")
@pytest.mark.parametrize("scales", [{}, {"fundus": Scale(largest=96, tile=48)}])
def test_tiles_that_the_user_names(tmp_path: Path, scales: dict[str, Scale]) -> None:
    model = scrambled_model()
    info = CheckpointInfo(config=model.config, origin="trained", scales=scales)
    save_checkpoint(tmp_path / "w.safetensors", model, info)
    options = ["--modality", "fundus", "--image-size", "64", "--tile", "40"]
    leave_with(0, ["export", str(tmp_path / "w.safetensors"), "--out", str(tmp_path / "b"), *options])
    with Segmenter.load(tmp_path / "b") as segmenter:
        assert segmenter.segment(phantom("fundus", 3, (70, 120))[0]).logits.shape == (28, 48)
    with safe_open(tmp_path / "w.safetensors", "np") as file:  # programs before scales refuse the key
        assert ("scales" in json.loads(file.metadata()["espmedsam"])) == bool(scales)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--modality", "fundsu"], "Did you mean 'fundus'"),
        (["--image-size", "100"], "multiple of 64"),
        (["--image-size", "0"], "multiple of 64"),
        (["--batch", "0"], "batch of 0"),
        (["--tile", "16"], "no size"),
    ],
)
def test_wrong_use_writes_nothing(
    weights: Path, tmp_path: Path, options: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    leave_with(2, ["export", str(weights), "--out", str(tmp_path / "b"), *options])
    error = capsys.readouterr().err
    assert says in error
    assert error.strip().count("\n") == 0
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_no_bundle_is_not_overwritten(weights: Path, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_bytes(b"x")
    leave_with(2, ["export", str(weights), "--out", str(tmp_path / "photos")])
    assert [p.name for p in (tmp_path / "photos").iterdir()] == ["a.jpg"]


def test_a_graph_that_differs_is_not_handed_on(weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(network: torch.nn.Module, image_size: int, batch: int) -> ModelProto:
        graph = exported_graph(image_size, batch)
        (bias,) = (tensor for tensor in graph.graph.initializer if tensor.name == "decoder.up2_bias")
        bias.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(bias) + 5, bias.name))
        return graph

    monkeypatch.setattr(exporter, "build_graph", wrong)
    with pytest.raises(GraphError, match="differs from the checkpoint"):
        exporter.export_bundle(weights, tmp_path / "b", modalities=["fundus"], image_size=64)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("shared_graphs")
def test_ctrl_c_leaves_the_old_bundle(weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "b"
    leave_with(0, ["export", str(weights), "--out", str(out), "--modality", "fundus", "--image-size", "64"])
    before = {p.name: p.read_bytes() for p in out.iterdir()}

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(exporter, "verify_graph", interrupted)
    with pytest.raises(KeyboardInterrupt):
        exporter.export_bundle(weights, out, modalities=["xray"], image_size=128)
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before
    assert list(tmp_path.iterdir()) == [out]
