"""Reads an ONNX file's version numbers, and whether it is whole, without the onnx package: a device need not have it.

It walks the fields of protobuf's wire format and skips what they hold, so that weights are not read.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from typing import BinaryIO

from espmedsam_edge.errors import UserError

# Fields of ModelProto and OperatorSetIdProto in onnx.proto
_IR_VERSION, _OPSET_IMPORT = 1, 8
_DOMAIN, _VERSION = 1, 2
_DEFAULT_DOMAINS = ("", "ai.onnx")
# Every message of onnx.proto that leads to a tensor: its fields that do, and the messages in them
_TOWARDS_TENSORS: dict[str, dict[int, str]] = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "function": {7: "node", 11: "attribute"},
    "graph": {1: "node", 5: "tensor", 15: "sparse tensor"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse tensor", 23: "sparse tensor"},
    "sparse tensor": {1: "tensor", 2: "tensor"},
}
_EXTERNAL_DATA, _DATA_LOCATION = 13, 14  # of TensorProto
_DEEPEST = 100  # messages in each other; protobuf's own readers stop there, too
# Protobuf's wire types; onnx.proto has no groups, the other two
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_LARGEST_FIELD = (1 << 29) - 1


@dataclass(frozen=True)
class OnnxHeader:
    """``opset`` is that of ONNX's own operators; None where the file does not say."""

    ir_version: int | None
    opset: int | None


class _NotOnnxError(Exception):
    """The bytes are no protobuf message such as ONNX's."""


def read_header(content: bytes) -> OnnxHeader | None:
    """The header of an ONNX file, or None when the bytes are no protobuf message such as it is."""
    ir_version: int | None = None
    opset: int | None = None
    try:
        stream = BytesIO(content)
        for number, kind, value in _fields(stream, len(content)):
            if (number, kind) == (_IR_VERSION, _VARINT):
                ir_version = value
            elif (number, kind) == (_OPSET_IMPORT, _BYTES):
                domain, version = _opset(stream, stream.tell() + value)
                opset = version if domain in _DEFAULT_DOMAINS else opset
    except _NotOnnxError:
        return None
    return OnnxHeader(ir_version, opset)


def check_self_contained(content: bytes, where: str) -> None:
    """Refuse a graph that keeps weights in another file, at a path of its choice: its hash says nothing about those.

    Tensors are looked for wherever ONNX has them: in graphs, nodes, functions, and the graphs within nodes.

    Args:
        content: of the ONNX file.
        where: what messages call it.

    Raises:
        UserError: it does, or it cannot be told because the file is not ONNX.
    """
    try:
        outside = _leads_outside(BytesIO(content), len(content), "model", 1)
    except _NotOnnxError as error:
        raise UserError(f"{where} is not an ONNX graph.", "Export the bundle again.", exit_code=1) from error
    if outside:
        raise UserError(f"{where} keeps weights outside the file.", "A bundle's graphs are whole; export it again.")


def _leads_outside(stream: BinaryIO, end: int, message: str, depth: int) -> bool:
    if depth > _DEEPEST:
        raise _NotOnnxError
    for number, kind, value in _fields(stream, end):
        if message == "tensor":
            if number == _EXTERNAL_DATA or (number == _DATA_LOCATION and value != 0):
                return True
        elif kind == _BYTES and number in _TOWARDS_TENSORS[message]:
            inner = _TOWARDS_TENSORS[message][number]
            if _leads_outside(stream, stream.tell() + value, inner, depth + 1):
                return True
    return False


def _opset(stream: BinaryIO, end: int) -> tuple[str, int | None]:
    domain, version = "", None
    for number, kind, value in _fields(stream, end):
        if (number, kind) == (_VERSION, _VARINT):
            version = value
        elif (number, kind) == (_DOMAIN, _BYTES):
            domain = stream.read(value).decode("utf-8", "replace")
    return domain, version


def _fields(stream: BinaryIO, end: int) -> Iterator[tuple[int, int, int]]:
    """The fields of the message from here to ``end``: (number, wire type, value).

    The value of a field of bytes is their count; the stream is then at the first of them, and wherever it is left, the
    next field is read from behind the last.
    """
    while stream.tell() < end:
        tag = _varint(stream)
        number, kind = tag >> 3, tag & 7
        if not 0 < number <= _LARGEST_FIELD or kind not in (_VARINT, _FIXED64, _BYTES, _FIXED32):
            raise _NotOnnxError
        value = _varint(stream) if kind in (_VARINT, _BYTES) else 0
        after = stream.tell() + {_VARINT: 0, _FIXED64: 8, _BYTES: value, _FIXED32: 4}[kind]
        if after > end:
            raise _NotOnnxError
        yield number, kind, value
        stream.seek(after)


def _varint(stream: BinaryIO) -> int:
    value = 0
    for shift in range(0, 70, 7):
        byte = stream.read(1)
        if not byte:
            raise _NotOnnxError
        value |= (byte[0] & 0x7F) << shift
        if byte[0] < 0x80:
            return value
    raise _NotOnnxError
