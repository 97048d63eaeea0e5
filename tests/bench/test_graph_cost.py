"""What a graph costs, against a count by hand and against ONNX's own shapes; and what bounds it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from espmedsam_edge.bench import rates
from espmedsam_edge.bench.graph_cost import graph_cost
from espmedsam_edge.bench.rates import host_copy_rate, product_rate
from espmedsam_edge.bench.roofline import GraphCost, Kernel, Rates, Roofline, bound
from espmedsam_edge.bundle import Bundle, Graph
from espmedsam_edge.errors import UserError
from espmedsam_edge.runtime.backends.backend import Choice
from espmedsam_edge.runtime.segmenter import Segmenter
from espmedsam_edge.shipped.bundles import shipped_bundle

onnx = pytest.importorskip("onnx", reason="needs onnx (extra export)")


def save(path: Path, nodes: list[Any], constants: dict[str, Any], outputs: list[int], shape: tuple[int, ...]) -> Path:
    helper, float32 = onnx.helper, onnx.TensorProto.FLOAT
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", float32, shape)],
        [helper.make_tensor_value_info("y", float32, outputs)],
        [onnx.numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model)
    path.write_bytes(model.SerializeToString())
    return path


def node(kind: str, inputs: str, output: str, **attributes: Any) -> Any:
    return onnx.helper.make_node(kind, inputs.split(), [output], name=output, **attributes)


def test_products_with_what_follows_them_are_one_kernel(tmp_path: Path) -> None:
    nodes = [
        node("Conv", "x w", "a"),  # 1x8x8x8 from 1x3x8x8
        node("Relu", "a", "b"),
        node("Reshape", "b flat", "c"),  # (8, 64)
        node("MatMul", "c m", "d"),  # (8, 16)
        node("Add", "d bias", "y"),
    ]
    constants = {
        "w": np.ones((8, 3, 1, 1), np.float32),
        "flat": np.array([8, 64]),
        "m": np.ones((64, 16), np.float32),
        "bias": np.ones(16, np.float32),
    }
    cost = graph_cost(save(tmp_path / "g.onnx", nodes, constants, [8, 16], (1, 3, 8, 8)).read_bytes())
    first, second = cost.kernels
    assert (first.name, first.type, first.flop) == ("a", "fp32", 2 * 8 * 64 * 3)
    assert first.bytes == 4 * (3 * 64 + 8 * 3 + 8 * 64) + 8 * 2  # the shape it is given is read, too
    assert (second.name, second.flop) == ("d", 2 * 8 * 64 * 16)
    assert second.bytes == 4 * (8 * 64 + 64 * 16 + 16 + 8 * 16)
    assert cost.flop == {"fp32": first.flop + second.flop}
    assert cost.weight_bytes == 4 * (24 + 1024 + 16) + 16


def test_a_residual_is_written_once_and_read_by_all_who_use_it(tmp_path: Path) -> None:
    nodes = [
        node("MatMul", "x m", "a"),
        node("Softmax", "a", "b"),
        node("MatMul", "b m", "c"),
        node("Add", "c a", "y"),  # a is used twice: it was written by its product
    ]
    cost = graph_cost(
        save(tmp_path / "g.onnx", nodes, {"m": np.ones((16, 16), np.float32)}, [8, 16], (8, 16)).read_bytes()
    )
    sizes = {kernel.name: kernel.bytes for kernel in cost.kernels}
    tensor, matrix = 4 * 8 * 16, 4 * 16 * 16
    assert sizes == {"a": 2 * tensor + matrix, "b": 2 * tensor, "c": 3 * tensor + matrix}


def test_weights_count_as_they_are_stored(tmp_path: Path) -> None:
    nodes = [
        node("QuantizeLinear", "x s z", "q"),
        node("DequantizeLinear", "q s z", "d"),
        node("DequantizeLinear", "m s z", "w"),
        node("MatMul", "d w", "y"),
    ]
    constants = {"s": np.float32(0.1), "z": np.int8(0), "m": np.ones((16, 4), np.int8)}
    cost = graph_cost(save(tmp_path / "g.onnx", nodes, constants, [8, 4], (8, 16)).read_bytes())
    assert cost.flop == {"int8": 2 * 8 * 16 * 4}
    assert cost.weight_bytes == 64 + 4 + 1


def test_a_whole_networks_operations_agree_with_onnx(tmp_path: Path) -> None:
    bundle = shipped_bundle("microscopy", tmp_path / "b")
    content = bundle.read_graph(bundle.graph())
    model = onnx.shape_inference.infer_shapes(onnx.load_from_string(content))
    values = [*model.graph.value_info, *model.graph.input, *model.graph.output]
    shapes = {value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim] for value in values}
    shapes |= {tensor.name: list(tensor.dims) for tensor in model.graph.initializer}
    expected = 0
    for each in model.graph.node:
        if each.op_type == "MatMul":
            expected += 2 * math.prod(shapes[each.output[0]]) * shapes[each.input[0]][-1]
        elif each.op_type == "Conv":
            expected += 2 * math.prod(shapes[each.output[0]]) * math.prod(shapes[each.input[1]][1:])
    cost = graph_cost(content)
    assert sum(cost.flop.values()) == expected
    stored = sum(math.prod(tensor.dims) for tensor in model.graph.initializer)
    assert 3.9 * stored <= cost.weight_bytes <= 4.1 * stored
    names = {each.name for each in model.graph.node}
    assert all(kernel.name in names for kernel in cost.kernels)


def test_each_kernel_is_bound_by_the_longer_of_its_two() -> None:
    cost = GraphCost([Kernel("a", "fp16", 200, 10), Kernel("b", "int8", 20, 40), Kernel("c", "", 0, 30)], 5)
    found = bound(cost, Rates({"fp16": 100.0}, 10.0))  # no rate of int8: that of fp16
    assert (found.products, found.copies, found.kernels) == (2.2, 8.0, 2.0 + 4.0 + 3.0)
    line = Roofline(cost, Rates({"fp16": 100.0}, 10.0), 18.0).line
    assert "bound by memory; the graph takes 2.00 x that" in line
    shown = Roofline(cost, Rates({"fp16": 1000.0}, 1e6), 18.0).as_json()
    assert shown["bound_ms"] == pytest.approx(1000 * (0.2 + 0.02 + 3e-5))


@pytest.mark.parametrize("type_name", ["fp32", "fp16", "int8"])
def test_the_product_that_is_measured_has_the_operations_it_is_taken_for(
    type_name: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from espmedsam_edge.bench import rates

    counted: list[GraphCost] = []
    build = rates._product_bundle

    def watched(path: Path, *arguments: Any) -> Any:
        bundle = build(path, *arguments)
        counted.append(graph_cost(bundle.read_graph(bundle.manifest.graphs[0])))
        return bundle

    monkeypatch.setattr(rates, "_product_bundle", watched)
    monkeypatch.setattr(rates, "_SECONDS", 0.0)
    monkeypatch.setattr(rates, "_RUNS", 1)
    assert product_rate("onnxruntime-cpu", type_name, 1) > 0
    assert counted[0].flop == {type_name: 4 * 2 * 3 * 512 * 512 * 1024}


class Reducing:
    """A backend that says that it computes float32 in bfloat16."""

    name, device, arithmetic = "openvino:bf16", "CPU", "bf16"

    def __init__(self, graph: Graph) -> None:
        self.graph = graph

    def run(self, image: np.ndarray) -> np.ndarray:
        return np.zeros(self.graph.output_shape, np.float32)

    def close(self) -> None:
        pass


def test_what_a_runtime_reduces_by_itself_is_called_that(toy_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rates, "measured_rates", lambda *_: Rates({"fp32": 1e9, "int8": 4e9}, 1e9))
    graph = toy_bundle.graph()
    plain = rates.roofline(Segmenter(toy_bundle, Choice(Exact(graph)), 0.5), 1, 1.0)
    reduced = rates.roofline(Segmenter(toy_bundle, Choice(Reducing(graph)), 0.5), 1, 1.0)
    assert set(plain.cost.flop) == {"fp32"}
    assert reduced.cost.flop == {"bf16": plain.cost.flop["fp32"]}
    assert reduced.rates.products == {"bf16": 1e9, "int8": 4e9}
    assert reduced.cost.bytes == plain.cost.bytes // 2
    assert "GFLOP/s in bf16" in reduced.line
    mixed = GraphCost([Kernel("a", "int8", 8, 10, 4), Kernel("b", "fp32", 2, 40, 8), Kernel("c", "", 0, 6)], 12)
    assert mixed.computed_in("bf16").kernels == [
        Kernel("a", "int8", 8, 10, 4),
        Kernel("b", "bf16", 2, 20, 4),
        Kernel("c", "", 0, 3),
    ]


class Exact(Reducing):
    arithmetic = "fp32"


def test_copies_count_reading_and_writing(monkeypatch: pytest.MonkeyPatch) -> None:
    from espmedsam_edge.bench import rates

    ticks = iter(range(100))
    monkeypatch.setattr(rates, "_HOST_COPY", 1000)
    monkeypatch.setattr(rates.time, "perf_counter", lambda: next(ticks))
    assert host_copy_rate(3) == 2 * 1000 * 3 / 1


def test_without_onnx_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("espmedsam_edge.machine.installation.find_spec", lambda name: None)
    with pytest.raises(UserError, match="onnx is not installed"):
        graph_cost(b"")
