"""Small ONNX graphs written by hand, in a bundle's shape: convolution, LayerNorm, GELU, matrix products, enlarging."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from espmedsam_edge.bundle import Bundle, Manifest, Precision, Weights, graph_file_name, write_bundle

SIZE = 64
TOKENS = (SIZE // 8) ** 2
# Multiply-accumulates by hand: an 8x8 convolution to 16 channels, then 16 -> 64 and 64 -> 1 for every token.
CONV_MACS = TOKENS * 16 * 3 * 8 * 8
UP_MACS = TOKENS * 16 * 64
DOWN_MACS = TOKENS * 64


def hand_graph(precision: Precision, *, opset: int = 20, foreign: str | None = None, seed: int = 0) -> bytes:
    """An ONNX graph with weights in ``precision`` (INT8: quantise/dequantise pairs, INT8 weights, FP16 remainder).

    ``foreign`` adds a node of that operator type before the end.
    """
    onnx = pytest.importorskip("onnx", reason="needs onnx (extra export) to write graphs by hand")
    helper, proto = onnx.helper, onnx.TensorProto
    random = np.random.default_rng(seed)
    inner = np.float32 if precision == "fp32" else np.float16
    nodes: list[Any] = []
    constants: dict[str, Any] = {}

    def add(operator: str, inputs: list[str], output: str, **attributes: Any) -> str:
        nodes.append(helper.make_node(operator, inputs, [output], name=f"{operator}_{output}", **attributes))
        return output

    def constant(name: str, value: Any) -> str:
        constants[name] = value
        return name

    def quantised(name: str) -> str:
        scale, zero = constant(f"{name}_scale", np.array(0.05, inner)), constant(f"{name}_zero", np.array(0, np.int8))
        return add(
            "DequantizeLinear", [add("QuantizeLinear", [name, scale, zero], f"{name}_q"), scale, zero], f"{name}_dq"
        )

    def weight(name: str, shape: tuple[int, ...], axis: int) -> str:
        values = 0.1 * random.standard_normal(shape)
        if precision != "int8":
            return constant(name, values.astype(inner))
        constant(name, np.clip(np.rint(values / 0.004), -127, 127).astype(np.int8))
        scale = constant(f"{name}_scale", np.full(shape[axis], 0.004, inner))
        zero = constant(f"{name}_zero", np.zeros(shape[axis], np.int8))
        return add("DequantizeLinear", [name, scale, zero], f"{name}_dq", axis=axis)

    x = "image" if precision == "fp32" else add("Cast", ["image"], "lowered", to=proto.FLOAT16)
    x = quantised(x) if precision == "int8" else x
    x = add("Conv", [x, weight("patch", (16, 3, 8, 8), 0)], "patches", strides=[8, 8], kernel_shape=[8, 8])
    x = add("Reshape", [x, constant("to_tokens", np.array([1, 16, TOKENS]))], "flat")
    x = add("Transpose", [x], "tokens", perm=[0, 2, 1])
    x = add(
        "LayerNormalization", [x, constant("gain", np.ones(16, inner)), constant("shift", np.zeros(16, inner))], "norm"
    )
    x = quantised(x) if precision == "int8" else x
    x = add("Gelu", [add("MatMul", [x, weight("up", (16, 64), 1)], "wide")], "active")
    x = add("MatMul", [x, constant("down", (0.1 * random.standard_normal((64, 1))).astype(inner))], "narrow")
    x = add("Reshape", [x, constant("to_map", np.array([1, 1, SIZE // 8, SIZE // 8]))], "map")
    if foreign is not None:
        x = add(foreign, [x], "foreign")
    x = x if precision == "fp32" else add("Cast", [x], "raised", to=proto.FLOAT)
    side = SIZE // 8  # every value twice in both directions
    x = add("Reshape", [x, constant("apart", np.array([1, 1, side, 1, side, 1]))], "cells")
    x = add("Expand", [x, constant("twice", np.array([1, 1, side, 2, side, 2]))], "larger")
    add("Reshape", [x, constant("to_logits", np.array([1, 1, 2 * side, 2 * side]))], "logits")
    graph = helper.make_graph(
        nodes,
        "by_hand",
        [helper.make_tensor_value_info("image", proto.FLOAT, [1, 3, SIZE, SIZE])],
        [helper.make_tensor_value_info("logits", proto.FLOAT, [1, 1, SIZE // 4, SIZE // 4])],
        [onnx.numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    return bytes(model.SerializeToString())


def hand_bundle(path: Path, graphs: dict[Precision, bytes], image_size: int = SIZE) -> Bundle:
    """A bundle of one modality, fundus, with these graph files, each listed under its key's precision."""
    with write_bundle(path) as draft:
        entries = []
        for precision, content in graphs.items():
            name = graph_file_name("fundus", precision, 1)
            draft.new_file(name).write_bytes(content)
            entries.append(draft.graph(name, modality="fundus", precision=precision, image_size=image_size))
        draft.manifest = Manifest(
            preset="toy", weights=Weights(checkpoint_sha256="0" * 64, origin="random"), graphs=entries
        )
    return Bundle.open(path)
