"""A graph from outside is run only if this program could have written it: operators, sizes, memory and work."""

from __future__ import annotations

import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hand_graphs import hand_graph
from once import exported_graph
from plain_graphs import _field, plain_graph
from toy_bundles import save_toy_bundle, toy_graph

from espmedsam_edge.bundle import Bundle, Manifest, Weights, write_bundle
from espmedsam_edge.errors import UserError
from espmedsam_edge.graph_rules import OPERATORS, _Sizes, check_graph
from espmedsam_edge.onnx_file import read_onnx

onnx = pytest.importorskip("onnx", reason="needs onnx (extra export)")
helper, FLOAT = onnx.helper, onnx.TensorProto.FLOAT


def graph_of(nodes: list[Any], constants: dict[str, Any], size: int = 64, opset: int = 20) -> bytes:
    """A graph in a bundle's shape, unchecked."""
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("image", FLOAT, [1, 3, size, size])],
        [helper.make_tensor_value_info("logits", FLOAT, [1, 1, size // 4, size // 4])],
        [onnx.numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    return bytes(model.SerializeToString())


def node(operator: str, inputs: str, outputs: str, **attributes: Any) -> Any:
    return helper.make_node(operator, inputs.split(" "), outputs.split(" "), **attributes)


def why(content: bytes, size: int = 64) -> str:
    """Why a graph is refused, in one line; empty when it is not."""
    try:
        check_graph(content, 1, size, "here.onnx")
    except UserError as error:
        assert "\n" not in str(error)  # noqa: PT017
        assert error.message.startswith("here.onnx is not run: ")  # noqa: PT017
        return error.message
    return ""


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_graphs_such_as_this_program_writes_are_accepted(precision: Any) -> None:
    assert why(hand_graph(precision)) == why(toy_graph()) == why(plain_graph()) == ""


@pytest.mark.parametrize("published", [False, True])
def test_shapes_are_those_that_onnx_infers(published: bool) -> None:
    """Over the whole of an exported network."""
    torch = pytest.importorskip("torch")
    from espmedsam_edge.export.graph import store_weights

    torch.set_num_threads(1)
    model = exported_graph(128, 2, published=published)
    store_weights(model, "float16")
    content = model.SerializeToString()
    check_graph(content, 2, 128, "here")
    sizes = _Sizes(read_onnx(content), 2 * 256 * 256, len(content))
    sizes.check()
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
    expected = {
        value.name: tuple(dim.dim_value for dim in value.type.tensor_type.shape.dim)
        for value in [*inferred.graph.value_info, *inferred.graph.input, *inferred.graph.output]
    }
    assert {name: sizes.shapes[name] for name in expected} == expected
    assert {each.op_type for each in model.graph.node} <= set(OPERATORS)


def test_an_endless_loop_is_refused_by_name() -> None:
    body = helper.make_graph(
        [helper.make_node("Identity", ["go"], ["go_on"])],
        "body",
        [helper.make_tensor_value_info("i", onnx.TensorProto.INT64, []), helper.make_tensor_value_info("go", 9, [])],
        [helper.make_tensor_value_info("go_on", 9, [])],
    )
    loop = helper.make_node("Loop", ["", "true"], [], body=body)
    assert "a graph" in why(graph_of([loop], {"true": np.array(True)}))
    assert "the operator Loop" in why(plain_graph(nodes=_field(1, _field(4, b"Loop"))))


@pytest.mark.parametrize(
    "operator",
    [
        "If",
        "Scan",
        "SequenceMap",
        "ConstantOfShape",
        "Tile",
        "Range",
        "RandomNormal",
        "Det",
        "Resize",
        "NonZero",
        "Fused",
    ],
)
def test_other_operators_are_refused_by_name(operator: str) -> None:
    message = why(graph_of([helper.make_node(operator, ["image"], ["logits"])], {}))
    assert f"it holds the operator {operator}, which no graph of this program has" in message


def test_operators_of_other_sets_are_refused_by_name() -> None:
    own = helper.make_node("Conv", ["image"], ["logits"], domain="com.microsoft")
    assert "the operator com.microsoft:Conv" in why(graph_of([own], {}))
    model = onnx.load_from_string(toy_graph())
    model.opset_import.append(helper.make_opsetid("evil.corp", 1))
    assert "the operators of 'evil.corp'" in why(model.SerializeToString())
    assert "version 12, not 13 to" in why(graph_of([], {}, opset=12))


HUGE = 1 << 30
ONE = np.ones((1,), np.float32)
NAMES = ["image", *(f"c{number}" for number in range(41))]
DOUBLED = [node("Concat", f"{old} {old}", new, axis=0) for old, new in pairwise(NAMES)]


@pytest.mark.parametrize(
    ("nodes", "constants"),
    [
        ([node("Expand", "one size", "big")], {"one": ONE, "size": np.array([HUGE])}),
        ([node("Expand", "one size", "big")], {"one": ONE, "size": np.array([1 << 15, 1 << 15])}),
        ([node("Pad", "image pads", "big")], {"pads": np.array([0, 0, 0, 0, 0, 0, HUGE, HUGE])}),
        ([node("Concat", "image " * 20000 + "image", "big", axis=0)], {}),
        (DOUBLED, {}),
        ([node("Add", "a b", "big")], {"a": np.ones((1, 40000), np.float32), "b": np.ones((40000, 1), np.float32)}),
        ([node("MatMul", "a b", "big")], {"a": np.ones((40000, 1), np.float32), "b": np.ones((1, 40000), np.float32)}),
        ([node("Conv", "image w", "big", pads=[40000] * 4)], {"w": np.ones((1, 3, 1, 1), np.float32)}),
    ],
)  # fmt: skip
def test_sizes_far_above_what_the_input_asks_for_are_refused(nodes: list[Any], constants: dict[str, Any]) -> None:
    begin = time.process_time()
    assert "far more than its input's size asks for" in why(graph_of(nodes, constants))
    assert time.process_time() - begin < 2


def test_many_tensors_alive_at_once_are_refused_and_one_after_the_other_are_not() -> None:
    grown = node("Expand", "image size", "t0")
    constants = {"size": np.array([40, 3, 64, 64])}
    chain = [node("Relu", f"t{i}", f"t{i + 1}") for i in range(60)]
    assert why(graph_of([grown, *chain], constants)) == "here.onnx is not run: nothing gives its output 'logits'."
    every = node("Concat", " ".join(f"t{i}" for i in range(60)), "all", axis=0)
    assert "MiB, far more" in why(graph_of([grown, *chain, every], constants))


def test_what_is_computed_before_it_runs_is_bounded() -> None:
    """ONNX Runtime keeps all that follows from constants: such a chain once took the machine's memory at loading."""
    constants = {"size": np.array([1, 3, 64, 2560]), "w": np.ones((1, 3, 64, 1), np.float32)}
    chain = [node("Softmax", f"t{i}", f"t{i + 1}") for i in range(15_000)]
    assert "computes far more" in why(graph_of([node("Expand", "w size", "t0"), *chain], constants))
    weights = {"w": np.ones((64, 64, 3, 3), np.float16)}
    stored = [node("Cast", "w", "w32", to=1), node("Transpose", "w32", "turned", perm=[1, 0, 2, 3])]
    assert "nothing gives its output" in why(graph_of(stored, weights))  # as weights stored in fewer bits


def test_work_without_products_is_bounded() -> None:
    grown = node("Expand", "image size", "t0")
    chain = [node("Relu", f"t{i}", f"t{i + 1}") for i in range(19_000)]
    assert "computes far more" in why(graph_of([grown, *chain], {"size": np.array([40, 3, 64, 64])}))


def test_names_of_megabytes_are_shortened() -> None:
    assert 500 < len(why(graph_of([node("x" * 2_000_000, "image", "logits")], {}))) < 2500
    assert 500 < len(why(graph_of([node("Relu", "x" * 2_000_000, "logits")], {}))) < 2500


def test_work_far_above_what_the_input_asks_for_is_refused() -> None:
    constants = {"size": np.array([300, 3, 64, 64]), "w": np.ones((64, 64), np.float32)}
    products = [node("MatMul", f"t{i} w", f"t{i + 1}") for i in range(9000)]
    assert "computes far more" in why(graph_of([node("Expand", "image size", "t0"), *products], constants))


@pytest.mark.parametrize(
    ("nodes", "constants", "words"),
    [
        ([node("Reshape", "image image", "logits")], {}, "a size that is computed"),
        ([node("Reshape", "image size", "logits")], {"size": np.array([-1, -1])}, "its Reshape of 1x3x64x64"),
        ([node("Reshape", "image size", "logits")], {"size": np.array([0.5], np.float32)}, "a size that is computed"),
        ([node("Reshape", "image size", "logits")], {"size": np.array([7])}, "its Reshape of 1x3x64x64"),
        ([node("Slice", "image s e", "x")], {"s": np.array([9]), "e": np.array([3])}, "'x' has the shape"),
        ([node("Slice", "image s e s s", "x")], {"s": np.array([0]), "e": np.array([3])}, "its Slice of"),
        ([node("Relu", "nothing", "logits")], {}, "reads 'nothing', which nothing before it gives"),
        ([node("Relu", "image", "image")], {}, "'image' is given twice"),
        ([node("Relu", "image", "x y")], {}, "its Relu gives 2 values"),
        ([node("Relu", "image", "x")], {}, "nothing gives its output 'logits'"),
        ([node("Split", "image", "x", num_outputs=HUGE)], {}, "its Split of"),
        ([node("Transpose", "image", "x", perm=[0, 0, 0, 0])], {}, "its Transpose of"),
        ([node("Cast", "image", "x", to=onnx.TensorProto.STRING)], {}, "its Cast of"),
        ([node("Conv", "image w", "x", group=0)], {"w": np.ones((1, 3, 1, 1), np.float32)}, "its Conv of"),
        ([node("Conv", "image w", "x", strides=[0, 0])], {"w": np.ones((1, 3, 1, 1), np.float32)}, "its Conv of"),
        ([node("Conv", "image", "x")], {}, "its Conv of"),
        ([helper.make_node("Add", [], ["x"])], {}, "its Add of"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_one_line(nodes: list[Any], constants: dict[str, Any], words: str) -> None:
    assert words in why(graph_of(nodes, constants))


def test_a_foreign_graph_in_a_bundle_is_refused_with_what_to_do(tmp_path: Path) -> None:
    with write_bundle(tmp_path / "b") as draft:
        draft.new_file("fp32.onnx").write_bytes(graph_of([helper.make_node("Tile", ["image", "n"], ["logits"])], {}))
        entry = draft.graph("fp32.onnx", modality="fundus", precision="fp32", image_size=64)
        weights = Weights(checkpoint_sha256="0" * 64, origin="trained")
        draft.manifest = Manifest(preset="toy", weights=weights, graphs=[entry])
    bundle = Bundle.open(tmp_path / "b")
    with pytest.raises(UserError, match=r"fp32\.onnx is not run: it holds the operator Tile.*espmedsam-edge export"):
        bundle.read_graph(bundle.graph())
    good = save_toy_bundle(tmp_path / "good")
    assert good.read_graph(good.graph()) == toy_graph()
