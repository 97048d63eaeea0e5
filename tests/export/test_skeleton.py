"""A network without weights and a checkpoint give, with ONNX Runtime alone, the graph that export writes."""

from __future__ import annotations

import hashlib
import json
import lzma
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from networks import scrambled_model
from once import exported_graph, once

from espmedsam_edge.bundle import Bundle
from espmedsam_edge.errors import UserError
from espmedsam_edge.export.graph import FORBIDDEN
from espmedsam_edge.export.skeleton import build_skeleton
from espmedsam_edge.imaging.geometry import preprocess
from espmedsam_edge.model.checkpoint import CheckpointInfo, load_checkpoint, save_checkpoint
from espmedsam_edge.phantoms import phantom
from espmedsam_edge.runtime.segmenter import Segmenter
from espmedsam_edge.shipped.assembly import assemble, fill, weight_name
from espmedsam_edge.shipped.bundles import CHECKPOINT, METADATA_KEY, SCORES, SUMS, shipped_bundle, skeleton_name
from espmedsam_edge.shipped.packed import write_packed

SIZE = 128


@pytest.fixture(scope="module")
def skeleton() -> bytes:
    return once("skeleton.onnx", lambda: build_skeleton(scrambled_model().config, SIZE))


def _arrays(model: torch.nn.Module) -> dict[str, np.ndarray]:
    return {name: value.numpy() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("modality", ["fundus", "xray"])
def test_the_assembled_graph_is_the_exported_one(skeleton: bytes, modality: str) -> None:
    model = scrambled_model().eval()
    content = assemble(skeleton, _arrays(model), modality)
    assembled = onnx.load_from_string(content)
    exported = exported_graph(SIZE, modality=modality)
    operators = [Counter(node.op_type for node in proto.graph.node) for proto in (assembled, exported)]
    assert operators[0] == operators[1]
    assert not set(FORBIDDEN) & set(operators[0])
    assert [value.name for value in assembled.graph.input] == ["image"]
    import onnxruntime

    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    image = torch.randn(1, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model(image, modality).low_res_logits.numpy()
    found = session.run(None, {"image": image.numpy()})[0]
    assert np.abs(found - expected).max() <= 1e-4 * np.ptp(expected)


def test_a_filled_skeleton_is_valid_onnx_with_every_weight(skeleton: bytes) -> None:
    arrays = _arrays(scrambled_model())
    empty = onnx.load_from_string(skeleton)
    whole = onnx.load_from_string(fill(skeleton, arrays, "fundus"))
    onnx.checker.check_model(whole)
    weights = {value.name for value in empty.graph.input} - {"image"}
    constants = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in whole.graph.initializer}
    for name in weights:
        assert np.array_equal(constants[name], arrays[weight_name(name, "fundus")])
    assert any("modality" in name for name in weights)
    assert whole.opset_import == empty.opset_import
    assert list(whole.graph.node) == list(empty.graph.node)


def test_weights_of_another_preset_and_damaged_skeletons_are_refused(skeleton: bytes) -> None:
    arrays = _arrays(scrambled_model())
    lacking = {name: value for name, value in arrays.items() if "neck" not in name}
    with pytest.raises(UserError, match=r"no encoder\.neck"):
        fill(skeleton, lacking, "fundus")
    misshapen = {**arrays, "encoder.neck.0.weight": np.zeros((3, 3, 1, 1), np.float32)}
    with pytest.raises(UserError, match="do not fit"):
        assemble(skeleton, misshapen, "fundus")
    for damaged in (skeleton[:-7], b"\x3a\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff", b"\x07"):
        with pytest.raises(UserError, match="damaged"):
            fill(damaged, arrays, "fundus")


@pytest.fixture
def shipped(tmp_path: Path, skeleton: bytes) -> Path:
    """A weights folder as the package has one: two modalities of one size."""
    folder = tmp_path / "weights"
    model = scrambled_model()
    config = model.config.model_copy(update={"image_size": SIZE})
    targets = {"fundus": "retinal vessels", "xray": "lung fields"}
    info = CheckpointInfo(config=config, targets=targets, origin="trained")
    write_packed(folder / CHECKPOINT, _arrays(model), {METADATA_KEY: info.model_dump_json()})
    (folder / skeleton_name(SIZE)).write_bytes(lzma.compress(skeleton))
    files = [CHECKPOINT, skeleton_name(SIZE)]
    sums = [f"{hashlib.sha256((folder / name).read_bytes()).hexdigest()}  {name}\n" for name in files]
    (folder / SUMS).write_text("".join(sums))
    scores = {
        "fundus": {"dice": 71.2, "images": 14, "dataset": "drive", "required": 65},
        "xray": {"dice": 40.0, "images": 14, "dataset": "films", "required": 92},
    }
    (folder / SCORES).write_text(json.dumps(scores))
    return folder


def test_shipped_weights_segment_as_their_checkpoint(
    shipped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: list[str]
) -> None:
    monkeypatch.setenv("ESPMEDSAM_CACHE", str(tmp_path / "cache"))
    bundle = shipped_bundle("fundus", folder=shipped)
    assert len(said) == 1
    assert str(bundle.path) in said[0]
    assert bundle.manifest.weights.note == "fundus is usable for research: Dice 71.2 % on 14 test images of drive."
    assert bundle.path.is_relative_to(tmp_path / "cache")
    again = shipped_bundle("fundus", folder=shipped)
    assert (again.path, len(said)) == (bundle.path, 1)  # made once
    model, info = load_checkpoint(shipped / CHECKPOINT)
    assert info.modalities == ["fundus", "xray"]
    frame, _ = phantom("fundus", 3, (90, 110))
    with Segmenter.load(bundle) as segmenter:
        found = segmenter.segment(frame).logits
    with torch.no_grad():
        image = torch.from_numpy(preprocess(frame, SIZE, info.normalization))
        expected = model(image, "fundus").low_res_logits[0, 0].numpy()
    assert np.abs(found - expected).max() <= 1e-4 * np.ptp(expected)


def test_all_modalities_into_one_bundle_and_what_is_experimental(shipped: Path, tmp_path: Path) -> None:
    bundle = shipped_bundle(None, tmp_path / "all.bundle", shipped)
    assert Bundle.open(tmp_path / "all.bundle").manifest.modalities == ["fundus", "xray"]
    assert "xray is experimental: Dice 40.0 % on 14 test images of films." in bundle.manifest.weights.note


def test_unknown_modality_damage_and_absence_are_one_line(shipped: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="Did you mean 'fundus'"):
        shipped_bundle("fundsu", tmp_path / "b", shipped)
    with pytest.raises(UserError, match="without weights"):
        shipped_bundle("fundus", tmp_path / "b", tmp_path / "nowhere")
    file = shipped / CHECKPOINT
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(UserError, match="missing or damaged"):
        shipped_bundle("fundus", tmp_path / "b", shipped)
    assert not (tmp_path / "b").exists()


def test_a_packed_checkpoint_starts_training_and_export(shipped: Path, tmp_path: Path) -> None:
    model, info = load_checkpoint(shipped / CHECKPOINT)
    save_checkpoint(tmp_path / "plain.safetensors", model, info)
    plain, _ = load_checkpoint(tmp_path / "plain.safetensors")
    for name, value in plain.state_dict().items():
        assert torch.equal(value, model.state_dict()[name])


def test_assembling_imports_no_torch() -> None:
    code = "import sys, espmedsam_edge.shipped.bundles; print('torch' in sys.modules or 'onnx' in sys.modules)"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.strip() == "False"
