"""Reads ONNX files without the onnx package, which a device need not have: versions, and graphs that came from outside.

A graph is read as far as its checks need it (``graph_rules``): nodes, attributes, the sizes of tensors and the values
of small ones. Time and memory are bounded by the file's size and by ``MOST_FIELDS``, whatever is in it.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from espmedsam_edge.protobuf import BYTES, FIXED32, VARINT, Field, NotProtobufError, fields, read_varint

MOST_FIELDS = 500_000
"""Of protobuf, in a graph: the largest that export writes have 30,000."""

_DEFAULT_DOMAINS = ("", "ai.onnx")
_SMALL = 1024  # elements of a tensor whose values may matter for shapes

# AttributeProto.type: the kinds that no graph or tensor is in
_FLOAT, _INT, _STRING, _FLOATS, _INTS, _STRINGS = 1, 2, 3, 6, 7, 8

INT64 = 7
"""TensorProto.INT64, the type of shapes and axes."""

TYPES = {
    1: "<f4", 2: "u1", 3: "i1", 4: "<u2", 5: "<i2", 6: "<i4", INT64: "<i8", 9: "u1", 10: "<f2", 11: "<f8", 12: "<u4",
    13: "<u8", 16: "<u2",
}  # fmt: skip
"""TensorProto.data_type -> its type in NumPy; no strings, complex numbers, or types of less than a byte."""

Attribute = float | str | tuple[float, ...] | tuple[str, ...]


_NO_ONNX = "it is not an ONNX graph"


class GraphRefused(Exception):  # it is the graph that is wrong
    """Why a graph is not run, as the end of a sentence: ``it keeps weights outside the file``."""


@dataclass(frozen=True)
class OnnxHeader:
    """``opset`` is that of ONNX's own operators; None where the file does not say."""

    ir_version: int | None
    opset: int | None


@dataclass
class OnnxTensor:
    """A constant: ``kind`` is TensorProto's number of its type; ``values`` are kept of small ones alone.

    ``raw`` is where its bytes lie in the file; empty for one whose values are listed.
    """

    name: str
    kind: int
    shape: tuple[int, ...]
    values: tuple[float, ...] | None = None
    raw: tuple[int, int] = (0, 0)


@dataclass
class OnnxNode:
    """An operator with the names of what it reads and gives."""

    operator: str = ""
    domain: str = ""
    inputs: list[str] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)
    attributes: dict[str, Attribute] = field(default_factory=dict)


@dataclass
class OnnxGraph:
    """A whole graph: no functions, no graphs in nodes, no weights elsewhere."""

    opsets: dict[str, int]
    nodes: list[OnnxNode]
    constants: dict[str, OnnxTensor]
    inputs: dict[str, tuple[int, ...]]
    outputs: list[str]
    properties: dict[str, str] = field(default_factory=dict)


def read_header(content: bytes) -> OnnxHeader | None:
    """The header of an ONNX file, or None when the bytes are no protobuf message such as it is."""
    ir_version: int | None = None
    opset: int | None = None
    walker = _Walker(content)
    try:
        for number, kind, start, end in walker.fields(0, len(content)):
            if (number, kind) == (1, VARINT):
                ir_version = walker.number(start)
            elif (number, kind) == (8, BYTES):
                domain, version = walker.opset(start, end)
                opset = version if domain in _DEFAULT_DOMAINS else opset
    except GraphRefused:
        return None
    return OnnxHeader(ir_version, opset)


def read_onnx(content: bytes) -> OnnxGraph:
    """The graph in an ONNX file, read in time that grows with the file's size alone.

    Raises:
        GraphRefused: it is no such file, or has what no graph of this program needs: functions, training, graphs or
            tensors in attributes, sparse tensors, weights in other files, inputs of unknown size.
    """
    return _Walker(content).model()


class _Walker:
    """A file's bytes, and how many more fields may be read of them."""

    def __init__(self, content: bytes) -> None:
        self.content, self.left = content, MOST_FIELDS

    def fields(self, start: int, end: int) -> Iterator[Field]:
        """The fields of the message from ``start`` to ``end``."""
        try:
            for found in fields(self.content, start, end):
                self._count()
                yield found
        except NotProtobufError as error:
            raise GraphRefused(_NO_ONNX) from error

    def _count(self) -> None:
        self.left -= 1
        if self.left < 0:
            raise GraphRefused(f"it has more than {MOST_FIELDS:,} fields")

    def _number(self, start: int) -> tuple[int, int]:
        try:
            value, end = read_varint(self.content, start)
        except NotProtobufError as error:
            raise GraphRefused(_NO_ONNX) from error
        return value - (1 << 64) if value >= 1 << 63 else value, end

    def number(self, start: int) -> int:
        """A signed number of 64 bits."""
        return self._number(start)[0]

    def text(self, start: int, end: int) -> str:
        """A name."""
        try:
            return self.content[start:end].decode()
        except UnicodeDecodeError as error:
            raise GraphRefused(_NO_ONNX) from error

    def numbers(self, kind: int, start: int, end: int) -> list[int]:
        """A repeated field's integers: one, or several packed."""
        if kind == VARINT:
            return [self.number(start)]
        values = []
        while start < end:
            self._count()
            value, start = self._number(start)
            values.append(value)
        return values

    def floats(self, start: int, end: int) -> list[float]:
        """A repeated field's float32: one, or several packed."""
        if (end - start) % 4:
            raise GraphRefused(_NO_ONNX)
        return list(struct.unpack(f"<{(end - start) // 4}f", self.content[start:end]))

    def opset(self, start: int, end: int) -> tuple[str, int]:
        """A set of operators: its domain and version."""
        domain, version = "", 0
        for number, kind, begin, stop in self.fields(start, end):
            if (number, kind) == (1, BYTES):
                domain = self.text(begin, stop)
            elif (number, kind) == (2, VARINT):
                version = self.number(begin)
        return domain, version

    def entry(self, start: int, end: int) -> tuple[str, str]:
        """A property: its name and value."""
        both = {number: self.text(a, b) for number, kind, a, b in self.fields(start, end) if kind == BYTES}
        return both.get(1, ""), both.get(2, "")

    def model(self) -> OnnxGraph:
        """ModelProto."""
        opsets: dict[str, int] = {}
        graphs: list[OnnxGraph] = []
        properties: dict[str, str] = {}
        for number, kind, start, end in self.fields(0, len(self.content)):
            if kind != BYTES:
                continue
            if number == 8:
                domain, version = self.opset(start, end)
                opsets["" if domain in _DEFAULT_DOMAINS else domain] = version
            elif number == 7:
                graphs.append(self.graph(start, end))
            elif number == 14:
                name, value = self.entry(start, end)
                if name in properties:
                    raise GraphRefused(_NO_ONNX)
                properties[name] = value
            elif number in (20, 25):
                raise GraphRefused("it holds " + ("training steps" if number == 20 else "functions"))
        if len(graphs) != 1:  # protobuf would merge several
            raise GraphRefused(_NO_ONNX)
        graphs[0].opsets, graphs[0].properties = opsets, properties
        return graphs[0]

    def graph(self, start: int, end: int) -> OnnxGraph:
        """GraphProto."""
        found = OnnxGraph({}, [], {}, {}, [])
        for number, kind, begin, stop in self.fields(start, end):
            if kind != BYTES:
                continue
            if number == 1:
                found.nodes.append(self.node(begin, stop))
            elif number == 5:
                tensor = self.tensor(begin, stop)
                if tensor.name in found.constants:
                    raise GraphRefused(f"it has two constants '{tensor.name}'")
                found.constants[tensor.name] = tensor
            elif number == 11:
                found.inputs[self.value_name(begin, stop)] = self.value_shape(begin, stop)
            elif number == 12:
                found.outputs.append(self.value_name(begin, stop))
            elif number == 15:
                raise GraphRefused("it holds sparse tensors")
        return found

    def node(self, start: int, end: int) -> OnnxNode:
        """NodeProto."""
        node = OnnxNode()
        for number, kind, begin, stop in self.fields(start, end):
            if kind != BYTES:
                continue
            if number == 1:
                node.inputs.append(self.text(begin, stop))
            elif number == 2:
                node.outputs.append(self.text(begin, stop))
            elif number == 4:
                node.operator = self.text(begin, stop)
            elif number == 7:
                node.domain = self.text(begin, stop)
            elif number == 5:
                name, value = self.attribute(begin, stop)
                if name in node.attributes:
                    raise GraphRefused(_NO_ONNX)
                node.attributes[name] = value
        return node

    def attribute(self, start: int, end: int) -> tuple[str, Attribute]:
        """AttributeProto, which says by its type which of its values counts."""
        name, kind_of, one = "", 0, {_FLOAT: 0.0, _INT: 0}
        text, ints, floats, texts = "", list[int](), list[float](), list[str]()
        for number, kind, begin, stop in self.fields(start, end):
            if (number, kind) == (1, BYTES):
                name = self.text(begin, stop)
            elif (number, kind) == (2, FIXED32):
                one[_FLOAT] = self.floats(begin, stop)[0]
            elif (number, kind) == (3, VARINT):
                one[_INT] = self.number(begin)
            elif (number, kind) == (4, BYTES):
                text = self.text(begin, stop)
            elif number == 7 and kind in (FIXED32, BYTES):
                floats += self.floats(begin, stop)
            elif number == 8 and kind in (VARINT, BYTES):
                ints += self.numbers(kind, begin, stop)
            elif (number, kind) == (9, BYTES):
                texts.append(self.text(begin, stop))
            elif (number, kind) == (20, VARINT):
                kind_of = self.number(begin)
            elif number in (5, 6, 10, 11, 14, 15, 21, 22, 23):
                raise GraphRefused("a node of it has a graph, a tensor or a reference in an attribute")
        several: dict[int, Attribute] = {
            _STRING: text, _FLOATS: tuple(floats), _INTS: tuple(ints), _STRINGS: tuple(texts),
        }  # fmt: skip
        if kind_of not in (*one, *several):
            raise GraphRefused(f"a node of it has an attribute of type {kind_of}")
        return name, one[kind_of] if kind_of in one else several[kind_of]

    def tensor(self, start: int, end: int) -> OnnxTensor:
        """TensorProto, whose bytes must be as many as its shape and type say."""
        name, kind_of, shape, raw = "", 0, list[int](), (0, 0)
        given: list[float] = []
        unread = 0  # packed floats that are too many to matter
        for number, kind, begin, stop in self.fields(start, end):
            if number == 1 and kind in (VARINT, BYTES):
                shape += self.numbers(kind, begin, stop)
            elif (number, kind) == (2, VARINT):
                kind_of = self.number(begin)
            elif number == 4 and kind == BYTES and stop - begin > 4 * _SMALL:
                unread += (stop - begin) // 4
            elif number == 4 and kind in (FIXED32, BYTES):
                given += self.floats(begin, stop)
            elif number in (5, 7) and kind in (VARINT, BYTES):
                given += self.numbers(kind, begin, stop)
            elif (number, kind) == (8, BYTES):
                name = self.text(begin, stop)
            elif (number, kind) == (9, BYTES):
                raw = (begin, stop)
            elif number == 13 or (number == 14 and kind == VARINT and self.number(begin) != 0):
                raise GraphRefused("it keeps weights outside the file")
        if kind_of not in TYPES:
            raise GraphRefused(f"its constant '{name}' is of type {kind_of}")
        count = math.prod(shape) if all(size >= 0 for size in shape) else -1
        kind_in_numpy = np.dtype(TYPES[kind_of])
        listed = len(given) + unread
        if count != (listed or (raw[1] - raw[0]) / kind_in_numpy.itemsize) or (listed and raw[1] > raw[0]):
            raise GraphRefused(f"its constant '{name}' has another size than its shape says")
        values = None
        if count <= _SMALL and not unread:
            values = tuple(given or np.frombuffer(self.content[slice(*raw)], kind_in_numpy).tolist())
        return OnnxTensor(name, kind_of, tuple(shape), values, raw)

    def value_name(self, start: int, end: int) -> str:
        """The name in a ValueInfoProto."""
        names = [self.text(a, b) for number, kind, a, b in self.fields(start, end) if (number, kind) == (1, BYTES)]
        return names[-1] if names else ""

    def value_shape(self, start: int, end: int) -> tuple[int, ...]:
        """The shape in a ValueInfoProto: its type's, which is a tensor's."""
        place = (start, end)
        for wanted in (2, 1, 2):  # ValueInfoProto.type, TypeProto.tensor_type, TypeProto.Tensor.shape
            found = [(a, b) for number, kind, a, b in self.fields(*place) if (number, kind) == (wanted, BYTES)]
            if len(found) != 1:  # protobuf would merge several
                raise GraphRefused("its input has no shape")
            place = found[0]
        shape = []
        for number, kind, begin, stop in self.fields(*place):
            if (number, kind) == (1, BYTES):
                sizes = [
                    self.number(a) for known, form, a, _ in self.fields(begin, stop) if (known, form) == (1, VARINT)
                ]
                if len(sizes) != 1:
                    raise GraphRefused("its input has no static shape")
                shape += sizes
        return tuple(shape)
