"""Reads the two version numbers of an ONNX file without the onnx package, which a device need not have."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

# Fields of ModelProto and OperatorSetIdProto in onnx.proto
_IR_VERSION, _OPSET_IMPORT = 1, 8
_DOMAIN, _VERSION = 1, 2
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_DEFAULT_DOMAINS = ("", "ai.onnx")


@dataclass(frozen=True)
class OnnxHeader:
    """``opset`` is that of ONNX's own operators; None where the file does not say."""

    ir_version: int | None
    opset: int | None


def read_header(path: Path) -> OnnxHeader | None:
    """The header of an ONNX file, or None when the file is not a protobuf message such as one has. Reads little."""
    size = path.stat().st_size
    ir_version: int | None = None
    opset: int | None = None
    with path.open("rb") as stream:
        while stream.tell() < size:
            tag = _varint(stream)
            if tag is None:
                return None
            number, kind = tag >> 3, tag & 7
            if kind == _VARINT:
                value = _varint(stream)
                if value is None:
                    return None
                if number == _IR_VERSION:
                    ir_version = value
                continue
            length = {_FIXED64: 8, _FIXED32: 4}.get(kind) if kind != _BYTES else _varint(stream)
            if length is None or number == 0 or stream.tell() + length > size:
                return None
            if number == _OPSET_IMPORT and kind == _BYTES:
                domain, version = _opset(stream, stream.tell() + length)
                opset = version if domain in _DEFAULT_DOMAINS else opset
            else:
                stream.seek(length, 1)
    return OnnxHeader(ir_version, opset)


def _opset(stream: BinaryIO, end: int) -> tuple[str, int | None]:
    domain, version = "", None
    while stream.tell() < end:
        tag = _varint(stream)
        if tag == _VERSION << 3 | _VARINT:
            version = _varint(stream)
        elif tag == _DOMAIN << 3 | _BYTES:
            domain = stream.read(_varint(stream) or 0).decode("utf-8", "replace")
        else:
            break
    stream.seek(end)
    return domain, version


def _varint(stream: BinaryIO) -> int | None:
    value = 0
    for shift in range(0, 70, 7):
        byte = stream.read(1)
        if not byte:
            return None
        value |= (byte[0] & 0x7F) << shift
        if byte[0] < 0x80:
            return value
    return None
