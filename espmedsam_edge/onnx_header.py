"""What a graph says of itself around its nodes: the format's version, the sets of operators it uses, properties.

The same for every graph that this program writes, whichever tool made it: onnx and ModelOpt state what their makers
worked with, and ONNX Runtime lists eight sets of operators in all it saves.
"""

from __future__ import annotations

from collections.abc import Mapping

from espmedsam_edge.protobuf import BYTES, VARINT, encoded, fields, read_varint, varint

IR_VERSIONS = {
    13: 7, 14: 7, 15: 8, 16: 8, 17: 8, 18: 8, 19: 9, 20: 9, 21: 10, 22: 10, 23: 11, 24: 12, 25: 13, 26: 13,
}  # fmt: skip
"""Version of ONNX's operators -> the lowest version of the format that carries it."""

# Field numbers of onnx.proto
_IR_VERSION, _PRODUCER, _GRAPH, _OPSET, _PROPERTY = 1, 2, 7, 8, 14
_GRAPH_NODE, _NODE_DOMAIN = 1, 7
_FIRST, _SECOND = 1, 2  # of an OperatorSetId: domain, version; of a StringStringEntry: key, value


def with_header(content: bytes, properties: Mapping[str, str]) -> bytes:
    """A graph with a header of its own in place of what its maker wrote: all but the graph is left out.

    Args:
        content: an ONNX file without functions and without graphs in nodes.
        properties: ``metadata_props``, by name; empty for a network without weights.

    Raises:
        NotProtobufError: it is none.
    """
    opsets: dict[str, int] = {}
    graph, used = b"", {""}
    for number, kind, start, end in fields(content, 0, len(content)):
        if (number, kind) == (_OPSET, BYTES):
            domain, version = _opset(content, start, end)
            opsets[domain] = version
        elif (number, kind) == (_GRAPH, BYTES):
            graph, used = content[start:end], used | _domains(content, start, end)
    parts = [
        encoded(_IR_VERSION, VARINT, varint(IR_VERSIONS[opsets[""]])),
        encoded(_PRODUCER, BYTES, b"espmedsam-edge"),
        encoded(_GRAPH, BYTES, graph),
    ]
    for domain in sorted(used & set(opsets)):
        name = encoded(_FIRST, BYTES, domain.encode())
        parts.append(encoded(_OPSET, BYTES, name + encoded(_SECOND, VARINT, varint(opsets[domain]))))
    for key, value in properties.items():
        entry = encoded(_FIRST, BYTES, key.encode()) + encoded(_SECOND, BYTES, value.encode())
        parts.append(encoded(_PROPERTY, BYTES, entry))
    return b"".join(parts)


def _opset(content: bytes, start: int, end: int) -> tuple[str, int]:
    domain, version = "", 0
    for number, kind, begin, stop in fields(content, start, end):
        if (number, kind) == (_FIRST, BYTES):
            domain = content[begin:stop].decode()
        elif (number, kind) == (_SECOND, VARINT):
            version = read_varint(content, begin)[0]
    return "" if domain == "ai.onnx" else domain, version


def _domains(content: bytes, start: int, end: int) -> set[str]:
    """The sets of operators that a graph's nodes are of."""
    found = set()
    for number, kind, begin, stop in fields(content, start, end):
        if (number, kind) == (_GRAPH_NODE, BYTES):
            for inner, form, first, last in fields(content, begin, stop):
                if (inner, form) == (_NODE_DOMAIN, BYTES):
                    found.add(content[first:last].decode())
    return found
