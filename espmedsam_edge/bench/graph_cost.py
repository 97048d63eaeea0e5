"""Counts what a graph computes and moves: operations by type, and bytes as its kernels would read and write them."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from espmedsam_edge.bench.roofline import GraphCost, Kernel
from espmedsam_edge.errors import UserError
from espmedsam_edge.machine.installation import why_missing

if TYPE_CHECKING:
    from onnx import NodeProto

    from espmedsam_edge.calibration.network import Network

_BITS = {"fp32": 32, "fp16": 16, "int8": 8, "int64": 64, "bool": 8}
# Kernels of their own beside the products. Everything else computes element by element.
_REDUCERS = frozenset(
    {
        "LayerNormalization",
        "Softmax",
        "AveragePool",
        "MaxPool",
        "GlobalAveragePool",
        "ReduceMean",
        "ReduceMax",
        "Resize",
    }
)
# What only says where values lie, or in which type; of a constant, folded into it.
_VIEWS = frozenset({"Reshape", "Identity", "Squeeze", "Unsqueeze", "Flatten"})
_STORED = frozenset({"DequantizeLinear", "QuantizeLinear", "Cast", "Transpose", *_VIEWS})


def graph_cost(content: bytes, where: str | Path = "the graph") -> GraphCost:
    """Count a graph as a compiler would run it.

    A product, normalisation, softmax or pooling is one kernel. Element-wise operators, casts and quantisers join the
    kernel whose output they alone use; what joins none is a kernel of its own. Reshape, Transpose, Slice, Split,
    Concat, Pad and Expand are left to the kernel that reads the result. Every kernel reads its inputs and writes its
    output once. Attention scores count as written and read, which a compiler with a fused attention kernel avoids.

    Raises:
        UserError: onnx is not installed, or the file is no static ONNX graph.
    """
    reason = why_missing("onnx", "export")
    if reason is not None:
        raise UserError(reason)
    from espmedsam_edge.calibration.network import Network

    return _Count(Network.parse(content, where)).cost()


@dataclass
class _Kernel:
    name: str
    type: str = ""
    flop: int = 0
    reads: dict[str, int] = field(default_factory=dict)  # tensor -> bytes
    output: str = ""


class _Count:
    def __init__(self, network: Network) -> None:
        self._network = network
        self._uses = Counter(name for node in network.nodes for name in node.input if name)
        self._uses.update(value.name for value in network.model.graph.output)
        self._writes: dict[str, _Kernel] = {}  # the last tensor of each kernel so far -> the kernel
        self._kernels: list[_Kernel] = []
        self._stored: dict[str, str] = {name: name for name in network.constants}  # made of a constant -> the constant

    def cost(self) -> GraphCost:
        from espmedsam_edge.calibration.network import MOVERS

        for node in self._network.nodes:
            if node.op_type in _STORED and node.input[0] in self._stored:
                self._stored[node.output[0]] = self._stored[node.input[0]]
                continue
            alone = bool(self._network.macs(node)) or node.op_type in _REDUCERS
            if alone or not (self._join(node) or node.op_type in MOVERS | _VIEWS):
                self._begin(node)
        constants = self._network.constants
        kernels = [
            Kernel(
                kernel.name,
                kernel.type,
                kernel.flop,
                sum(kernel.reads.values()) + self._bytes(kernel.output),
                sum(size for name, size in kernel.reads.items() if name in constants),
            )
            for kernel in self._kernels
        ]
        used = {name for kernel in self._kernels for name in kernel.reads if name in constants}
        return GraphCost(kernels, sum(self._bytes(name) for name in used))

    def _begin(self, node: NodeProto) -> None:
        macs = self._network.macs(node)
        kernel = _Kernel(node.name or node.output[0], self._network.product_type(node) if macs else "", 2 * macs)
        self._read(kernel, node, None)
        kernel.output = node.output[0]
        self._kernels.append(kernel)
        self._writes[node.output[0]] = kernel

    def _join(self, node: NodeProto) -> bool:
        """Let an element-wise operator, or one that moves values, become part of the kernel before it."""
        if len(node.output) != 1:
            return False
        for name in node.input:
            kernel = self._writes.get(name)
            if kernel is not None and self._uses[name] == 1:
                self._read(kernel, node, name)
                del self._writes[name]
                kernel.output = node.output[0]
                self._writes[node.output[0]] = kernel
                return True
        return False

    def _read(self, kernel: _Kernel, node: NodeProto, own: str | None) -> None:
        for name in node.input:
            if name and name != own:
                source = self._stored.get(name, name)
                kernel.reads[source] = self._bytes(source)

    def _bytes(self, tensor: str) -> int:
        bits = _BITS.get(self._network.type_name(tensor), 32)
        return math.prod(self._network.shape(tensor)) * bits // 8
