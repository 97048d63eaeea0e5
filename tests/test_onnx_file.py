"""What is read of an ONNX file, against the onnx package and on bytes that are none: versions, nodes, sizes."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_graphs import _field, plain_graph
from toy_bundles import toy_graph

from espmedsam_edge.onnx_file import GraphRefused, OnnxHeader, read_header, read_onnx


@pytest.mark.parametrize("domains", [["", "com.microsoft"], ["com.microsoft", ""], ["ai.onnx"], ["com.microsoft"], []])
def test_reads_what_onnx_wrote(domains: list[str]) -> None:
    onnx = pytest.importorskip("onnx", reason="needs onnx (extra export)")
    weights = onnx.numpy_helper.from_array(np.random.default_rng(0).standard_normal(10_000).astype(np.float32), "w")
    graph = onnx.helper.make_graph([], "g", [], [], [weights])
    versions = {domain: 21 if domain in ("", "ai.onnx") else 1 for domain in domains}
    opsets = [onnx.helper.make_opsetid(domain, version) for domain, version in versions.items()]
    model = onnx.helper.make_model(graph, ir_version=10, producer_name="someone")
    del model.opset_import[:]
    model.opset_import.extend(opsets)
    assert read_header(model.SerializeToString()) == OnnxHeader(10, 21 if {"", "ai.onnx"} & set(domains) else None)


def test_an_empty_file_says_nothing() -> None:
    assert read_header(b"") == OnnxHeader(None, None)


@settings(max_examples=300, deadline=None)
@given(content=st.binary(max_size=200))
def test_any_bytes_are_answered(content: bytes) -> None:
    found = read_header(content)
    assert found is None or isinstance(found, OnnxHeader)


def test_a_graph_is_read_as_onnx_reads_it() -> None:
    onnx = pytest.importorskip("onnx", reason="needs onnx (extra export)")
    helper = onnx.helper
    attributes = {
        "axis": -1,
        "epsilon": 0.25,
        "mode": "linear",
        "pads": [1, -2, 3],
        "alphas": [0.5, -1.5],
    }
    random = np.random.default_rng(0)
    constants = {
        "w": random.standard_normal((3, 500)).astype(np.float16),
        "sizes": np.array([-1, 2, 2**40], np.int64),
        "none": np.array([], np.float32),
        "one": np.float32(1.5),
        "bytes": random.integers(-128, 127, (7,), np.int8),
    }
    tensors = [onnx.numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()]
    listed = helper.make_tensor("listed", onnx.TensorProto.INT64, [3], [5, -6, 7])  # as numbers, not as bytes
    many = helper.make_tensor("many", onnx.TensorProto.FLOAT, [2000], [0.5] * 2000)
    graph = helper.make_graph(
        [helper.make_node("Any", ["image", "", "w"], ["logits", "more"], domain="own", **attributes)],
        "g",
        [helper.make_tensor_value_info("image", onnx.TensorProto.FLOAT, [1, 3, 64, 64])],
        [helper.make_tensor_value_info("logits", onnx.TensorProto.FLOAT, [1, 1, 16, 16])],
        [*tensors, listed, many],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20), helper.make_opsetid("own", 1)])
    found = read_onnx(model.SerializeToString())
    (node,) = found.nodes
    assert (node.operator, node.domain, node.inputs) == ("Any", "own", ["image", "", "w"])
    assert node.outputs == ["logits", "more"]
    expected = {a.name: helper.get_attribute_value(a) for a in graph.node[0].attribute}
    assert node.attributes == {
        name: value.decode() if isinstance(value, bytes) else tuple(value) if isinstance(value, list) else value
        for name, value in expected.items()
    }
    assert (found.opsets, found.inputs, found.outputs) == ({"": 20, "own": 1}, {"image": (1, 3, 64, 64)}, ["logits"])
    for tensor in graph.initializer:
        values = onnx.numpy_helper.to_array(tensor)
        read = found.constants.pop(tensor.name)
        assert (read.kind, read.shape) == (tensor.data_type, values.shape)
        assert read.values == (tuple(values.ravel().tolist()) if values.size <= 1024 else None)
    assert found.constants == {}


def outside(onnx: Any) -> Any:
    """A tensor whose values are in another file."""
    tensor = onnx.TensorProto(name="w", data_type=onnx.TensorProto.FLOAT, dims=[3])
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="w.bin")
    return tensor


def as_initializer(onnx: Any, model: Any, tensor: Any) -> None:
    model.graph.initializer.append(tensor)


def as_sparse_initializer(onnx: Any, model: Any, tensor: Any) -> None:
    model.graph.sparse_initializer.add().indices.CopyFrom(tensor)


def as_constant(onnx: Any, model: Any, tensor: Any) -> None:
    model.graph.node.append(onnx.helper.make_node("Constant", [], ["c"], value=tensor))


def in_a_list(onnx: Any, model: Any, tensor: Any) -> None:
    node = model.graph.node.add(op_type="Any")
    node.attribute.add(name="many", type=onnx.AttributeProto.TENSORS).tensors.append(tensor)


def as_sparse_constant(onnx: Any, model: Any, tensor: Any) -> None:
    node = model.graph.node.add(op_type="Constant")
    attribute = node.attribute.add(name="sparse_value", type=onnx.AttributeProto.SPARSE_TENSOR)
    attribute.sparse_tensor.values.CopyFrom(tensor)


def in_a_branch(onnx: Any, model: Any, tensor: Any) -> None:
    branch = onnx.helper.make_graph([], "branch", [], [], [tensor])
    model.graph.node.append(onnx.helper.make_node("If", ["yes"], ["c"], then_branch=branch, else_branch=branch))


def in_a_function(onnx: Any, model: Any, tensor: Any) -> None:
    constant = onnx.helper.make_node("Constant", [], ["c"], value=tensor)
    model.functions.append(onnx.helper.make_function("own", "F", [], ["c"], [constant], []))


def as_a_function_s_default(onnx: Any, model: Any, tensor: Any) -> None:
    model.functions.add(name="F").attribute_proto.append(onnx.helper.make_attribute("value", tensor))


def in_training(onnx: Any, model: Any, tensor: Any) -> None:
    model.training_info.add().initialization.initializer.append(tensor)


PLACES = [as_initializer, as_sparse_initializer, as_constant, in_a_list, as_sparse_constant, in_a_branch, in_a_function]
PLACES += [as_a_function_s_default, in_training]
KEY, VALUE = b"\x0a\x08location", b"\x12\x05w.bin"


def model_with(place: Callable[[Any, Any, Any], None], tensor: Callable[[Any], Any]) -> bytes:
    onnx = pytest.importorskip("onnx", reason="needs onnx (extra export)")
    inner = onnx.numpy_helper.from_array(np.random.default_rng(0).standard_normal(100).astype(np.float32), "v")
    model = onnx.helper.make_model(onnx.helper.make_graph([], "g", [], [], [inner]))
    place(onnx, model, tensor(onnx))
    return bytes(model.SerializeToString())


@pytest.mark.parametrize("key_first", [True, False])
def test_weights_outside_are_found_in_whatever_order_their_fields_are(key_first: bool) -> None:
    content = model_with(as_initializer, outside)
    assert KEY + VALUE in content
    with pytest.raises(GraphRefused, match="it keeps weights outside the file"):
        read_onnx(content if key_first else content.replace(KEY + VALUE, VALUE + KEY))


@pytest.mark.parametrize("place", PLACES[1:])
def test_tensors_anywhere_but_among_the_constants_are_refused(place: Callable[[Any, Any, Any], None]) -> None:
    with pytest.raises(GraphRefused, match=r"it holds (sparse|functions|training)|in an attribute"):
        read_onnx(model_with(place, outside))


def test_weights_inside_are_fine_even_those_that_look_like_a_place() -> None:
    def inside(onnx: Any) -> Any:
        return onnx.numpy_helper.from_array(np.frombuffer(KEY + VALUE + b"!", np.uint8), "w")

    assert set(read_onnx(model_with(as_initializer, inside)).constants) == {"v", "w"}


def test_a_constant_of_another_size_than_its_shape_is_refused() -> None:
    onnx = pytest.importorskip("onnx", reason="needs onnx (extra export)")
    model = onnx.load_from_string(toy_graph())
    for dims in ([1 << 31, 1 << 31], [-1, -3], [0], [1, 3, 1, 2]):
        del model.graph.initializer[0].dims[:]
        model.graph.initializer[0].dims.extend(dims)
        with pytest.raises(GraphRefused, match="constant 'kernel' has another size"):
            read_onnx(model.SerializeToString())


@pytest.mark.parametrize("twice", ["graph", "type"])
def test_messages_that_protobuf_would_merge_are_refused(twice: str) -> None:
    """Two graphs in a file are one to protobuf, with the nodes of both."""
    plain = plain_graph()
    evil = _field(7, _field(1, _field(4, b"Loop"))) if twice == "graph" else b""
    dims = _field(2, _field(1, _field(2, _field(1, _field(1, 8)))))
    evil = evil or _field(7, _field(11, _field(1, b"image") + dims + dims))
    with pytest.raises(GraphRefused, match=r"not an ONNX graph|no shape"):
        read_onnx(plain + evil)
    if twice == "type":
        with pytest.raises(GraphRefused, match="no shape"):
            read_onnx(evil)


@pytest.mark.parametrize(
    "tiny",
    [
        b"\x0a\x00" * 10_000_000,  # nodes that are empty
        _field(1, b"\x0a\x00" * 10_000_000),  # a node with as many inputs
        _field(5, b"\x08\x01" * 10_000_000),  # a tensor with as many axes
        _field(5, _field(1, b"\x01" * 20_000_000)),  # packed
        _field(99, b"\x08\x01" * 10_000_000),  # what nobody knows is not looked into
        b"\x98\x06\x01" * 7_000_000,
    ],
)
def test_twenty_megabytes_of_tiny_fields_are_answered_soon(tiny: bytes) -> None:
    begin = time.process_time()
    try:
        read_onnx(plain_graph(nodes=tiny))
    except GraphRefused as error:
        assert "500,000 fields" in str(error)  # noqa: PT017 (both outcomes are right)
    assert time.process_time() - begin < 5  # it took 37 s


def test_graphs_in_graphs_without_end_are_not_followed() -> None:
    content = b""
    for _ in range(1000):
        content = _field(5, _field(6, _field(1, content)))  # an attribute's graph, in a node
    with pytest.raises(GraphRefused, match="in an attribute"):
        read_onnx(_field(7, _field(1, content)))


@settings(max_examples=500, deadline=None)
@given(data=st.data())
def test_no_damage_is_read_otherwise_than_onnx_reads_it(data: st.DataObject) -> None:
    """What is accepted has, where onnx can read it at all, the same nodes and sizes there, and nothing besides."""
    onnx = pytest.importorskip("onnx", reason="needs onnx (extra export)")
    content = bytearray(data.draw(st.sampled_from([toy_graph(), plain_graph()])))
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    del content[data.draw(st.integers(len(content) // 2, 2 * len(content))) :]
    try:
        found = read_onnx(bytes(content))
    except GraphRefused as error:
        assert "\n" not in str(error)  # noqa: PT017 (both outcomes are right)
        return
    try:
        model = onnx.load_from_string(bytes(content))
    except Exception:  # noqa: BLE001 (of protobuf, whichever implementation is installed)
        return
    graph = model.graph
    assert [(n.operator, n.domain, n.inputs, n.outputs) for n in found.nodes] == [
        (n.op_type, n.domain, list(n.input), list(n.output)) for n in graph.node
    ]
    assert {t.name: t.shape for t in found.constants.values()} == {t.name: tuple(t.dims) for t in graph.initializer}
    assert not model.functions
    assert not model.training_info
    assert not graph.sparse_initializer
    assert not any(a.HasField("g") or a.HasField("t") or a.graphs for n in graph.node for a in n.attribute)
    assert not any(t.external_data or t.data_location for t in graph.initializer)
