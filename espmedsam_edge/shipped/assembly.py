"""From a network without weights and a checkpoint to a fused graph, with ONNX Runtime alone: no torch, no onnx package.

``export.skeleton`` writes a network as ONNX whose inputs are the image and every weight of a checkpoint, the fusion
included as nodes. Here the weights go in as constants and ONNX Runtime computes everything that depends on them alone:
what is left is the graph that ``export`` writes, operator for operator.

Only the outermost layer of ONNX's protobuf is touched: fields are copied as bytes, weights are added as initializers.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

import numpy as np
from numpy.typing import NDArray

from espmedsam_edge.errors import UserError
from espmedsam_edge.files import temporary_folder
from espmedsam_edge.protobuf import BYTES, VARINT, NotProtobufError, encoded, fields, varint

PLACEHOLDER = "modality"
"""Stands for the modality's name in the names of a skeleton's weights."""

IMAGE = "image"

# Field numbers of onnx.proto
_MODEL_GRAPH = 7
_GRAPH_INITIALIZER, _GRAPH_INPUT = 5, 11
_VALUE_NAME = 1
_TENSOR_DIMS, _TENSOR_TYPE, _TENSOR_NAME, _TENSOR_RAW = 1, 2, 8, 9
_FLOAT = 1


def assemble(skeleton: bytes, weights: Mapping[str, NDArray[np.generic]], modality: str) -> bytes:
    """A modality's fused graph as ONNX. The same weights give the same bytes on one machine with one ONNX Runtime.

    Args:
        skeleton: what ``export.skeleton`` wrote for the checkpoint's configuration and the input's size.
        weights: the checkpoint's tensors by name.
        modality: one of the checkpoint's.

    Raises:
        UserError: the two do not belong together.
    """
    import onnxruntime
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    whole = fill(skeleton, weights, modality)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.add_session_config_entry("session.disable_prepacking", "1")  # nothing is run
    options.log_severity_level = 4
    try:
        with temporary_folder() as folder:
            options.optimized_model_filepath = str(folder / "graph.onnx")
            # Its fusion of products and additions would put Gemm between Reshapes, which engines do not like.
            onnxruntime.InferenceSession(
                whole, options, providers=["CPUExecutionProvider"], disabled_optimizers=["MatMulAddFusion"]
            )
            return (folder / "graph.onnx").read_bytes()
    except (state.Fail, state.InvalidArgument, state.InvalidGraph, state.InvalidProtobuf) as error:
        reason = str(error).strip().splitlines()[0][:300]
        raise UserError(
            f"the weights and the network of {modality} do not fit: {reason}", "Install the package again."
        ) from error


def fill(skeleton: bytes, weights: Mapping[str, NDArray[np.generic]], modality: str) -> bytes:
    """The skeleton with its weights as constants: an ONNX model whose only input is ``image``.

    Raises:
        UserError: a weight is missing, or the skeleton is not one.
    """
    model = bytearray()
    try:
        for number, kind, value in _contents(skeleton):
            if number == _MODEL_GRAPH and kind == BYTES:
                value = _fill_graph(value, weights, modality)
            model += encoded(number, kind, value)
    except (NotProtobufError, UnicodeDecodeError) as error:
        raise UserError(f"the network's file is damaged ({error}).", "Install the package again.") from error
    return bytes(model)


def _fill_graph(graph: bytes, weights: Mapping[str, NDArray[np.generic]], modality: str) -> bytes:
    filled = bytearray()
    for number, kind, value in _contents(graph):
        name = _name(value) if number == _GRAPH_INPUT else IMAGE
        if name == IMAGE:
            filled += encoded(number, kind, value)
            continue
        key = weight_name(name, modality)
        if key not in weights:
            raise UserError(f"the checkpoint has no {key}.", "It is of another preset than the network.")
        filled += encoded(_GRAPH_INITIALIZER, BYTES, _tensor(name, np.asarray(weights[key], np.float32)))
    return bytes(filled)


def weight_name(name: str, modality: str) -> str:
    """A weight's name in the checkpoint: the skeleton's, with the modality in place of ``PLACEHOLDER``."""
    return re.sub(rf"(?<![^.]){PLACEHOLDER}(?![^.])", modality, name)


def _name(value_info: bytes) -> str:
    return next(value.decode() for number, _, value in _contents(value_info) if number == _VALUE_NAME)


def _tensor(name: str, values: NDArray[np.float32]) -> bytes:
    message = bytearray()
    for size in values.shape:
        message += encoded(_TENSOR_DIMS, VARINT, varint(size))
    message += encoded(_TENSOR_TYPE, VARINT, varint(_FLOAT))
    message += encoded(_TENSOR_NAME, BYTES, name.encode())
    message += encoded(_TENSOR_RAW, BYTES, np.ascontiguousarray(values, "<f4").tobytes())
    return bytes(message)


def _contents(message: bytes) -> Iterator[tuple[int, int, bytes]]:
    """A message's fields: number, wire type, content."""
    for number, kind, start, end in fields(message, 0, len(message)):
        yield number, kind, message[start:end]
