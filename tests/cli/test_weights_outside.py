"""Weights in a file that no hash covers: every command that reads a bundle's graph refuses it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
from toy_bundles import save_toy_graph
from trt_fixtures import ORIN

from espmedsam_edge.bundle import Manifest, Weights, write_bundle
from espmedsam_edge.cli import main
from espmedsam_edge.phantoms import phantom


def save_bundle(path: Path, *, key_first: bool) -> None:
    """A toy bundle that keeps its kernel in ``kernel.bin``: every hash in it is right."""
    onnx = pytest.importorskip("onnx", reason="needs onnx (extra export)")
    with write_bundle(path) as draft:
        file = draft.new_file("fp32.onnx")
        save_toy_graph(file)
        model = onnx.load(file)
        kernel = model.graph.initializer[0]
        draft.new_file("kernel.bin").write_bytes(kernel.raw_data)
        kernel.ClearField("raw_data")
        kernel.data_location = onnx.TensorProto.EXTERNAL
        kernel.external_data.add(key="location", value="kernel.bin")
        key, value = b"\x0a\x08location", b"\x12\x0akernel.bin"
        content = model.SerializeToString()
        assert key + value in content
        file.write_bytes(content if key_first else content.replace(key + value, value + key))
        np.testing.assert_array_equal(  # onnx and ONNX Runtime take both for the same graph
            onnx.numpy_helper.to_array(onnx.load(file).graph.initializer[0]).ravel(), [1.0, -0.5, 0.25]
        )
        graph = draft.graph("fp32.onnx", modality="fundus", precision="fp32", image_size=64)
        weights = Weights(checkpoint_sha256="0" * 64, origin="trained")
        draft.manifest = Manifest(preset="toy", weights=weights, graphs=[graph])


@pytest.mark.parametrize("key_first", [True, False])
@pytest.mark.parametrize("command", ["infer", "calibrate", "build"])
def test_weights_outside_the_graph_are_refused(
    command: str,
    key_first: bool,
    tmp_path: Path,
    gpu: Callable[[str], None],
    double: Callable[..., object],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    bundle, images = tmp_path / "b.bundle", tmp_path / "images"
    save_bundle(bundle, key_first=key_first)
    images.mkdir()
    for seed in range(20):
        cv2.imwrite(str(images / f"{seed}.png"), phantom("fundus", seed, (64, 64))[0])
    arguments = [command, str(bundle)]
    if command == "infer":
        arguments += [str(images), "--out", str(tmp_path / "out"), "--backend", "onnxruntime-cpu"]
    elif command == "calibrate":
        pytest.importorskip("modelopt", reason="needs nvidia-modelopt (extra calibrate)")
        arguments += [str(images), "--precision", "fp16"]
    else:
        monkeypatch.setenv("ESPMEDSAM_CACHE", str(tmp_path / "cache"))
        gpu(ORIN)
        double(release="10.3.0")
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert caught.value.code in (1, 2)
    assert "fp32.onnx is not run: it keeps weights outside the file." in error
