"""The smallest graph that a bundle may hold, written without onnx: for what happens before and around its running."""

from __future__ import annotations

import struct


def _field(number: int, value: bytes | int) -> bytes:
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value)
    return _varint(number << 3 | 2) + _varint(len(value)) + value


def _varint(value: int) -> bytes:
    more, low = value >> 7, value & 0x7F
    return bytes([low | 0x80]) + _varint(more) if more else bytes([low])


def _value(name: bytes, shape: tuple[int, ...]) -> bytes:
    dims = b"".join(_field(1, _field(1, size)) for size in shape)
    return _field(1, name) + _field(2, _field(1, _field(1, 1) + _field(2, dims)))


def plain_graph(producer: bytes = b"someone", *, nodes: bytes = b"", size: int = 64) -> bytes:
    """``logits`` are 4 x 4 averages over all channels of ``image``.

    Args:
        producer: a name that makes graphs differ.
        nodes: further fields of the graph, before its own node.
        size: of the image.
    """
    kernel = b"".join(_field(1, side) for side in (1, 3, 4, 4)) + _field(2, 1) + _field(8, b"kernel")
    kernel += _field(9, struct.pack("<48f", *[1 / 48] * 48))
    strides = _field(1, b"strides") + _field(8, 4) + _field(8, 4) + _field(20, 7)
    node = _field(1, b"image") + _field(1, b"kernel") + _field(2, b"logits") + _field(4, b"Conv") + _field(5, strides)
    graph = nodes + _field(1, node) + _field(2, b"plain") + _field(5, kernel)
    graph += _field(11, _value(b"image", (1, 3, size, size)))
    graph += _field(12, _value(b"logits", (1, 1, size // 4, size // 4)))
    return _field(1, 8) + _field(2, producer) + _field(7, graph) + _field(8, _field(2, 17))
