"""An ONNX graph seen as layers: makers and readers of tensors, shapes, types, groups, multiply-accumulates."""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, numpy_helper

from espmedsam_edge.errors import UserError

MOVERS = frozenset(
    {"Reshape", "Transpose", "Slice", "Split", "Concat", "Pad", "Expand", "Identity", "Squeeze", "Unsqueeze", "Where"}
)
"""Operators that pass values on without computing: what comes out was in what went in."""

QUANTISERS = frozenset({"QuantizeLinear", "DequantizeLinear"})

_TYPE_NAMES: dict[int, str] = {
    TensorProto.FLOAT: "fp32",
    TensorProto.FLOAT16: "fp16",
    TensorProto.INT8: "int8",
    TensorProto.INT64: "int64",
    TensorProto.BOOL: "bool",
}

# The first that matches names a node's layer group; what belongs to none is a group of its own, the operator's scope.
_GROUPS = (
    (re.compile(r"encoder\.stages\.\d+\.\d+\.(attention|mlp)"), None),
    (re.compile(r"encoder\.stages\.\d+\.\d+"), None),
    (re.compile(r"encoder\.downsamples\.\d+"), None),
    (re.compile(r"encoder\.stem"), None),
    (re.compile(r"encoder"), "encoder.neck"),
    (re.compile(r"prompt"), None),
    (re.compile(r"decoder\.(layers\.\d+|final|hypernetwork)"), "decoder.tokens"),
    (re.compile(r"decoder"), "decoder.upscaling"),
)


def group_of(node: str) -> str:
    """The layer group of a node by its name: a block's attention or MLP, a downsampling, the neck, the decoder."""
    for pattern, name in _GROUPS:
        match = pattern.match(node)
        if match:
            return name or match.group(0)
    return node.rsplit("/", 1)[0]


@dataclass(frozen=True)
class Network:
    """A model with what is asked of it again and again; the model must not be changed afterwards."""

    model: ModelProto

    @classmethod
    def parse(cls, content: bytes, where: str | Path = "the graph") -> Network:
        """Parse and type a graph; weights stored in float16 behind a Cast become the float32 constants they stand for.

        Raises:
            UserError: not an ONNX graph, or its shapes do not follow from its input.
        """
        try:
            return cls.of(_widened(onnx.load_from_string(content)))
        except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError, ValueError, RuntimeError) as error:
            first = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
            raise UserError(f"cannot read {where} as an ONNX graph: {first}", "Export the bundle again.") from error

    @classmethod
    def of(cls, model: ModelProto) -> Network:
        """A model with the shape and type of every tensor inferred."""
        bare = ModelProto()
        bare.CopyFrom(model)
        del bare.graph.value_info[:]  # stale types would win over inferred ones
        return cls(onnx.shape_inference.infer_shapes(bare, strict_mode=True, data_prop=True))

    @property
    def size(self) -> int:
        """Bytes that the graph takes as a file."""
        bare = ModelProto()
        bare.CopyFrom(self.model)
        del bare.graph.value_info[:]
        return int(bare.ByteSize())

    @property
    def nodes(self) -> list[NodeProto]:
        """In topological order."""
        return list(self.model.graph.node)

    @cached_property
    def constants(self) -> dict[str, TensorProto]:
        """The initializers by name."""
        return {tensor.name: tensor for tensor in self.model.graph.initializer}

    @cached_property
    def producers(self) -> dict[str, NodeProto]:
        """The node that makes a tensor."""
        return {name: node for node in self.model.graph.node for name in node.output}

    @cached_property
    def _values(self) -> dict[str, tuple[int, tuple[int, ...]]]:
        graph = self.model.graph
        values = {tensor.name: (tensor.data_type, tuple(tensor.dims)) for tensor in graph.initializer}
        for value in [*graph.value_info, *graph.input, *graph.output]:
            tensor = value.type.tensor_type
            values[value.name] = (tensor.elem_type, tuple(dim.dim_value for dim in tensor.shape.dim))
        return values

    def element_type(self, tensor: str) -> int:
        """ONNX's number of a tensor's type; 0 if unknown."""
        return self._values.get(tensor, (0, ()))[0]

    def shape(self, tensor: str) -> tuple[int, ...]:
        """A tensor's static shape."""
        return self._values[tensor][1]

    def is_float(self, tensor: str) -> bool:
        """Whether a tensor holds float32 or float16."""
        return self.element_type(tensor) in (TensorProto.FLOAT, TensorProto.FLOAT16)

    def type_name(self, tensor: str) -> str:
        """``fp32``, ``fp16``, ``int8``, ``int64``, ``bool`` or the number."""
        number = self.element_type(tensor)
        return _TYPE_NAMES.get(number, f"type {number}")

    def is_quantised(self) -> bool:
        """Whether any node quantises or dequantises."""
        return any(node.op_type in QUANTISERS for node in self.nodes)

    def product_type(self, node: NodeProto) -> str:
        """What a Conv or MatMul computes in: ``int8`` where both operands come from DequantizeLinear, as TensorRT."""
        operands = [self.producers.get(name) for name in node.input[:2]]
        if all(operand is not None and operand.op_type == "DequantizeLinear" for operand in operands):
            return "int8"
        return self.type_name(node.input[0])

    def macs(self, node: NodeProto) -> int:
        """Multiply-accumulates of a node; 0 for all but Conv, ConvTranspose, Gemm and MatMul."""
        if node.op_type == "MatMul":
            return math.prod(self.shape(node.output[0])) * self.shape(node.input[0])[-1]
        if node.op_type == "Gemm":
            return math.prod(self.shape(node.output[0])) * self.shape(node.input[1])[0]
        if node.op_type == "Conv":
            return math.prod(self.shape(node.output[0])) * math.prod(self.shape(node.input[1])[1:])
        if node.op_type == "ConvTranspose":
            return math.prod(self.shape(node.input[0])) * math.prod(self.shape(node.input[1])[1:])
        return 0

    def macs_by_type(self) -> dict[str, int]:
        """Multiply-accumulates by the type they are computed in."""
        counts: Counter[str] = Counter()
        for node in self.nodes:
            macs = self.macs(node)
            if macs:
                counts[self.product_type(node)] += macs
        return dict(counts)

    def nodes_by_type(self) -> dict[str, Counter[str]]:
        """How many nodes of each operator compute in each type; Casts and quantisers are left out."""
        table: dict[str, Counter[str]] = {}
        for node in self.nodes:
            if node.op_type in QUANTISERS or node.op_type == "Cast":
                continue
            type_name = self.product_type(node) if self.macs(node) else self.type_name(node.output[0])
            table.setdefault(node.op_type, Counter())[type_name] += 1
        return table

    def groups(self) -> dict[str, list[NodeProto]]:
        """The nodes of each layer group, groups in the order of the graph."""
        table: dict[str, list[NodeProto]] = {}
        for node in self.nodes:
            table.setdefault(group_of(node.name), []).append(node)
        return table


def _widened(model: ModelProto) -> ModelProto:
    graph = model.graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    nodes: list[NodeProto] = []
    for node in graph.node:
        to = {attribute.name: attribute.i for attribute in node.attribute}.get("to")
        stored = constants.get(node.input[0]) if node.op_type == "Cast" and to == TensorProto.FLOAT else None
        if stored is None or stored.data_type != TensorProto.FLOAT16:
            nodes.append(node)
            continue
        name = node.output[0]
        constants[name] = numpy_helper.from_array(numpy_helper.to_array(stored).astype(np.float32), name)
    used = {name for node in nodes for name in node.input}
    del graph.node[:], graph.initializer[:]
    graph.node.extend(nodes)
    graph.initializer.extend(tensor for name, tensor in constants.items() if name in used)
    return model
