"""What is read of an ONNX file, against the onnx package and on bytes that are none: versions, weights elsewhere."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from espmedsam_edge.errors import UserError
from espmedsam_edge.onnx_file import OnnxHeader, check_self_contained, read_header


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
@pytest.mark.parametrize("place", PLACES)
def test_weights_outside_are_found_wherever_a_tensor_may_be(
    place: Callable[[Any, Any, Any], None], key_first: bool
) -> None:
    content = model_with(place, outside)
    assert KEY + VALUE in content
    content = content if key_first else content.replace(KEY + VALUE, VALUE + KEY)  # fields may be in any order
    with pytest.raises(UserError, match=r"graph\.onnx keeps weights outside the file"):
        check_self_contained(content, "graph.onnx")


@pytest.mark.parametrize("place", PLACES)
def test_weights_inside_are_fine_even_those_that_look_like_a_place(
    place: Callable[[Any, Any, Any], None],
) -> None:
    def inside(onnx: Any) -> Any:
        return onnx.numpy_helper.from_array(np.frombuffer(KEY + VALUE + b"!", np.uint8), "w")

    check_self_contained(model_with(place, inside), "graph.onnx")


def test_graphs_in_graphs_without_end_are_no_onnx() -> None:
    content = b""
    for _ in range(1000):
        for tag in (0x32, 0x2A, 0x0A):  # an attribute's graph, a node's attribute, a graph's node
            content = bytes([tag]) + _varint(len(content)) + content
    with pytest.raises(UserError, match="is not an ONNX graph"):
        check_self_contained(b"\x3a" + _varint(len(content)) + content, "graph.onnx")


def _varint(value: int) -> bytes:
    more, low = value >> 7, value & 0x7F
    return bytes([low | 0x80]) + _varint(more) if more else bytes([low])


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_no_damage_hides_weights_that_onnx_would_read_elsewhere(
    data: st.DataObject,
) -> None:
    """What is taken for whole has, where onnx can read it at all, no tensor outside."""
    onnx = pytest.importorskip("onnx", reason="needs onnx (extra export)")
    content = bytearray(model_with(data.draw(st.sampled_from(PLACES)), outside))
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    del content[data.draw(st.integers(len(content) // 2, len(content))) :]
    try:
        check_self_contained(bytes(content), "damaged.onnx")
    except UserError as error:
        assert "\n" not in str(error)  # noqa: PT017 (both outcomes are right)
        return
    try:
        model = onnx.load_from_string(bytes(content))
    except Exception:  # noqa: BLE001 (of protobuf, whichever implementation is installed)
        return
    assert not re.search(r"data_location: EXTERNAL|external_data", str(model))


@settings(max_examples=300, deadline=None)
@given(content=st.binary(max_size=200))
def test_any_bytes_are_whole_or_one_line(content: bytes) -> None:
    try:
        check_self_contained(content, "any.onnx")
    except UserError as error:
        assert "\n" not in str(error)  # noqa: PT017 (both outcomes are right)
