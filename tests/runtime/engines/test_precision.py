"""Types and multiply-accumulates read back from networks, against counts made by hand; the inspector's two schemas."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hand_graphs import CONV_MACS, DOWN_MACS, UP_MACS, hand_graph

from espmedsam_edge.bundle import Graph
from espmedsam_edge.errors import UserError
from espmedsam_edge.runtime.engines.precision import (
    Arithmetic,
    TensorType,
    check_arithmetic,
    layer_types,
    read_arithmetic,
)
from espmedsam_edge.runtime.engines.tensorrt_api import TensorRT, parse_graph

IMAGE = TensorType(name="image", dtype="fp32", shape=(1, 3, 64, 64))
LOGITS = TensorType(name="logits", dtype="fp32", shape=(1, 1, 16, 16))


def arithmetic(**more: object) -> Arithmetic:
    values = {"inputs": (IMAGE,), "outputs": (LOGITS,), "layers": {"fp16": 3}, "macs": {"fp16": 900}, "tensors": {}}
    return Arithmetic.model_validate({**values, **more})


def graph(precision: str) -> Graph:
    return Graph.model_validate(
        {"modality": "fundus", "precision": precision, "file": "g.onnx", "sha256": "0" * 64, "image_size": 64}
    )


@pytest.mark.rtx
class TestReading:
    @pytest.mark.parametrize(
        ("precision", "layers", "macs"),
        [
            ("fp32", {"fp32": 3}, {"fp32": CONV_MACS + UP_MACS + DOWN_MACS}),
            ("fp16", {"fp16": 3}, {"fp16": CONV_MACS + UP_MACS + DOWN_MACS}),
            ("int8", {"int8": 2, "fp16": 1}, {"int8": CONV_MACS + UP_MACS, "fp16": DOWN_MACS}),
        ],
    )
    def test_hand_graph(
        self, precision: str, layers: dict[str, int], macs: dict[str, int], tmp_path: Path, rtx: TensorRT
    ) -> None:
        file = tmp_path / "graph.onnx"
        file.write_bytes(hand_graph(precision))  # type: ignore[arg-type]
        found = read_arithmetic(rtx, parse_graph(rtx, file.read_bytes(), file).network)
        assert found.layers == layers
        assert found.macs == macs
        assert (found.inputs, found.outputs) == ((IMAGE,), (LOGITS,))
        assert found.share("int8", "fp16", "fp32") == 1
        check_arithmetic(found, graph(precision))

    @pytest.mark.parametrize(("groups", "transposed"), [(1, False), (8, False), (2, False), (1, True), (4, True)])
    def test_convolutions_by_their_definition(
        self, groups: int, transposed: bool, tmp_path: Path, rtx: TensorRT
    ) -> None:
        """A convolution meets K*K*Cin/g inputs for every output value, a transposed one K*K*Cout/g outputs for every
        input value."""
        onnx = pytest.importorskip("onnx")
        import numpy as np

        helper, float32 = onnx.helper, onnx.TensorProto.FLOAT
        shape = (8, 16 // groups, 2, 2) if transposed else (16, 8 // groups, 3, 3)
        kernel = onnx.numpy_helper.from_array(np.random.default_rng(0).standard_normal(shape).astype(np.float32), "k")
        out = (1, 16, 20, 20) if transposed else (1, 16, 8, 8)
        operator = "ConvTranspose" if transposed else "Conv"
        node = helper.make_node(operator, ["x", "k"], ["y"], group=groups, strides=[2, 2] if transposed else [1, 1])
        description = helper.make_graph(
            [node],
            "conv",
            [helper.make_tensor_value_info("x", float32, [1, 8, 10, 10])],
            [helper.make_tensor_value_info("y", float32, out)],
            [kernel],
        )
        file = tmp_path / "conv.onnx"
        file.write_bytes(helper.make_model(description, ir_version=10).SerializeToString())
        found = read_arithmetic(rtx, parse_graph(rtx, file.read_bytes(), file).network)
        expected = 8 * 100 * 4 * 16 // groups if transposed else 16 * 64 * 9 * 8 // groups
        assert found.macs == {"fp32": expected}

    @pytest.mark.parametrize("left", [(4, 6, 5), (1, 6, 5)])
    @pytest.mark.parametrize("right", [(4, 5, 7), (5, 7)])
    def test_matrix_products_with_and_without_batch(
        self, left: tuple[int, ...], right: tuple[int, ...], tmp_path: Path, rtx: TensorRT
    ) -> None:
        onnx = pytest.importorskip("onnx")
        helper, float32 = onnx.helper, onnx.TensorProto.FLOAT
        batch = max(left[0], right[0] if len(right) == 3 else 1)
        description = helper.make_graph(
            [helper.make_node("MatMul", ["a", "b"], ["y"])],
            "product",
            [helper.make_tensor_value_info("a", float32, left), helper.make_tensor_value_info("b", float32, right)],
            [helper.make_tensor_value_info("y", float32, [batch, 6, 7])],
        )
        file = tmp_path / "product.onnx"
        file.write_bytes(helper.make_model(description, ir_version=10).SerializeToString())
        found = read_arithmetic(rtx, parse_graph(rtx, file.read_bytes(), file).network)
        assert found.macs == {"fp32": batch * 6 * 5 * 7}


class TestManifestIsHeldTo:
    def test_right_ones_pass(self) -> None:
        check_arithmetic(arithmetic(), graph("fp16"))
        check_arithmetic(arithmetic(layers={"fp32": 1, "fp16": 2}), graph("fp16"))
        check_arithmetic(arithmetic(layers={"int8": 5, "fp16": 1, "fp32": 1}), graph("int8"))
        check_arithmetic(arithmetic(layers={"fp32": 5}), graph("fp32"))

    @pytest.mark.parametrize(
        ("precision", "layers", "words"),
        [
            ("fp16", {"fp32": 8}, "listed as fp16, but .* are: 8 in fp32"),
            ("int8", {"fp16": 8, "fp32": 1}, "listed as int8, but .* are: 8 in fp16, 1 in fp32"),
            ("fp32", {"fp16": 1, "fp32": 7}, "listed as fp32, but .* are: 1 in fp16, 7 in fp32"),
            ("fp32", {"bf16": 8}, "8 in bf16"),
            ("fp16", {}, "are: none"),
        ],
    )
    def test_wrong_precision(self, precision: str, layers: dict[str, int], words: str) -> None:
        with pytest.raises(UserError, match=words):
            check_arithmetic(arithmetic(layers=layers), graph(precision))

    def test_the_counted_parts_of_the_work_pass(self) -> None:
        check_arithmetic(arithmetic(macs={"fp16": 985, "fp32": 15}), graph("fp16"), {"fp16": 0.97, "fp32": 0.03})
        check_arithmetic(arithmetic(macs={"fp16": 1, "fp32": 999}), graph("fp16"), {})  # nobody counted

    @pytest.mark.parametrize(
        ("macs", "words"),
        [
            ({"fp16": 1, "fp32": 999}, "g.onnx has 0.1 % of its multiply-accumulates in fp16, and .* says 97.0 %"),
            ({"fp16": 1000}, "has 100.0 % of its multiply-accumulates in fp16, and .* says 97.0 %"),
            ({"fp16": 970, "int8": 30}, "has 0.0 % of its multiply-accumulates in fp32, and .* says 3.0 %"),
        ],
    )
    def test_other_parts_of_the_work_than_counted(self, macs: dict[str, int], words: str) -> None:
        """One product in the precision is not enough where calibrate counted them all."""
        with pytest.raises(UserError, match=words):
            check_arithmetic(arithmetic(macs=macs), graph("fp16"), {"fp16": 0.97, "fp32": 0.03})

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            ({"inputs": (IMAGE.model_copy(update={"dtype": "fp16"}),)}, "'image' fp16 1x3x64x64 where .*'image' fp32"),
            ({"inputs": ()}, "has nothing where its manifest says 'image'"),
            ({"outputs": (LOGITS, LOGITS)}, "'logits' fp32 1x1x16x16, 'logits'"),
            ({"outputs": (LOGITS.model_copy(update={"shape": (1, 1, 32, 32)}),)}, "1x1x32x32 where"),
        ],
    )
    def test_wrong_tensors(self, change: dict[str, object], words: str) -> None:
        with pytest.raises(UserError, match=words):
            check_arithmetic(arithmetic(**change), graph("fp16"))


def test_summary_for_people() -> None:
    found = arithmetic(macs={"fp32": 39, "fp16": 961})
    assert found.summary() == "96.1 % of multiply-accumulates in fp16, 3.9 % in fp32"


class TestInspector:
    """The schema changed in TensorRT 11 (its migration guide): "Format/Datatype" was split."""

    def test_tensorrt_10(self) -> None:
        layers = [
            {"Name": str(index), "Outputs": [{"Name": "x", "Format/Datatype": text}]}
            for index, text in enumerate(
                (
                    "Channel major FP16 format where channel % 8 == 0",
                    "Row major linear FP32 format",
                    "Thirty-two wide channel vectorized row major Int8 format",
                    "Row major linear FP16 format",
                )
            )
        ]
        assert layer_types(json.dumps({"Layers": layers, "Bindings": ["x"]})) == {"fp16": 2, "fp32": 1, "int8": 1}

    def test_tensorrt_11(self) -> None:
        layers = [
            {"Name": "a", "Outputs": [{"Format": "Row major linear (kLINEAR)", "DataType": "Half"}]},
            {"Name": "b", "Outputs": [{"Format": "Row major linear (kLINEAR)", "DataType": "Float"}]},
        ]
        assert layer_types(json.dumps({"Layers": layers, "I/O Tensors": []})) == {"fp16": 1, "fp32": 1}

    @pytest.mark.parametrize(
        "text", ["", "{", "[]", "null", '{"Layers": ["only names"]}', '{"Layers": [{"Outputs": [3]}]}']
    )
    def test_says_nothing_when_the_inspector_does_not(self, text: str) -> None:
        assert layer_types(text) == {}
