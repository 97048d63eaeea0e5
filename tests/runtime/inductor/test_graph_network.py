"""The network that Inductor compiles, made from a graph: operator for operator what ONNX Runtime computes."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from once import exported_graph
from onnx import TensorProto, helper, numpy_helper
from toy_bundles import toy_graph

from espmedsam_edge.errors import UserError
from espmedsam_edge.export.graph import store_weights
from espmedsam_edge.graph_rules import OPERATORS
from espmedsam_edge.onnx_file import GraphRefused
from espmedsam_edge.runtime.inductor.network import _OPERATORS, GraphNetwork
from espmedsam_edge.runtime.onnx_session import open_session

SHAPE = (2, 3, 6, 4)  # of the input of the small graphs
QUANTISED = {"QuantizeLinear", "DequantizeLinear"}


def both(content: bytes, image: NDArray[np.float32], arithmetic: str = "fp32") -> tuple[Any, Any]:
    """What the network and ONNX Runtime give."""
    with torch.no_grad():
        found = GraphNetwork(content, arithmetic, "g.onnx")(torch.from_numpy(image)).numpy()
    (expected,) = open_session(content, 1).run(None, {"image": image})
    return found, expected


def graph_of(*nodes: Any, **constants: NDArray[Any]) -> bytes:
    """A graph of ``image``, constants and nodes, the last of which gives ``logits``."""
    image = helper.make_tensor_value_info("image", TensorProto.FLOAT, SHAPE)
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, None)
    tensors = [numpy_helper.from_array(values, name) for name, values in constants.items()]
    graph = helper.make_graph(list(nodes), "g", [image], [logits], tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    return bytes(onnx.shape_inference.infer_shapes(model).SerializeToString())


def node(operator: str, *inputs: str, outputs: tuple[str, ...] = ("logits",), **attributes: Any) -> Any:
    return helper.make_node(operator, inputs, outputs, **attributes)


def whole(*numbers: int) -> NDArray[np.int64]:
    return np.array(numbers, np.int64)


def some(*shape: int, seed: int = 3) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


CASES: dict[str, bytes] = {
    "Add": graph_of(node("Add", "image", "c"), c=some(3, 1, 4)),
    "Sub": graph_of(node("Sub", "image", "c"), c=some(4)),
    "Mul": graph_of(node("Mul", "c", "image"), c=some(2, 1, 1, 1)),
    "Div": graph_of(node("Div", "image", "c"), c=some(6, 1) + 3),
    "Identity": graph_of(node("Identity", "image")),
    "Relu": graph_of(node("Relu", "image")),
    "Gelu": graph_of(node("Gelu", "image")),
    "Gelu by tanh": graph_of(node("Gelu", "image", approximate="tanh")),
    "Softmax": graph_of(node("Softmax", "image", axis=1)),
    "Softmax, last": graph_of(node("Softmax", "image")),
    "LayerNormalization": graph_of(
        node("LayerNormalization", "image", "scale", "bias", epsilon=1e-3), scale=some(4), bias=some(4, seed=4)
    ),
    "LayerNormalization over two axes": graph_of(
        node("LayerNormalization", "image", "scale", axis=2), scale=some(6, 4)
    ),
    "MatMul": graph_of(node("MatMul", "image", "c"), c=some(4, 5)),
    "MatMul, batched": graph_of(node("MatMul", "c", "image"), c=some(3, 7, 6)),
    "Conv": graph_of(node("Conv", "image", "w", "b", pads=[1, 1, 1, 1], strides=[2, 1]), w=some(5, 3, 3, 3), b=some(5)),
    "Conv, uneven pads": graph_of(node("Conv", "image", "w", pads=[0, 2, 1, 0], dilations=[2, 1]), w=some(4, 3, 2, 2)),
    "Conv, groups": graph_of(node("Conv", "image", "w", group=3), w=some(6, 1, 1, 3)),
    "Reshape": graph_of(node("Reshape", "image", "to"), to=whole(0, -1, 2)),
    "Reshape of zeros allowed": graph_of(node("Reshape", "image", "to", allowzero=1), to=whole(4, -1)),
    "Transpose": graph_of(node("Transpose", "image", perm=[2, 0, 3, 1])),
    "Transpose, reversed": graph_of(node("Transpose", "image")),
    "Concat": graph_of(node("Concat", "image", "c", "image", axis=-2), c=some(2, 3, 1, 4)),
    "Split": graph_of(
        node("Split", "image", "sizes", outputs=("a", "b"), axis=2), node("Sub", "b", "a"), sizes=whole(3, 3)
    ),
    "Split, last one smaller": graph_of(
        node("Split", "image", outputs=("a", "b"), axis=1, num_outputs=2), node("Add", "a", "b")
    ),
    "Slice": graph_of(
        node("Slice", "image", "from", "to", "axes", "steps"),
        **{"from": whole(1, -3), "to": whole(1 << 62, 4), "axes": whole(2, -1), "steps": whole(2, 1)},
    ),
    "Pad": graph_of(node("Pad", "image", "pads"), pads=whole(0, 0, 1, 2, 0, 1, 0, 3)),
    "Pad of some axes": graph_of(node("Pad", "image", "pads", "", "axes"), pads=whole(1, 0, 2, 1), axes=whole(-1, 1)),
    "Unsqueeze": graph_of(node("Unsqueeze", "image", "axes"), axes=whole(0, -1)),
    "Expand": graph_of(node("Expand", "image", "to"), to=whole(3, 2, 3, 6, 4)),
    "Where": graph_of(
        node("GreaterOrEqual", "image", "c", outputs=("m",)), node("Where", "m", "image", "c"), c=some(3, 6, 4)
    ),
    "Cast": graph_of(node("Cast", "image", outputs=("h",), to=TensorProto.FLOAT16), node("Cast", "h", to=1)),
}


@pytest.mark.parametrize("case", CASES)
def test_an_operator_is_what_onnx_runtime_computes(case: str) -> None:
    found, expected = both(CASES[case], some(*SHAPE, seed=7))
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)  # float32 sums of at most 48 products


def test_every_operator_without_integers_is_known() -> None:
    assert set(_OPERATORS) == set(OPERATORS) - QUANTISED
    assert {name for content in CASES.values() for name in _operators(content)} == set(_OPERATORS)


def _operators(content: bytes) -> set[str]:
    return {one.op_type for one in onnx.load_from_string(content).graph.node}


@pytest.mark.parametrize("published", [False, True])
def test_the_fused_network(published: bool) -> None:
    content = exported_graph(64, published=published).SerializeToString()
    found, expected = both(content, some(1, 3, 64, 64))
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.ptp(expected))  # rounding over some sixty layers


def test_weights_in_half_the_bytes() -> None:
    model = exported_graph(64)
    store_weights(model, "float16")
    found, expected = both(model.SerializeToString(), some(1, 3, 64, 64))
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.ptp(expected))


@pytest.mark.parametrize("arithmetic", ["bf16", "fp16"])
def test_a_reduced_arithmetic_is_used_throughout(arithmetic: str) -> None:
    network = GraphNetwork(exported_graph(64).SerializeToString(), arithmetic, "g.onnx")
    assert {str(buffer.dtype) for buffer in network.buffers()} == {
        "torch.bfloat16" if arithmetic == "bf16" else "torch.float16"
    }
    image = some(1, 3, 64, 64)
    found, expected = both(exported_graph(64).SerializeToString(), image, arithmetic)
    assert found.dtype == np.float32
    error = np.abs(found - expected).max() / np.ptp(expected)
    assert 1e-5 < error < (0.1 if arithmetic == "bf16" else 0.02)  # 8 and 11 bits


def test_a_graph_with_integers_is_one_line() -> None:
    content = graph_of(
        node("QuantizeLinear", "image", "scale", "zero", outputs=("q",)),
        node("DequantizeLinear", "q", "scale", "zero"),
        scale=np.float32(0.1).reshape(()),
        zero=np.zeros((), np.int8),
    )
    with pytest.raises(UserError, match=r"g\.onnx holds DequantizeLinear, which backend inductor does not compute"):
        GraphNetwork(content, "fp32", "g.onnx")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (graph_of(node("Pad", "image", "p", "v"), p=whole(0, 0, 1, 1, 0, 0, 1, 1), v=np.float32(2)), "with zeros"),
        (
            graph_of(node("Slice", "image", "a", "b", "x", "s"), a=whole(5), b=whole(0), x=whole(2), s=whole(-1)),
            "goes backwards",
        ),
    ],
)
def test_what_is_not_taught_is_refused_and_never_computed_otherwise(content: bytes, words: str) -> None:
    network = GraphNetwork(content, "fp32", "g.onnx")
    with pytest.raises(GraphRefused, match=words):
        network(torch.zeros(SHAPE))


def test_a_batch() -> None:
    found, expected = both(toy_graph(batch=3), some(3, 3, 64, 64))
    np.testing.assert_allclose(found, expected, atol=1e-5)
