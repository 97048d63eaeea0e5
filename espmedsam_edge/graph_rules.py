"""What a graph may be: a graph is a program, and one from outside must neither run for ever nor take the machine.

Accepted are the operators that export, calibrate and the assembly of the shipped weights write, each with a size that
follows from the file alone: no loops, no branches, no functions, no size that is computed. The sizes of all tensors
are worked out here, and refused where they are far above what such a network needs for its input.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

from espmedsam_edge.errors import UserError
from espmedsam_edge.onnx_file import INT64, TYPES, GraphRefused, OnnxGraph, OnnxNode, OnnxTensor, read_onnx

Shape = tuple[int, ...]

OPSETS = range(13, 27)
"""Of ONNX's own operators: before 13, axes and sizes stood elsewhere; export writes 20."""

_ORT_DOMAINS = frozenset(
    {"com.microsoft", "com.microsoft.experimental", "com.microsoft.nchwc", "ai.onnx.ml", "ai.onnx.preview",
     "ai.onnx.preview.training", "ai.onnx.training", "org.pytorch.aten"}
)  # fmt: skip
"""Sets of operators that ONNX Runtime lists in every graph it saves, as earlier versions of ``weights`` left them in
their bundles. None may be used."""

# The most numbers in a tensor, numbers alive at once, and multiply-accumulates, by pixels of the input. Of both presets
# at 64 to 1024 pixels the most is 16, 36 and 52,000, and 5 more alive for a MB of weights stored in float16.
_ELEMENTS, _ALIVE, _PRODUCTS = 64, 160, 400_000
_WRITTEN = 12_000
"""Numbers that all nodes give, by pixels of the input: of both presets at most 1,430, calibrated some more."""
_FOLDED = 2
"""Numbers computed from constants alone, which ONNX Runtime keeps from loading on, by bytes of the file: at most 1."""
_SMALLEST_SIDE = 256  # windows of 14 x 14 at stride 16 are padded to 224 pixels, however small the input
_MOST_NODES, _MOST_AXES = 20_000, 16

_MAY_CHANGE = ("target", "threshold")
"""Properties that somebody may set otherwise in the manifest: the graph computes the same."""

_WHAT_TO_DO = (
    "A bundle holds graphs that export and calibrate wrote: espmedsam-edge export WEIGHTS --out BUNDLE. "
    "A graph of your own can be compared with one: espmedsam-edge bench BUNDLE --compare FILE.onnx"
)


def check_graph(
    content: bytes, batch: int, image_size: int, where: str, properties: Mapping[str, str] = MappingProxyType({})
) -> None:
    """Refuse what this program would not have written.

    Args:
        content: an ONNX file.
        batch: of the input that its manifest gives it.
        image_size: S, its side in pixels.
        where: what messages call it.
        properties: what it may say of itself; graphs of earlier versions say nothing.

    Raises:
        UserError: it is damaged, says that it is another, or has an operator or sizes that no graph of this program
            has; names the first.
    """
    try:
        graph = read_onnx(content)
        _check_properties(graph.properties, properties)
        _Sizes(graph, batch * max(image_size, _SMALLEST_SIDE) ** 2, len(content)).check()
    except GraphRefused as error:
        raise UserError(f"{where} is not run: {error}.", _WHAT_TO_DO, exit_code=1) from error


def _check_properties(stated: Mapping[str, str], known: Mapping[str, str]) -> None:
    for name, value in stated.items():
        if name not in known:
            raise GraphRefused(f"it has the property '{name[:40]}', which no graph of this program has")
        if value != known[name] and name not in _MAY_CHANGE:
            raise GraphRefused(f"it says that its {name} is {value[:80]}, and its manifest {known[name][:80]}")


class _Sizes:
    """The shapes of a graph's tensors, worked out node by node."""

    def __init__(self, graph: OnnxGraph, pixels: int, file_bytes: int) -> None:
        self.graph = graph
        self.shapes: dict[str, Shape] = {name: tensor.shape for name, tensor in graph.constants.items()}
        # Constants may be stored in fewer bytes than they are used in, and computed from others.
        self.most_elements = _ELEMENTS * pixels + file_bytes
        self.most_alive = _ALIVE * pixels + file_bytes
        self.most_products = _PRODUCTS * pixels
        self.most_written = _WRITTEN * pixels + file_bytes
        self.most_folded = _FOLDED * file_bytes
        self.products = self.written = self.folded = 0
        self.constant = set(graph.constants)

    def check(self) -> None:
        """Refuse an operator or a size that no graph of this program has."""
        graph = self.graph
        foreign = sorted(set(graph.opsets) - _ORT_DOMAINS - {""})
        if foreign:
            raise GraphRefused(f"it wants the operators of '{foreign[0]}'")
        if graph.opsets.get("") not in OPSETS:
            raise GraphRefused(f"its operators are of version {graph.opsets.get('')}, not {OPSETS[0]} to {OPSETS[-1]}")
        if len(graph.nodes) > _MOST_NODES:
            raise GraphRefused(f"it has {len(graph.nodes):,} nodes")
        for node in graph.nodes:  # all of them first: a foreign graph is told by its operators, not by its shapes
            if node.domain not in ("", "ai.onnx") or node.operator not in OPERATORS:
                name = f"{node.domain}:{node.operator}" if node.domain else node.operator
                raise GraphRefused(f"it holds the operator {name}, which no graph of this program has")
        for name, shape in graph.inputs.items():
            if name not in graph.constants:
                self._add(name, shape)
        last_use = {name: index for index, node in enumerate(graph.nodes) for name in node.inputs}
        last_use |= dict.fromkeys(graph.outputs, len(graph.nodes))
        ends: dict[int, list[str]] = {}
        alive = 0
        for index, node in enumerate(graph.nodes):
            shapes = self._given(node)
            self._count(node, sum(map(math.prod, shapes)))
            for name, shape in zip(node.outputs, shapes, strict=False):
                self._add(name, shape)
                alive += math.prod(shape)
                ends.setdefault(last_use.get(name, index), []).append(name)
            if alive > self.most_alive:
                raise GraphRefused(f"it needs {4 * alive >> 20:,} MiB, far more than its input's size asks for")
            alive -= sum(math.prod(self.shapes[name]) for name in ends.pop(index, ()))
        if missing := [name for name in graph.outputs if name not in self.shapes]:
            raise GraphRefused(f"nothing gives its output '{missing[0]}'")

    def _count(self, node: OnnxNode, numbers: int) -> None:
        """Add what a node gives to the work of the graph, and to what is computed before it runs."""
        self.written += numbers
        if all(name in self.constant for name in node.inputs if name):
            self.constant.update(node.outputs)
            self.folded += numbers
        if self.written > self.most_written or self.folded > self.most_folded:
            raise GraphRefused("it computes far more than its input's size asks for")

    def _add(self, name: str, shape: Shape) -> None:
        if name in self.shapes:
            raise GraphRefused(f"'{name}' is given twice")
        if len(shape) > _MOST_AXES or any(size < 1 for size in shape):
            raise GraphRefused(f"'{name}' has the shape {_shown(shape)}")
        if math.prod(shape) > self.most_elements:
            raise GraphRefused(f"'{name}' would be {_shown(shape)}, far more than its input's size asks for")
        self.shapes[name] = shape

    def _given(self, node: OnnxNode) -> list[Shape]:
        """The shapes of a node's outputs."""
        operands = []
        for name in node.inputs:
            if name and name not in self.shapes:
                raise GraphRefused(f"{node.operator} reads '{name}', which nothing before it gives")
            operands.append(self.shapes[name] if name else ())
        rule = OPERATORS[node.operator]
        try:
            shapes = rule(Call(node, operands, self.graph.constants))
        except (ValueError, IndexError, TypeError, ZeroDivisionError) as error:
            raise GraphRefused(f"its {node.operator} of {', '.join(map(_shown, operands))} cannot be") from error
        if len(node.outputs) > len(shapes):
            raise GraphRefused(f"its {node.operator} gives {len(node.outputs)} values")
        if node.operator in ("MatMul", "Conv"):
            inner = operands[0][-1] if node.operator == "MatMul" else math.prod(operands[1][1:])
            self.products += math.prod(shapes[0]) * inner
            if self.products > self.most_products:
                raise GraphRefused("it computes far more than its input's size asks for")
        return shapes


class Call:
    """A node with the shapes of what it reads."""

    def __init__(self, node: OnnxNode, operands: Sequence[Shape], constants: dict[str, OnnxTensor]) -> None:
        self.node, self.shapes, self._constants = node, operands, constants

    def has(self, index: int) -> bool:
        """Whether an input is given."""
        return len(self.node.inputs) > index and bool(self.node.inputs[index])

    def sizes(self, index: int) -> list[int]:
        """An input's values, which must be whole numbers that stand in the file."""
        tensor = self._constants.get(self.node.inputs[index])
        if tensor is None or tensor.values is None or tensor.kind != INT64:
            raise GraphRefused(f"a {self.node.operator} of it has a size that is computed")
        return [int(value) for value in tensor.values]

    def number(self, name: str, default: int) -> int:
        """A whole number among the attributes."""
        value = self.node.attributes.get(name, default)
        if not isinstance(value, int):
            raise TypeError(name)
        return value

    def numbers(self, name: str, default: Sequence[int]) -> list[int]:
        """Whole numbers among the attributes."""
        value = self.node.attributes.get(name, tuple(default))
        if not isinstance(value, tuple):
            raise TypeError(name)
        return [int(each) for each in value]


def _axis(axis: int, rank: int) -> int:
    if not -rank <= axis < rank:
        raise ValueError(axis)
    return axis % rank


def _broadcast(*shapes: Shape) -> Shape:
    rank = max(map(len, shapes))
    padded = [(1,) * (rank - len(shape)) + shape for shape in shapes]
    sizes = []
    for column in zip(*padded, strict=True):
        several = {size for size in column if size != 1}
        if len(several) > 1:
            raise ValueError(column)
        sizes.append(several.pop() if several else 1)
    return tuple(sizes)


def _same(call: Call) -> list[Shape]:
    return [call.shapes[0]]


def _cast(call: Call) -> list[Shape]:
    if call.number("to", 0) not in TYPES:
        raise ValueError("type")
    return _same(call)


def _elementwise(call: Call) -> list[Shape]:
    return [_broadcast(*call.shapes)]


def _quantised(call: Call) -> list[Shape]:
    if call.number("block_size", 0) or any(len(shape) > 1 for shape in call.shapes[1:]):
        raise ValueError("blocks")
    return [call.shapes[0]]


def _matmul(call: Call) -> list[Shape]:
    left, right = call.shapes
    if min(len(left), len(right)) < 2 or left[-1] != right[-2]:
        raise ValueError("inner size")
    return (
        [(*_broadcast(left[:-2], right[:-2]), left[-2], right[-1])]
        if max(len(left), len(right)) > 2
        else [(left[0], right[1])]
    )


def _conv(call: Call) -> list[Shape]:
    image, weight = call.shapes[:2]
    rank, groups = len(image) - 2, call.number("group", 1)
    if call.node.attributes.get("auto_pad", "NOTSET") != "NOTSET" or rank < 1 or len(weight) != len(image):
        raise ValueError("auto_pad")
    if groups < 1 or image[1] != weight[1] * groups or weight[0] % groups:
        raise ValueError("channels")
    kernel = call.numbers("kernel_shape", weight[2:])
    pads, strides = call.numbers("pads", [0] * 2 * rank), call.numbers("strides", [1] * rank)
    dilations = call.numbers("dilations", [1] * rank)
    if tuple(kernel) != weight[2:] or min(pads) < 0 or min(strides) < 1 or min(dilations) < 1:
        raise ValueError("kernel")
    sides = []
    for index in range(rank):
        padded = image[2 + index] + pads[index] + pads[rank + index]
        sides.append((padded - dilations[index] * (kernel[index] - 1) - 1) // strides[index] + 1)
    return [(image[0], weight[0], *sides)]


def _reshape(call: Call) -> list[Shape]:
    source, wanted = call.shapes[0], call.sizes(1)
    if call.number("allowzero", 0) == 0:
        wanted = [source[index] if size == 0 else size for index, size in enumerate(wanted)]
    known = math.prod(size for size in wanted if size != -1)
    if wanted.count(-1) > 1 or min(wanted, default=1) < -1:
        raise ValueError(wanted)
    shape = tuple(math.prod(source) // known if size == -1 else size for size in wanted)
    if math.prod(shape) != math.prod(source):
        raise ValueError(wanted)
    return [shape]


def _transpose(call: Call) -> list[Shape]:
    source = call.shapes[0]
    order = call.numbers("perm", range(len(source))[::-1])
    if sorted(order) != list(range(len(source))):
        raise ValueError(order)
    return [tuple(source[axis] for axis in order)]


def _concat(call: Call) -> list[Shape]:
    first = call.shapes[0]
    axis = _axis(call.number("axis", 0), len(first))
    for shape in call.shapes:
        if len(shape) != len(first) or (shape[:axis], shape[axis + 1 :]) != (first[:axis], first[axis + 1 :]):
            raise ValueError(shape)
    return [(*first[:axis], sum(shape[axis] for shape in call.shapes), *first[axis + 1 :])]


def _split(call: Call) -> list[Shape]:
    source = call.shapes[0]
    axis = _axis(call.number("axis", 0), len(source))
    if call.has(1):
        parts = call.sizes(1)
    else:
        count = len(call.node.outputs)
        if call.number("num_outputs", count) != count:
            raise ValueError(count)
        each = -(-source[axis] // count)
        parts = [each] * (count - 1) + [source[axis] - each * (count - 1)]
    if sum(parts) != source[axis]:
        raise ValueError(parts)
    return [(*source[:axis], part, *source[axis + 1 :]) for part in parts]


def _slice(call: Call) -> list[Shape]:
    shape = list(call.shapes[0])
    begins, ends = call.sizes(1), call.sizes(2)
    axes = call.sizes(3) if call.has(3) else list(range(len(begins)))
    steps = call.sizes(4) if call.has(4) else [1] * len(begins)
    for begin, end, axis, step in zip(begins, ends, axes, steps, strict=True):
        place = _axis(axis, len(shape))
        shape[place] = len(range(call.shapes[0][place])[begin:end:step])
    return [tuple(shape)]


def _pad(call: Call) -> list[Shape]:
    shape, pads = list(call.shapes[0]), call.sizes(1)
    axes = call.sizes(3) if call.has(3) else list(range(len(shape)))
    for index, axis in enumerate(axes):
        shape[_axis(axis, len(shape))] += pads[index] + pads[index + len(axes)]
    return [tuple(shape)]


def _unsqueeze(call: Call) -> list[Shape]:
    axes = call.sizes(1)
    rank = len(call.shapes[0]) + len(axes)
    places = {_axis(axis, rank) for axis in axes}
    rest = iter(call.shapes[0])
    if len(places) != len(axes):
        raise ValueError(axes)
    return [tuple(1 if index in places else next(rest) for index in range(rank))]


def _expand(call: Call) -> list[Shape]:
    return [_broadcast(call.shapes[0], tuple(call.sizes(1)))]


OPERATORS: dict[str, Callable[[Call], list[Shape]]] = {
    **dict.fromkeys(("Add", "Div", "GreaterOrEqual", "Mul", "Sub", "Where"), _elementwise),
    **dict.fromkeys(("Gelu", "Identity", "LayerNormalization", "Relu", "Softmax"), _same),
    **dict.fromkeys(("QuantizeLinear", "DequantizeLinear"), _quantised),
    "Cast": _cast,
    "Concat": _concat,
    "Conv": _conv,
    "Expand": _expand,
    "MatMul": _matmul,
    "Pad": _pad,
    "Reshape": _reshape,
    "Slice": _slice,
    "Split": _split,
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
}
"""The operators of graphs that this program writes, each with how the shapes it gives follow from those it reads."""


def _shown(shape: Shape) -> str:
    return "x".join(map(str, shape)) or "one number"
