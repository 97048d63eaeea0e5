"""The ONNX graph: clean, static, named, and the same function in ONNX Runtime as in torch."""

from __future__ import annotations

import re
from collections import Counter

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from networks import scrambled_model
from once import exported_graph
from onnx import ModelProto, TensorProto, helper

from espmedsam_edge.bundle import Normalization
from espmedsam_edge.export.fusion import FusedSegmenter
from espmedsam_edge.export.graph import FORBIDDEN, OPSET, GraphError, build_graph, store_weights
from espmedsam_edge.export.verify import BOUNDS, compare
from espmedsam_edge.imaging.geometry import preprocess
from espmedsam_edge.model.esp_medsam import EspMedSam
from espmedsam_edge.phantoms import phantom


@pytest.fixture(scope="module", params=[False, True], ids=["paper", "published"])
def published(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture(scope="module")
def model(published: bool) -> EspMedSam:
    return scrambled_model(published=published)


@pytest.fixture(scope="module")
def graph(published: bool) -> ModelProto:
    return exported_graph(128, 2, published=published)


def run(graph: ModelProto, images: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {"image": images})
    return np.asarray(logits)


def images_like_the_modality() -> np.ndarray:
    pictures = [phantom("fundus", seed, (128, 128))[0] for seed in (1, 2)]
    return np.concatenate([preprocess(picture, 128, Normalization()) for picture in pictures])


def test_onnx_runtime_computes_what_torch_computes(model: EspMedSam, graph: ModelProto) -> None:
    images = images_like_the_modality()
    with torch.no_grad():
        output = model(torch.from_numpy(images), "fundus")
    agreement = compare(output.low_res_logits.numpy(), run(graph, images))
    assert agreement.within(BOUNDS["float32"]), agreement


def test_graph_is_static_and_clean(graph: ModelProto) -> None:
    operators = Counter(node.op_type for node in graph.graph.node)
    assert not set(operators) & set(FORBIDDEN)
    assert not {node.domain for node in graph.graph.node} - {""}
    assert [(entry.domain, entry.version) for entry in graph.opset_import] == [("", OPSET)]
    shapes = {
        value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in [*graph.graph.input, *graph.graph.output]
    }
    assert shapes == {"image": [2, 3, 128, 128], "logits": [2, 1, 32, 32]}
    assert operators["LayerNormalization"] > 0
    assert operators["Gelu"] > 0
    assert not set(operators) & {"Erf", "ReduceMean", "Pow", "Sqrt", "BatchNormalization", "Sigmoid", "Resize"}


def test_every_node_is_named_after_its_module(graph: ModelProto) -> None:
    names = [node.name for node in graph.graph.node]
    assert len(set(names)) == len(names)
    assert all(re.fullmatch(r"[\w.]+/\w+_\d+", name) for name in names), names[:5]
    assert any(name.startswith("encoder.stages.1.0.attention/MatMul") for name in names)


def test_no_trace_of_the_machine_is_left(graph: ModelProto) -> None:
    data = graph.SerializeToString()
    assert b".py" not in data
    assert b"stack_trace" not in data


def test_weights_are_stored_once(graph: ModelProto) -> None:
    tensors = [tensor.SerializeToString()[-256:] for tensor in graph.graph.initializer if np.prod(tensor.dims) > 4096]
    assert len(set(tensors)) == len(tensors)


def test_half_storage_halves_the_file_and_stays_within_bounds(model: EspMedSam, graph: ModelProto) -> None:
    half = onnx.ModelProto()
    half.CopyFrom(graph)
    store_weights(half, "float16")
    images = images_like_the_modality()
    assert len(half.SerializeToString()) < 0.6 * len(graph.SerializeToString())
    agreement = compare(run(graph, images), run(half, images))
    assert agreement.within(BOUNDS["float16"]), agreement
    assert agreement.max_error > 0  # something was rounded


def test_values_that_half_cannot_hold_stay_in_float32() -> None:
    big = np.full((64, 64), 1e6, np.float32)
    small = np.full((64, 64), 0.5, np.float32)
    model = helper.make_model(
        helper.make_graph(
            [helper.make_node("MatMul", ["x", "big"], ["y"]), helper.make_node("MatMul", ["y", "small"], ["z"])],
            "g",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 64])],
            [helper.make_tensor_value_info("z", TensorProto.FLOAT, [1, 64])],
            [onnx.numpy_helper.from_array(big, "big"), onnx.numpy_helper.from_array(small, "small")],
        ),
        opset_imports=[helper.make_opsetid("", OPSET)],
    )
    store_weights(model, "float16")
    kinds = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    assert kinds == {"big": TensorProto.FLOAT, "small.fp16": TensorProto.FLOAT16}


class _Scatter(torch.nn.Module):
    def forward(self, image: torch.Tensor) -> torch.Tensor:
        result = torch.zeros(1, 1, 16, 16)
        result[:, :, 2:5] = image[:, :1, :3, :16]
        return result


def test_a_graph_with_a_refused_operator_is_not_handed_on() -> None:
    with pytest.raises(GraphError, match="ScatterND"):
        build_graph(_Scatter(), 64)


def test_agreement_by_hand() -> None:
    reference = np.array([[[[-1.0, 1.0], [3.0, -1.0]]]], np.float32)
    candidate = np.array([[[[-1.0, 1.0], [3.0, 0.6]]]], np.float32)
    agreement = compare(reference, candidate)
    assert agreement.max_error == pytest.approx(1.6 / 4)
    assert agreement.mask_agreement == 0.75


def test_the_same_weights_give_the_same_bytes() -> None:
    """In one state of torch: its settings, such as the number of threads, may round otherwise."""
    one, other = (build_graph(FusedSegmenter(scrambled_model(), "fundus", 64), 64) for _ in range(2))
    assert one.SerializeToString(deterministic=True) == other.SerializeToString(deterministic=True)
