"""Runs a graph a few nodes at a time and hands out every tensor that it computes, in little memory.

Asking ONNX Runtime for every tensor of the whole graph at once holds gigabytes; here a segment's tensors are gone
before the next segment runs, except those that later segments read.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper

from espmedsam_edge.calibration.network import Network
from espmedsam_edge.files import temporary_folder

_MOST_BYTES = 384 << 20  # of a segment's tensors together


@dataclass(frozen=True)
class _Segment:
    session: Any
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


class SegmentedRunner:
    """A loaded graph of one input."""

    def __init__(self, network: Network, threads: int) -> None:
        self._input = network.model.graph.input[0].name
        parts = _divide(network)
        reads = [{name for node in nodes for name in node.input} - network.constants.keys() - {""} for nodes in parts]
        self._segments: list[_Segment] = []
        for index, nodes in enumerate(parts):
            made = [name for node in nodes for name in node.output if name]
            later = set().union(*reads[index + 1 :])
            outputs = [name for name in made if network.is_float(name) or name in later]
            inputs = sorted(reads[index] - set(made))
            with temporary_folder() as folder:
                file = folder / "segment.onnx"
                file.write_bytes(_extract(network, nodes, inputs, outputs).SerializeToString())
                self._segments.append(_Segment(_open(file, threads), tuple(inputs), tuple(outputs)))
        # After its last reader a tensor is dropped.
        self._last = {name: index for index, names in enumerate(reads) for name in names}

    def run(self, image: NDArray[np.float32]) -> Iterator[tuple[str, NDArray[Any]]]:
        """The input, then every float tensor that a node computes, each once; not to be kept."""
        yield self._input, image
        alive: dict[str, NDArray[Any]] = {self._input: image}
        for index, segment in enumerate(self._segments):
            feed = {name: alive[name] for name in segment.inputs}
            results = segment.session.run(list(segment.outputs), feed)
            del feed
            alive |= zip(segment.outputs, results, strict=True)
            for name, values in zip(segment.outputs, results, strict=True):
                if values.dtype == np.float32:
                    yield name, values
            del results
            alive = {name: values for name, values in alive.items() if self._last.get(name, -1) > index}


def _open(file: Path, threads: int) -> Any:
    """A session without an arena: each would keep the memory of its segment, all together gigabytes."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.enable_cpu_mem_arena = False
    options.enable_mem_pattern = False
    options.log_severity_level = 4
    return onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])


def _divide(network: Network) -> list[list[NodeProto]]:
    """Consecutive nodes whose outputs together stay under ``_MOST_BYTES``."""
    parts: list[list[NodeProto]] = [[]]
    size = 0
    for node in network.nodes:
        made = sum(4 * math.prod(network.shape(name)) for name in node.output if name)
        if parts[-1] and size + made > _MOST_BYTES:
            parts.append([])
            size = 0
        parts[-1].append(node)
        size += made
    return parts


def _extract(network: Network, nodes: Sequence[NodeProto], inputs: Sequence[str], outputs: Sequence[str]) -> ModelProto:
    def declared(name: str) -> Any:
        return helper.make_tensor_value_info(name, network.element_type(name) or TensorProto.FLOAT, network.shape(name))

    constants = dict.fromkeys(name for node in nodes for name in node.input if name in network.constants)
    graph = helper.make_graph(
        nodes,
        "segment",
        [declared(name) for name in inputs],
        [declared(name) for name in outputs],
        [network.constants[name] for name in constants],
    )
    return helper.make_model(graph, opset_imports=list(network.model.opset_import), ir_version=network.model.ir_version)
