"""From an FP32 graph and a plan to the graph that goes into the bundle: ModelOpt, then tidied and made small."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from espmedsam_edge.calibration import modelopt_tools
from espmedsam_edge.calibration.network import QUANTISERS, Network
from espmedsam_edge.calibration.plan import LARGE, Plan, stored_in_fp16


def lower(network: Network, plan: Plan, thresholds: Mapping[str, float], image: NDArray[np.float32]) -> ModelProto:
    """The graph in the plan's precisions; input and output stay float32 and keep names and shapes.

    Args:
        network: the FP32 graph.
        plan: what each node computes in.
        thresholds: where each quantised activation is clipped.
        image: one real input.

    Raises:
        UserError: ModelOpt is missing, has changed, or failed.
    """
    model = network.model
    if plan.int8:
        nodes = [node for node in network.nodes if node.name in plan.int8]
        used = {node.input[0]: thresholds[node.input[0]] for node in nodes}
        model = modelopt_tools.quantise(model, [node.name for node in nodes], used, image)
        _free_other_readers(model, plan.int8)
    keep = plan.fp32
    if plan.has_fp16(network):
        model = modelopt_tools.to_fp16(model, lambda name: name in keep)
    return tidy(model)


def tidy(model: ModelProto) -> ModelProto:
    """Store each constant once and small, drop what tools left behind, and check the graph.

    AutoCast copies a constant for each reader and leaves the constants of FP32 nodes in FP32; and the exporter repeats
    a bag's keys and values for every window.
    """
    model = _copy(model)
    _store_repeated_once(model)
    _store_fp32_as_fp16(model)
    _merge_equal_constants(model)
    graph = model.graph
    del graph.value_info[:]
    for node in graph.node:
        node.doc_string = ""
        del node.metadata_props[:]
    onnx.checker.check_model(model, full_check=True)
    return model


def _free_other_readers(model: ModelProto, quantised: frozenset[str]) -> None:
    """Let all but the quantised nodes read the activation itself, not what INT8 left of it.

    The quantiser hands a quantised tensor to every reader, so where a block's input is quantised for its first layer
    the residual Add would lose the skip branch's digits too.
    """
    makers = {name: node for node in model.graph.node for name in node.output}
    for node in model.graph.node:
        if node.name in quantised or node.op_type == "DequantizeLinear":
            continue
        for index, name in enumerate(node.input):
            dequantise = makers.get(name)
            if dequantise is None or dequantise.op_type != "DequantizeLinear":
                continue
            quantise = makers.get(dequantise.input[0])
            if quantise is not None and quantise.op_type == "QuantizeLinear":
                node.input[index] = quantise.input[0]


def _copy(model: ModelProto) -> ModelProto:
    copy = ModelProto()
    copy.CopyFrom(model)
    return copy


def _store_repeated_once(model: ModelProto) -> None:
    """A large constant that is the same along its first axis is stored once and expanded when the graph is loaded."""
    added: list[NodeProto] = []
    shapes: dict[tuple[int, ...], str] = {}
    for tensor in list(model.graph.initializer):
        if tensor.data_type not in (TensorProto.FLOAT, TensorProto.FLOAT16) or np.prod(tensor.dims) < LARGE:
            continue
        values = numpy_helper.to_array(tensor)
        if values.ndim < 2 or len(values) < 2 or not (values == values[:1]).all():
            continue
        name, shape = tensor.name, tuple(values.shape)
        if shape not in shapes:
            shapes[shape] = f"{name}/shape"
            model.graph.initializer.append(numpy_helper.from_array(np.array(shape, np.int64), shapes[shape]))
        tensor.CopyFrom(numpy_helper.from_array(values[:1], f"{name}/once"))
        added.append(helper.make_node("Expand", [f"{name}/once", shapes[shape]], [name], name=f"{name}/Expand"))
    _prepend(model, added)


def _store_fp32_as_fp16(model: ModelProto) -> None:
    """Large constants of nodes kept in FP32 are stored in FP16 where that keeps their digits, with a Cast back."""
    scales = {node.input[1] for node in model.graph.node if node.op_type in QUANTISERS}
    added: list[NodeProto] = []
    for tensor in model.graph.initializer:
        values, name = numpy_helper.to_array(tensor), tensor.name
        if name in scales or not stored_in_fp16(values):
            continue
        tensor.CopyFrom(numpy_helper.from_array(values.astype(np.float16), f"{name}/fp16"))
        added.append(helper.make_node("Cast", [f"{name}/fp16"], [name], name=f"{name}/Cast", to=TensorProto.FLOAT))
    _prepend(model, added)


def _merge_equal_constants(model: ModelProto) -> None:
    kept: dict[tuple[int, tuple[int, ...], bytes], str] = {}
    renamed: dict[str, str] = {}
    tensors: list[TensorProto] = []
    for tensor in model.graph.initializer:
        values = numpy_helper.to_array(tensor)
        key = (tensor.data_type, tuple(values.shape), values.tobytes())
        if key in kept:
            renamed[tensor.name] = kept[key]
        else:
            kept[key] = tensor.name
            # As raw bytes: lists of numbers take a varint each.
            tensors.append(numpy_helper.from_array(values, tensor.name))
    for node in model.graph.node:
        for index, name in enumerate(node.input):
            if name in renamed:
                node.input[index] = renamed[name]
    used = {name for node in model.graph.node for name in node.input}
    del model.graph.initializer[:]
    model.graph.initializer.extend(tensor for tensor in tensors if tensor.name in used)


def _prepend(model: ModelProto, nodes: list[NodeProto]) -> None:
    if nodes:
        everything = [*nodes, *model.graph.node]
        del model.graph.node[:]
        model.graph.node.extend(everything)
