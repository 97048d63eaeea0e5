"""Reads back from a TensorRT network and engine what they compute in, and refuses what is not what the manifest says.

In a strongly typed network the types of the tensors are the types of the arithmetic, so the network tells the truth
about the plan before it is built; the engine's own types are compared with it where a GPU can load the plan.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, cast

from pydantic import BaseModel

from espmedsam_edge.bundle import Graph, Precision
from espmedsam_edge.errors import UserError
from espmedsam_edge.runtime.engines.tensorrt_api import TensorRT

if TYPE_CHECKING:
    import tensorrt as trt

# TensorRT's name of a type -> ours
_TYPE_NAMES = {
    "FLOAT": "fp32",
    "HALF": "fp16",
    "INT8": "int8",
    "BF16": "bf16",
    "FP8": "fp8",
    "INT4": "int4",
    "FP4": "fp4",
}
_PRODUCTS = ("CONVOLUTION", "DECONVOLUTION", "MATRIX_MULTIPLY")
# Layers that move values without computing: INT8 data dequantised before one is INT8 data after it.
_MOVERS = ("SHUFFLE", "SQUEEZE", "UNSQUEEZE", "IDENTITY")
# The manifest's count is of the ONNX graph, the network's of what the parser made of it: a small product may be folded.
_TOLERATED_SHARE = 0.02


class TensorType(BaseModel, extra="forbid", frozen=True):
    """An input or output: name, type (``fp32``), shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]


class Arithmetic(BaseModel, extra="forbid", frozen=True):
    """What a network computes in.

    ``layers`` and ``macs`` count convolutions and matrix products, and their multiply-accumulates, by type. INT8 needs
    both operands dequantised from INT8, as TensorRT does. ``tensors`` counts every layer's outputs by type.
    """

    inputs: tuple[TensorType, ...]
    outputs: tuple[TensorType, ...]
    layers: dict[str, int]
    macs: dict[str, int]
    tensors: dict[str, int]

    def share(self, *dtypes: str) -> float:
        """The part of the multiply-accumulates done in these types, 0..1."""
        total = sum(self.macs.values())
        return sum(self.macs.get(dtype, 0) for dtype in dtypes) / total if total else 0.0

    def summary(self) -> str:
        """For people: ``96.1 % of multiply-accumulates in fp16, 3.9 % in fp32``."""
        parts = [(self.share(dtype), dtype) for dtype in self.macs]
        return ", ".join(
            f"{100 * share:.1f} %{' of multiply-accumulates' if index == 0 else ''} in {dtype}"
            for index, (share, dtype) in enumerate(sorted(parts, reverse=True))
        )


def type_name(dtype: Any) -> str:
    """Our name (``fp16``) of TensorRT's data type."""
    name = str(getattr(dtype, "name", dtype))
    return _TYPE_NAMES.get(name, name.lower())


def read_arithmetic(api: TensorRT, network: trt.INetworkDefinition) -> Arithmetic:
    """What a parsed network will compute in."""
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    producers: dict[str, trt.ILayer] = {}
    for layer in layers:
        for index in range(layer.num_outputs):
            producers[layer.get_output(index).name] = layer
    counts: Counter[str] = Counter()
    macs: Counter[str] = Counter()
    tensors: Counter[str] = Counter()
    for layer in layers:
        kind = layer.type.name
        tensors.update(type_name(layer.get_output(index).dtype) for index in range(layer.num_outputs))
        if kind in _PRODUCTS:
            dtype = _product_type(layer, producers)
            counts[dtype] += 1
            macs[dtype] += _macs(api, layer)
    return Arithmetic(
        inputs=tuple(_tensor(network.get_input(index)) for index in range(network.num_inputs)),
        outputs=tuple(_tensor(network.get_output(index)) for index in range(network.num_outputs)),
        layers=dict(counts),
        macs=dict(macs),
        tensors=dict(tensors),
    )


def shape_of(dims: trt.Dims) -> tuple[int, ...]:
    """TensorRT's dimensions, which are no Python sequence in every release, as a tuple."""
    return tuple(int(dims[index]) for index in range(len(dims)))


def _tensor(tensor: trt.ITensor) -> TensorType:
    return TensorType(name=tensor.name, dtype=type_name(tensor.dtype), shape=shape_of(tensor.shape))


def _product_type(layer: trt.ILayer, producers: dict[str, trt.ILayer]) -> str:
    operands = [tensor for index in range(min(2, layer.num_inputs)) if (tensor := layer.get_input(index)) is not None]
    # A convolution whose weights are not a tensor of the network has them in its own type: never quantised.
    if len(operands) == 2 and all(_dequantised(tensor, producers) for tensor in operands):
        return "int8"
    return type_name(operands[0].dtype)


def _dequantised(tensor: trt.ITensor, producers: dict[str, trt.ILayer]) -> bool:
    layer = producers.get(tensor.name)
    while layer is not None and layer.type.name in _MOVERS:
        source = layer.get_input(0)
        layer = producers.get(source.name) if source is not None else None
    return layer is not None and layer.type.name == "DEQUANTIZE" and type_name(layer.get_input(0).dtype) == "int8"


def _macs(api: TensorRT, layer: trt.ILayer) -> int:
    left = shape_of(layer.get_input(0).shape)
    out = shape_of(layer.get_output(0).shape)
    if layer.type.name == "MATRIX_MULTIPLY":
        rows = out[-2] if len(out) > 1 and len(left) > 1 else 1
        inner = math.prod(left[-2:]) // rows  # whichever way the left matrix lies
        return math.prod(out) * inner
    # get_layer returns the base class; TensorRT's own way to the subclass is to assign it.
    deconvolution = layer.type.name == "DECONVOLUTION"
    cast(Any, layer).__class__ = api.module.IDeconvolutionLayer if deconvolution else api.module.IConvolutionLayer
    typed = cast("trt.IConvolutionLayer", layer)
    kernel = math.prod(shape_of(typed.kernel_size_nd))
    if deconvolution:  # every input value meets the whole kernel of every output channel of its group
        return math.prod(left) * kernel * out[1] // int(typed.num_groups)
    return math.prod(out) * kernel * left[1] // int(typed.num_groups)


def check_arithmetic(arithmetic: Arithmetic, graph: Graph, macs: Mapping[str, float] | None = None) -> None:
    """Refuse a network that is not what the manifest says of its graph.

    Args:
        arithmetic: of the network.
        graph: the manifest's entry.
        macs: ``Manifest.macs`` of it; without, one product in the precision is enough.

    Raises:
        UserError: other inputs or outputs, no product at all in the precision, a lower one in an FP32 graph, or
            another part of the work in some type than calibrate counted.
    """
    _check_tensor(graph, "image", arithmetic.inputs, graph.input_shape)
    _check_tensor(graph, "logits", arithmetic.outputs, graph.output_shape)
    found = ", ".join(f"{count} in {dtype}" for dtype, count in sorted(arithmetic.layers.items())) or "none"
    expected: Precision = graph.precision
    lower = [dtype for dtype in arithmetic.layers if dtype != "fp32"]
    if (expected == "fp32" and lower) or (expected != "fp32" and expected not in arithmetic.layers):
        raise UserError(
            f"{graph.file} is listed as {expected}, but its convolutions and matrix products are: {found}.",
            "It is not the graph its manifest says; export or calibrate it again.",
            exit_code=1,
        )
    if not macs:
        return
    for dtype in sorted({*macs, *arithmetic.macs}):
        counted = macs.get(dtype, 0.0)
        if abs(arithmetic.share(dtype) - counted) > _TOLERATED_SHARE:
            raise UserError(
                f"{graph.file} has {100 * arithmetic.share(dtype):.1f} % of its multiply-accumulates in {dtype}, and "
                f"its manifest says {100 * counted:.1f} %.",
                "It is not the graph its manifest says, or this TensorRT reads it in another way: calibrate it again.",
                exit_code=1,
            )


def _check_tensor(graph: Graph, name: str, tensors: Iterable[TensorType], shape: tuple[int, ...]) -> None:
    expected = TensorType(name=name, dtype="fp32", shape=shape)
    found = tuple(tensors)
    if found != (expected,):
        raise UserError(
            f"{graph.file} has {_listed(found)} where its manifest says {_listed([expected])}.",
            "Export the bundle again.",
            exit_code=1,
        )


def _listed(tensors: Iterable[TensorType]) -> str:
    words = [f"'{tensor.name}' {tensor.dtype} {'x'.join(map(str, tensor.shape))}" for tensor in tensors]
    return ", ".join(words) or "nothing"


def read_engine(api: TensorRT, engine: trt.ICudaEngine) -> tuple[list[TensorType], list[TensorType], dict[str, int]]:
    """Inputs, outputs, and how many layers have an output of each type, as the engine inspector tells them.

    The last is empty where the inspector names the layers only (TensorRT-RTX compiles its kernels when it runs).
    """
    inputs: list[TensorType] = []
    outputs: list[TensorType] = []
    for index in range(engine.num_io_tensors):
        name = engine.get_tensor_name(index)
        tensor = TensorType(
            name=name, dtype=type_name(engine.get_tensor_dtype(name)), shape=shape_of(engine.get_tensor_shape(name))
        )
        (inputs if engine.get_tensor_mode(name).name == "INPUT" else outputs).append(tensor)
    text = engine.create_engine_inspector().get_engine_information(api.module.LayerInformationFormat.JSON)
    return inputs, outputs, layer_types(text)


def layer_types(inspector_json: str) -> dict[str, int]:
    """How many of an engine's layers have an output of each type, from the inspector's JSON of TensorRT 10 or 11."""
    try:
        found = json.loads(inspector_json)
    except ValueError:
        return {}
    counts: Counter[str] = Counter()
    for layer in found.get("Layers", []) if isinstance(found, dict) else []:
        outputs = layer.get("Outputs", []) if isinstance(layer, dict) else []
        counts.update({dtype for output in outputs if isinstance(output, dict) if (dtype := _inspected_type(output))})
    return dict(counts)


def _inspected_type(output: dict[str, Any]) -> str | None:
    # TensorRT 10 has one text, "Row major linear FP16 format"; 11 has "Format" and "DataType" ("Half") apart.
    text = " ".join(str(output.get(key, "")) for key in ("Format/Datatype", "Format", "DataType", "Datatype")).lower()
    words = text.replace(",", " ").split()
    for ours, names in (("int8", ("int8",)), ("fp16", ("fp16", "half")), ("fp32", ("fp32", "float"))):
        if any(name in words for name in names):
            return ours
    return None


def check_engine(
    graph: Graph,
    arithmetic: Arithmetic,
    inputs: list[TensorType],
    outputs: list[TensorType],
    types: dict[str, int],
) -> None:
    """Refuse an engine whose inputs, outputs or types are not its network's.

    Raises:
        UserError: says what the engine has and what was expected.
    """
    if (tuple(inputs), tuple(outputs)) != (arithmetic.inputs, arithmetic.outputs):
        raise UserError(
            f"the engine of {graph.file} has {_listed(inputs + outputs)}, not its network's tensors.",
            "Build again; if it stays so, report it with the build log.",
            exit_code=1,
        )
    if types and graph.precision != "fp32" and graph.precision not in types:
        listed = ", ".join(f"{count} in {dtype}" for dtype, count in sorted(types.items()))
        raise UserError(
            f"the engine of {graph.file} has no {graph.precision} layer, only {listed}: TensorRT raised its precision.",
            "Use another precision on this GPU.",
            exit_code=1,
        )
