"""Small bundles whose graph computes something that a test can check by hand."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from espmedsam_edge.bundle import Bundle, Manifest, Weights, graph_file_name, write_bundle

TOY_SIZE = 64
TOY_CHANNEL_WEIGHTS = (1.0, -0.5, 0.25)  # on the normalised R, G and B planes
TOY_PATCH = np.full((4, 4), 1 / 16, np.float32)  # the weights of the pixels that make one logit
TOY_SECOND_CHANNEL_WEIGHTS = (-1.0, 0.5, -0.25)


def toy_graph(
    *,
    batch: int = 1,
    image_size: int = TOY_SIZE,
    weights: Iterable[float] = TOY_CHANNEL_WEIGHTS,
    patch: NDArray[np.float32] = TOY_PATCH,
) -> bytes:
    """An ONNX graph in a bundle's shape: logits are sums by ``patch`` of a weighted sum of the channels."""
    onnx = pytest.importorskip("onnx", reason="needs onnx (extra export) to build the toy graph")
    helper, float32 = onnx.helper, onnx.TensorProto.FLOAT
    kernel = np.asarray(list(weights), np.float32).reshape(1, 3, 1, 1)
    graph = helper.make_graph(
        [
            helper.make_node("Conv", ["image", "kernel"], ["sum"]),
            helper.make_node("Conv", ["sum", "average"], ["logits"], strides=[4, 4]),
        ],
        "toy",
        [helper.make_tensor_value_info("image", float32, [batch, 3, image_size, image_size])],
        [helper.make_tensor_value_info("logits", float32, [batch, 1, image_size // 4, image_size // 4])],
        [
            onnx.numpy_helper.from_array(kernel, "kernel"),
            onnx.numpy_helper.from_array(patch.reshape(1, 1, 4, 4), "average"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    return bytes(model.SerializeToString())


def save_toy_graph(file: Path, *, image_size: int = TOY_SIZE) -> None:
    """Write ``toy_graph``."""
    file.write_bytes(toy_graph(image_size=image_size))


def save_toy_bundle(
    path: Path,
    modalities: tuple[str, ...] = ("fundus",),
    *,
    batch: int = 1,
    image_size: int = TOY_SIZE,
    origin: str = "trained",
    patch: NDArray[np.float32] = TOY_PATCH,
) -> Bundle:
    """Write a bundle with one toy FP32 graph a modality; the second modality's weights are the first's negated."""
    with write_bundle(path) as draft:
        graphs = []
        for modality, weights in zip(modalities, (TOY_CHANNEL_WEIGHTS, TOY_SECOND_CHANNEL_WEIGHTS), strict=False):
            name = graph_file_name(modality, "fp32", len(modalities))
            draft.new_file(name).write_bytes(
                toy_graph(batch=batch, image_size=image_size, weights=weights, patch=patch)
            )
            graphs.append(draft.graph(name, modality=modality, precision="fp32", image_size=image_size, batch=batch))
        draft.manifest = Manifest(
            preset="toy",
            weights=Weights(checkpoint_sha256="0" * 64, origin=origin),  # type: ignore[arg-type]
            graphs=graphs,
        )
    return Bundle.open(path)
