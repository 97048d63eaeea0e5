"""A lowered graph, or a plan of one, as an FP32 graph that rounds where the device would: an honest gate on a CPU.

ONNX Runtime's CPU provider has no FP16 arithmetic: it computes such nodes in FP32 and drops the roundings between
them, so a graph that overflows on a GPU looks healthy. Here every tensor that is FP16 in the graph is rounded by
a pair of Casts that ONNX Runtime keeps, infinities included. Products accumulate in FP32, as on tensor cores; INT8
products are those of the dequantised numbers, exact as in INT32.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from espmedsam_edge.calibration.network import MOVERS, Network
from espmedsam_edge.calibration.plan import Plan, stored_in_fp16


def emulate(model: ModelProto) -> ModelProto:
    """The emulation of a graph of FP32, FP16 and Q/DQ nodes; same input, same output."""
    network = Network.of(model)
    emulated = ModelProto()
    emulated.CopyFrom(model)
    graph = emulated.graph
    for tensor in graph.initializer:
        if tensor.data_type == TensorProto.FLOAT16:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float32), tensor.name))
    constants = {tensor.name: tensor for tensor in graph.initializer}
    nodes: list[NodeProto] = []
    for node in graph.node:
        if node.op_type == "DequantizeLinear" and node.input[0] in constants:
            graph.initializer.append(_dequantised(node, constants))
        else:
            nodes += _emulated(network, node)
    del graph.node[:]
    del graph.value_info[:]
    graph.node.extend(nodes)
    return emulated


def _emulated(network: Network, node: NodeProto) -> list[NodeProto]:
    halves = [name for name in node.output if network.element_type(name) == TensorProto.FLOAT16]
    if node.op_type == "Cast" and network.is_float(node.input[0]) and network.is_float(node.output[0]):
        source = network.element_type(node.input[0])
        if halves and source == TensorProto.FLOAT:
            return _rounding(node.input[0], node.output[0])
        return [helper.make_node("Identity", node.input, node.output, name=node.name)]
    if not halves or node.op_type in MOVERS or node.op_type == "DequantizeLinear":
        return [node]
    emulated = NodeProto()
    emulated.CopyFrom(node)
    roundings: list[NodeProto] = []
    for index, name in enumerate(node.output):
        if name in halves:
            emulated.output[index] = f"{name}/exact"
            roundings += _rounding(f"{name}/exact", name)
    return [emulated, *roundings]


def _dequantised(node: NodeProto, constants: Mapping[str, TensorProto]) -> TensorProto:
    """A weight as numbers. Left as INT8, ONNX Runtime would multiply in INT8, where CPUs without VNNI saturate."""
    weight, scale = (numpy_helper.to_array(constants[name]) for name in node.input[:2])
    axis = {attribute.name: attribute.i for attribute in node.attribute}.get("axis", 1) % weight.ndim
    shape = [-1 if index == axis else 1 for index in range(weight.ndim)]
    return numpy_helper.from_array(weight.astype(np.float32) * scale.reshape(shape), node.output[0])


def _rounding(source: str, target: str) -> list[NodeProto]:
    return [
        helper.make_node("Cast", [source], [f"{target}/half"], name=f"{target}/round", to=TensorProto.FLOAT16),
        helper.make_node("Cast", [f"{target}/half"], [target], name=f"{target}/widen", to=TensorProto.FLOAT),
    ]


def simulate(network: Network, plan: Plan, thresholds: Mapping[str, float]) -> ModelProto:
    """The emulation of the graph that lowering by ``plan`` would give, without lowering it: made in a second."""
    return _Simulation(network, plan, thresholds).build()


class _Simulation:
    def __init__(self, network: Network, plan: Plan, thresholds: Mapping[str, float]) -> None:
        self.network, self.plan, self.thresholds = network, plan, thresholds
        self.nodes: list[NodeProto] = []
        self.constants: dict[str, TensorProto] = {}

    def build(self) -> ModelProto:
        for node in self.network.nodes:
            self._add(node)
        model = ModelProto()
        model.CopyFrom(self.network.model)
        graph = model.graph
        for part in (graph.node, graph.initializer, graph.value_info):
            del part[:]
        graph.node.extend(self.nodes)
        graph.initializer.extend(self.constants.values())
        return model

    def _is_half(self, tensor: str) -> bool:
        """Whether a tensor already is in FP16 where its maker leaves it."""
        maker = self.network.producers.get(tensor)
        return maker is not None and maker.name not in self.plan.fp32

    def _add(self, node: NodeProto) -> None:
        lowered = NodeProto()
        lowered.CopyFrom(node)
        half, quantised = node.name not in self.plan.fp32, node.name in self.plan.int8
        for index, name in enumerate(node.input):
            if not self.network.is_float(name):
                if name in self.network.constants:
                    self.constants[name] = self.network.constants[name]
            elif quantised and index == 0:
                lowered.input[index] = self._quantised_activation(name, half)
            elif name in self.network.constants:
                lowered.input[index] = self._constant(name, half, quantised and index == 1, node.op_type)
            elif half:
                lowered.input[index] = self._half(name)
        self.nodes.append(lowered)
        if half and node.op_type not in MOVERS:
            for index, name in enumerate(node.output):
                if self.network.is_float(name):
                    lowered.output[index] = f"{name}/exact"
                    self.nodes += _rounding(f"{name}/exact", name)

    def _half(self, tensor: str) -> str:
        if self._is_half(tensor):
            return tensor
        rounded = f"{tensor}/as_half"
        if not any(rounded in node.output for node in self.nodes):
            self.nodes += _rounding(tensor, rounded)
        return rounded

    def _quantised_activation(self, tensor: str, half: bool) -> str:
        result = f"{tensor}/quantised"
        if not any(result in node.output for node in self.nodes):
            scale = self.thresholds[tensor] / 127
            scale = np.float32(np.float16(scale) if half else scale)
            self._keep(f"{result}/scale", np.array(scale, np.float32))
            self._keep(f"{result}/zero", np.array(0, np.int8))
            parameters = [f"{result}/scale", f"{result}/zero"]
            self.nodes += [
                helper.make_node(
                    "QuantizeLinear", [self._half(tensor) if half else tensor, *parameters], [f"{result}/int8"]
                ),
                helper.make_node("DequantizeLinear", [f"{result}/int8", *parameters], [result]),
            ]
        return result

    def _constant(self, name: str, half: bool, quantised: bool, operator: str) -> str:
        values = numpy_helper.to_array(self.network.constants[name])
        if quantised:
            return self._keep(f"{name}/int8", fake_quantised(values, 0 if operator == "Conv" else 1, half=half))
        if half or stored_in_fp16(values):
            with np.errstate(over="ignore"):
                return self._keep(f"{name}/half", values.astype(np.float16).astype(np.float32))
        return self._keep(name, values)

    def _keep(self, name: str, values: NDArray[np.generic]) -> str:
        if name not in self.constants:
            self.constants[name] = numpy_helper.from_array(np.asarray(values), name)
        return name


def fake_quantised(weight: NDArray[np.float32], axis: int, *, half: bool = True) -> NDArray[np.float32]:
    """A weight as INT8 holds it: symmetric, a scale for each index of ``axis``, at use in FP16 if ``half``."""
    others = tuple(index for index in range(weight.ndim) if index != axis)
    scale = np.abs(weight).max(axis=others, keepdims=True) / np.float32(127)
    scale = np.where(scale > 0, scale, np.float32(1))
    levels = np.clip(np.rint(weight / scale), -127, 127)
    return np.asarray(levels * (scale.astype(np.float16).astype(np.float32) if half else scale), np.float32)
