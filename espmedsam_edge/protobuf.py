"""Protobuf's wire format, as far as ONNX files need it: a walk over a message's fields, and fields written."""

from __future__ import annotations

from collections.abc import Iterator

# Wire types; onnx.proto has no groups, the other two
VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
_LARGEST_FIELD = (1 << 29) - 1


class NotProtobufError(ValueError):
    """The bytes are no message such as ONNX's; the text says why."""


Field = tuple[int, int, int, int]
"""A field of a message: its number, its wire type, where its content begins (behind a length, if it has one), and where
it ends and the next field begins."""


def fields(content: bytes, start: int, end: int) -> Iterator[Field]:
    """The fields of the message that lies from ``start`` to ``end``; what they hold is not read.

    Raises:
        NotProtobufError: it is no such message.
    """
    at = start
    while at < end:
        tag, begin = content[at], at + 1
        if tag > 0x7F:
            tag, begin = read_varint(content, at)
        number, kind = tag >> 3, tag & 7
        if not 0 < number <= _LARGEST_FIELD:
            raise NotProtobufError(f"field {number}")
        if kind == BYTES:
            length, begin = read_varint(content, begin)
            at = begin + length
        elif kind == VARINT:
            _, at = read_varint(content, begin)
        elif kind == FIXED32:
            at = begin + 4
        elif kind == FIXED64:
            at = begin + 8
        else:
            raise NotProtobufError(f"wire type {kind}")
        if at > end:
            raise NotProtobufError("it ends early")
        yield number, kind, begin, at


def read_varint(content: bytes, at: int) -> tuple[int, int]:
    """An unsigned number of 64 bits in protobuf's variable length, and where it ends.

    Raises:
        NotProtobufError: there is none.
    """
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(content):
            raise NotProtobufError("it ends early")
        byte = content[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value & 0xFFFF_FFFF_FFFF_FFFF, at
    raise NotProtobufError("a number without end")


def encoded(number: int, kind: int, content: bytes) -> bytes:
    """A field as it stands in a message, of content as ``Field`` delimits it."""
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
