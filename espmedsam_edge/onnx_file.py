"""Reads an ONNX file's version numbers, and whether it is whole, without the onnx package: a device need not have it.

It walks the fields of protobuf's wire format and skips what they hold, so that weights are not read.
"""

from __future__ import annotations

from dataclasses import dataclass
from io import BytesIO
from typing import BinaryIO

from espmedsam_edge.errors import UserError
from espmedsam_edge.protobuf import BYTES, VARINT, NotProtobufError, fields

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


@dataclass(frozen=True)
class OnnxHeader:
    """``opset`` is that of ONNX's own operators; None where the file does not say."""

    ir_version: int | None
    opset: int | None


def read_header(content: bytes) -> OnnxHeader | None:
    """The header of an ONNX file, or None when the bytes are no protobuf message such as it is."""
    ir_version: int | None = None
    opset: int | None = None
    try:
        stream = BytesIO(content)
        for number, kind, value, *_ in fields(stream, len(content)):
            if (number, kind) == (_IR_VERSION, VARINT):
                ir_version = value
            elif (number, kind) == (_OPSET_IMPORT, BYTES):
                domain, version = _opset(stream, stream.tell() + value)
                opset = version if domain in _DEFAULT_DOMAINS else opset
    except NotProtobufError:
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
    except NotProtobufError as error:
        raise UserError(f"{where} is not an ONNX graph.", "Export the bundle again.", exit_code=1) from error
    if outside:
        raise UserError(f"{where} keeps weights outside the file.", "A bundle's graphs are whole; export it again.")


def _leads_outside(stream: BinaryIO, end: int, message: str, depth: int) -> bool:
    if depth > _DEEPEST:
        raise NotProtobufError("messages too deep in each other")
    for number, kind, value, *_ in fields(stream, end):
        if message == "tensor":
            if number == _EXTERNAL_DATA or (number == _DATA_LOCATION and value != 0):
                return True
        elif kind == BYTES and number in _TOWARDS_TENSORS[message]:
            inner = _TOWARDS_TENSORS[message][number]
            if _leads_outside(stream, stream.tell() + value, inner, depth + 1):
                return True
    return False


def _opset(stream: BinaryIO, end: int) -> tuple[str, int | None]:
    domain, version = "", None
    for number, kind, value, *_ in fields(stream, end):
        if (number, kind) == (_VERSION, VARINT):
            version = value
        elif (number, kind) == (_DOMAIN, BYTES):
            domain = stream.read(value).decode("utf-8", "replace")
    return domain, version
