"""Protobuf's wire format, as far as ONNX files need it: a walk over a message's fields, and fields written."""

from __future__ import annotations

from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

# Wire types; onnx.proto has no groups, the other two
VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
_LARGEST_FIELD = (1 << 29) - 1


class NotProtobufError(ValueError):
    """The bytes are no message such as ONNX's; the text says why."""


class Field(NamedTuple):
    """One field of a message.

    Attributes:
        number: which field.
        kind: its wire type.
        value: a varint's number; of bytes, their count; of a number of fixed size, 0.
        start: where its content begins, without a length before it.
        end: where it ends, and the next field begins.
    """

    number: int
    kind: int
    value: int
    start: int
    end: int


def fields(stream: BinaryIO, end: int) -> Iterator[Field]:
    """The fields of the message from where the stream is to ``end``; what they hold is not read.

    The stream is then at a field's content, of a varint behind it; wherever it is left, the next field is read from
    behind the last.

    Raises:
        NotProtobufError: it is no such message.
    """
    while stream.tell() < end:
        tag = _varint(stream)
        number, kind = tag >> 3, tag & 7
        if not 0 < number <= _LARGEST_FIELD:
            raise NotProtobufError(f"field {number}")
        if kind not in (VARINT, FIXED64, BYTES, FIXED32):
            raise NotProtobufError(f"wire type {kind}")
        place = stream.tell()
        value = _varint(stream) if kind in (VARINT, BYTES) else 0
        start = place if kind == VARINT else stream.tell()
        after = stream.tell() + {VARINT: 0, FIXED64: 8, BYTES: value, FIXED32: 4}[kind]
        if after > end:
            raise NotProtobufError("it ends early")
        yield Field(number, kind, value, start, after)
        stream.seek(after)


def _varint(stream: BinaryIO) -> int:
    value = 0
    for shift in range(0, 70, 7):
        byte = stream.read(1)
        if not byte:
            raise NotProtobufError("it ends early")
        value |= (byte[0] & 0x7F) << shift
        if byte[0] < 0x80:
            return value
    raise NotProtobufError("a number without end")


def encoded(number: int, kind: int, content: bytes) -> bytes:
    """A field as it stands in a message, of content as ``Field.start`` and ``Field.end`` delimit it."""
    head = varint(number << 3 | kind)
    return head + varint(len(content)) + content if kind == BYTES else head + content


def varint(value: int) -> bytes:
    """A number from 0 in protobuf's variable length."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
