"""A bundle's graph as a torch module, operator for operator: what Inductor compiles. Runs no code from any file."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from espmedsam_edge.errors import UserError
from espmedsam_edge.graph_rules import Call
from espmedsam_edge.onnx_file import INT64, TYPES, GraphRefused, OnnxNode, OnnxTensor, read_onnx

_TYPES = {1: torch.float32, 9: torch.bool, 10: torch.float16, 16: torch.bfloat16}
"""TensorProto.data_type -> torch's, of what a network computes in."""

ARITHMETICS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class GraphNetwork(nn.Module):
    """An ONNX graph of this program as a module: ``image`` in, ``logits`` out, both float32.

    Args:
        content: the graph, checked as ``Bundle.read_graph`` does.
        arithmetic: what its float32 tensors are computed in: a key of ``ARITHMETICS``, or "graph" for as they are.
        name: what errors call it.

    Raises:
        UserError: an operator that torch has not been taught here, such as an INT8 graph's.
    """

    def __init__(self, content: bytes, arithmetic: str, name: str) -> None:
        super().__init__()
        graph = read_onnx(content)
        self._reduced = ARITHMETICS.get(arithmetic, torch.float32)
        self._nodes, self._constants = graph.nodes, graph.constants
        self._input, self._output = next(n for n in graph.inputs if n not in graph.constants), graph.outputs[0]
        foreign = sorted({node.operator for node in graph.nodes} - set(_OPERATORS))
        if foreign:
            raise UserError(
                f"{name} holds {foreign[0]}, which backend inductor does not compute.",
                "It takes fp32 and fp16 graphs: choose one with --precision.",
                exit_code=1,
            )
        self._buffer_of: dict[str, str] = {}
        for tensor in graph.constants.values():
            if tensor.kind != INT64:  # those are sizes and axes
                self._buffer_of[tensor.name] = f"c{len(self._buffer_of)}"
                values = _values(content, tensor, name)
                self.register_buffer(self._buffer_of[tensor.name], self._lowered(values))

    def forward(self, image: Tensor) -> Tensor:
        """(B, 3, S, S) -> (B, 1, S/4, S/4)."""
        values: dict[str, Tensor] = {name: getattr(self, buffer) for name, buffer in self._buffer_of.items()}
        values[self._input] = self._lowered(image)
        for node in self._nodes:
            call = _TorchCall(node, values, self._constants, self._reduced)
            given = _OPERATORS[node.operator](call)
            values.update(zip(node.outputs, given if isinstance(given, (list, tuple)) else [given], strict=False))
        return values[self._output].float()

    def _lowered(self, values: Tensor) -> Tensor:
        return values.to(self._reduced) if values.dtype == torch.float32 else values


def _values(content: bytes, tensor: OnnxTensor, name: str) -> Tensor:
    kind = np.dtype(TYPES[tensor.kind])
    if tensor.raw[1]:
        array = np.frombuffer(content[slice(*tensor.raw)], kind)
    elif tensor.values is not None and kind.kind == "f" and kind.itemsize >= 4:  # halves are listed as their bits
        array = np.array(tensor.values, kind)
    else:
        raise UserError(f"{name} lists the values of '{tensor.name}', as no graph of this program does.", "Export it.")
    if tensor.kind not in _TYPES:
        raise UserError(f"{name} holds '{tensor.name}' of type {tensor.kind}.", "Export it again.", exit_code=1)
    values = torch.from_numpy(array.reshape(tensor.shape).copy())
    return values.view(torch.bfloat16) if tensor.kind == 16 else values


class _TorchCall(Call):
    """A node with the tensors that it reads."""

    def __init__(
        self, node: OnnxNode, values: dict[str, Tensor], constants: dict[str, OnnxTensor], float32: torch.dtype
    ) -> None:
        self.tensors = [values.get(name) for name in node.inputs]
        super().__init__(node, [() if t is None else tuple(t.shape) for t in self.tensors], constants)
        self.float32 = float32

    def __getitem__(self, index: int) -> Any:
        """An input: a tensor, or None where it is left out."""
        return self.tensors[index] if self.has(index) else None

    def listed(self, index: int) -> tuple[float, ...] | None:
        """The values of an input that is a small constant."""
        tensor = self._constants.get(self.node.inputs[index])
        return None if tensor is None else tensor.values

    def fraction(self, name: str, default: float) -> float:
        """A floating-point number among the attributes."""
        value = self.node.attributes.get(name, default)
        if not isinstance(value, float):
            raise GraphRefused(f"the {name} of its {self.node.operator} is no number")
        return value

    def word(self, name: str, default: str) -> str:
        """A word among the attributes."""
        return str(self.node.attributes.get(name, default))


_Operator = Callable[[_TorchCall], Tensor | tuple[Tensor, ...] | list[Tensor]]


def _cast(call: _TorchCall) -> Tensor:
    to = _TYPES[call.number("to", 0)]
    return call[0].to(call.float32 if to == torch.float32 else to)


def _conv(call: _TorchCall) -> Tensor:
    image, weight = call[0], call[1]
    rank = image.ndim - 2
    pads = call.numbers("pads", [0] * 2 * rank)
    begins, ends = pads[:rank], pads[rank:]
    if begins != ends:
        image = F.pad(image, [side for pair in zip(begins[::-1], ends[::-1], strict=True) for side in pair])
        begins = [0] * rank
    bias = call[2] if len(call.tensors) > 2 else None
    convolve = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[rank]
    strides, dilations = call.numbers("strides", [1] * rank), call.numbers("dilations", [1] * rank)
    return convolve(image, weight, bias, strides, begins, dilations, call.number("group", 1))


def _gelu(call: _TorchCall) -> Tensor:
    approximate: Literal["none", "tanh"] = "tanh" if call.word("approximate", "none") == "tanh" else "none"
    return F.gelu(call[0], approximate=approximate)


def _layer_norm(call: _TorchCall) -> Tensor:
    axis = call.number("axis", -1)
    shape = call.shapes[0][axis:]
    bias = call[2] if len(call.tensors) > 2 else None
    return F.layer_norm(call[0], shape, call[1], bias, call.fraction("epsilon", 1e-5))


def _pad(call: _TorchCall) -> Tensor:
    if call.word("mode", "constant") != "constant" or (call.has(2) and call.listed(2) != (0,)):
        raise GraphRefused("a Pad of it does not pad with zeros")
    rank, pads = call[0].ndim, call.sizes(1)
    axes = [axis % rank for axis in call.sizes(3)] if call.has(3) else list(range(rank))
    sides = {axis: (pads[index], pads[index + len(axes)]) for index, axis in enumerate(axes)}
    return F.pad(call[0], [side for axis in reversed(range(rank)) for side in sides.get(axis, (0, 0))])


def _reshape(call: _TorchCall) -> Tensor:
    source, wanted = call.shapes[0], call.sizes(1)
    if call.number("allowzero", 0) == 0:
        wanted = [source[index] if size == 0 else size for index, size in enumerate(wanted)]
    return call[0].reshape(wanted)


def _slice(call: _TorchCall) -> Tensor:
    begins, ends = call.sizes(1), call.sizes(2)
    axes = call.sizes(3) if call.has(3) else list(range(len(begins)))
    steps = call.sizes(4) if call.has(4) else [1] * len(begins)
    places = [slice(None)] * call[0].ndim
    for begin, end, axis, step in zip(begins, ends, axes, steps, strict=True):
        if step < 1:
            raise GraphRefused("a Slice of it goes backwards")
        places[axis % len(places)] = slice(*slice(begin, end, step).indices(call.shapes[0][axis]))
    return call[0][tuple(places)]


def _split(call: _TorchCall) -> tuple[Tensor, ...]:
    axis = call.number("axis", 0)
    count = len(call.node.outputs)
    return call[0].split(call.sizes(1) if call.has(1) else -(-call.shapes[0][axis] // count), axis)


def _unsqueeze(call: _TorchCall) -> Tensor:
    axes, rank = call.sizes(1), call[0].ndim
    places = {axis % (rank + len(axes)) for axis in axes}
    rest = iter(call.shapes[0])
    return call[0].reshape([1 if index in places else next(rest) for index in range(rank + len(axes))])


_OPERATORS: dict[str, _Operator] = {
    "Add": lambda call: call[0] + call[1],
    "Cast": _cast,
    "Concat": lambda call: torch.cat([call[index] for index in range(len(call.tensors))], call.number("axis", 0)),
    "Conv": _conv,
    "Div": lambda call: call[0] / call[1],
    "Expand": lambda call: call[0] * torch.ones(call.sizes(1), dtype=call[0].dtype, device=call[0].device),
    "Gelu": _gelu,
    "GreaterOrEqual": lambda call: call[0] >= call[1],
    "Identity": lambda call: call[0],
    "LayerNormalization": _layer_norm,
    "MatMul": lambda call: call[0] @ call[1],
    "Mul": lambda call: call[0] * call[1],
    "Pad": _pad,
    "Relu": lambda call: F.relu(call[0]),
    "Reshape": _reshape,
    "Slice": _slice,
    "Softmax": lambda call: F.softmax(call[0], call.number("axis", -1)),
    "Split": _split,
    "Sub": lambda call: call[0] - call[1],
    "Transpose": lambda call: call[0].permute(call.numbers("perm", range(len(call.shapes[0]))[::-1])),
    "Unsqueeze": _unsqueeze,
    "Where": lambda call: torch.where(call[0], call[1], call[2]),
}
"""The floating-point operators of ``graph_rules``, in torch."""
