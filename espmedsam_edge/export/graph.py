"""A fused network as a clean ONNX graph: static shapes, named nodes, folded constants, nothing that engines refuse."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal

import numpy as np
import onnx
import onnxsim
import torch
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper
from torch import nn

from espmedsam_edge.bundle import InputSpec, OutputSpec
from espmedsam_edge.files import atomic_write
from espmedsam_edge.onnx_header import with_header

OPSET = 20
"""Gelu came with 20, LayerNormalization with 17; TensorRT 10.3's parser reads 20."""

FORBIDDEN = ("ScatterND", "NonZero", "If", "Loop", "Scan", "Shape", "Range", "Einsum", "Attention", "ConstantOfShape")
"""Data-dependent or computed shapes, and operators that one of the engines refuses."""

Storage = Literal["float32", "float16"]


class GraphError(RuntimeError):
    """The exporter made a graph that it must not hand on: a fault of this package or of a library it builds on."""


def build_graph(network: nn.Module, image_size: int, batch: int = 1) -> ModelProto:
    """Trace a fused network to ONNX.

    Args:
        network: (B, 3, S, S) -> (B, 1, S/4, S/4), float32.
        image_size: S.
        batch: B.

    Returns:
        A checked model of opset 20: input ``image``, output ``logits``, every node named after the module it came from.

    Raises:
        GraphError: an operator of ``FORBIDDEN`` is left, or a shape is not static.
    """
    image = torch.zeros(batch, 3, image_size, image_size)
    with quiet():
        program = torch.onnx.export(
            network,
            (image,),
            input_names=[InputSpec().name],
            output_names=[OutputSpec().name],
            opset_version=OPSET,
            dynamo=True,
            optimize=True,
            verbose=False,
        )
        assert program is not None
        model: ModelProto = program.model_proto
        name_nodes(model)
        # Constant folding only: onnxsim's own fusions bring Gemm between Reshapes and an Attention that engines refuse.
        model, _ = onnxsim.simplify(model, perform_optimization=False)
    strip(model)
    onnx.checker.check_model(model, full_check=True)
    refuse(model)
    return model


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep the exporter's progress lines and version warnings out of a command's output."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def name_nodes(model: ModelProto) -> None:
    """Name each node ``module.path/Operator_k``, from the scopes that the tracer recorded."""
    count: Counter[str] = Counter()
    for node in model.graph.node:
        scopes = next((p.value for p in node.metadata_props if p.key == "pkg.torch.onnx.name_scopes"), "[]")
        modules = [scope for scope in json.loads(scopes.replace("'", '"'))[:-1] if scope]
        base = f"{modules[-1] if modules else 'network'}/{node.op_type}"
        node.name = f"{base}_{count[base]}"
        count[base] += 1


def strip(model: ModelProto) -> None:
    """Drop what tracing left behind: stack traces, file paths, unused tensors."""
    graph = model.graph
    for owner in [model, graph, *graph.node, *graph.initializer, *graph.value_info, *graph.input, *graph.output]:
        del owner.metadata_props[:]
    for node in graph.node:
        node.doc_string = ""
    used = {name for node in graph.node for name in node.input}
    kept = [tensor for tensor in graph.initializer if tensor.name in used]
    del graph.initializer[:]
    graph.initializer.extend(kept)
    del model.functions[:]
    versions = [entry for entry in model.opset_import if entry.domain == ""]
    del model.opset_import[:]
    model.opset_import.extend(versions)


def refuse(model: ModelProto) -> None:
    """Check that nothing is left that engines refuse.

    Raises:
        GraphError: an operator of ``FORBIDDEN``, or a shape that is not static.
    """
    found = sorted({node.op_type for node in model.graph.node if node.op_type in FORBIDDEN or node.domain})
    if found:
        raise GraphError(f"the exported graph holds {', '.join(found)}; engines refuse or slow down on them")
    for value in [*model.graph.value_info, *model.graph.input, *model.graph.output]:
        if any(not dim.HasField("dim_value") for dim in value.type.tensor_type.shape.dim):
            raise GraphError(f"the shape of '{value.name}' is not static")


def store_weights(model: ModelProto, storage: Storage) -> None:
    """Store large constants smaller, with a Cast back to float32 that every runtime folds when it loads the graph.

    Args:
        model: changed in place.
        storage: "float32" leaves it; "float16" halves the file, weights rounded to 11 bits.
    """
    if storage == "float32":
        return
    casts: list[NodeProto] = []
    for tensor in model.graph.initializer:
        if tensor.data_type != TensorProto.FLOAT or int(np.prod(tensor.dims)) < 256:
            continue
        values = numpy_helper.to_array(tensor)
        limit = float(np.finfo(np.float16).max)
        if not np.isfinite(values).all() or np.abs(values).max() > limit:
            continue
        name = tensor.name
        tensor.CopyFrom(numpy_helper.from_array(values.astype(np.float16), f"{name}.fp16"))
        casts.append(helper.make_node("Cast", [f"{name}.fp16"], [name], name=f"{name}/Cast", to=TensorProto.FLOAT))
    nodes = [*casts, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    onnx.checker.check_model(model, full_check=True)


def save_graph(model: ModelProto, path: Path, properties: Mapping[str, str]) -> bytes:
    """Write a graph as one file with its properties, complete or not at all; returns what was written."""
    content = with_header(model.SerializeToString(), properties)
    atomic_write(path, content)
    return content
