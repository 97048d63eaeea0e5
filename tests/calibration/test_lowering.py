"""Lowered graphs: what they compute in, how large they are, and that ONNX Runtime is not trusted with FP16."""

import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, helper, numpy_helper
from trained_graphs import SIZE, hostile, tensor, trained_graph

pytest.importorskip("modelopt", reason="needs nvidia-modelopt (extra calibrate)")

from engines_in_process import build_plan

from espmedsam_edge.bundle import Graph, Precision
from espmedsam_edge.calibration import modelopt_tools
from espmedsam_edge.calibration.emulation import emulate, simulate
from espmedsam_edge.calibration.lowering import lower, tidy
from espmedsam_edge.calibration.network import Network, group_of
from espmedsam_edge.calibration.plan import Plan, fp16_holds, lowest_plan, quantisable_nodes, quantised_tensors
from espmedsam_edge.calibration.ranges import Ranges, measure_ranges
from espmedsam_edge.errors import UserError
from espmedsam_edge.runtime.engines import child, tensorrt_api
from espmedsam_edge.runtime.engines.precision import check_arithmetic
from espmedsam_edge.runtime.onnx_session import open_session

pytestmark = pytest.mark.xdist_group("lowering")  # one process makes what they share


def run(model: ModelProto, folder: Path, image: NDArray[np.float32]) -> NDArray[np.float32]:
    (logits,) = open_session(model.SerializeToString(), 1).run(None, {"image": image})
    return np.asarray(logits)


@pytest.fixture(scope="module")
def network() -> Network:
    return Network.of(trained_graph())


@pytest.fixture(scope="module")
def ranges(network: Network) -> Ranges:
    return measure_ranges(network, [tensor(seed) for seed in range(4)], quantised_tensors(network), threads=1)


@pytest.fixture(scope="module")
def thresholds(ranges: Ranges) -> dict[str, float]:
    return {name: values["percentile"] for name, values in ranges.thresholds.items()}


@pytest.fixture(scope="module")
def fp16(network: Network, ranges: Ranges, thresholds: dict[str, float]) -> ModelProto:
    return lower(network, lowest_plan(network, ranges, "fp16"), thresholds, tensor(0))


@pytest.fixture(scope="module")
def int8(network: Network, ranges: Ranges, thresholds: dict[str, float]) -> ModelProto:
    return lower(network, lowest_plan(network, ranges, "int8"), thresholds, tensor(0))


@pytest.fixture(scope="module")
def for_cpu(network: Network, ranges: Ranges, thresholds: dict[str, float]) -> ModelProto:
    return lower(network, lowest_plan(network, ranges, "int8", "cpu"), thresholds, tensor(0))


def test_ranges_are_those_of_the_graph(network: Network, ranges: Ranges, tmp_path: Path) -> None:
    logits = [run(network.model, tmp_path, tensor(seed)) for seed in range(4)]
    assert ranges.magnitude(network, "logits") == pytest.approx(float(np.abs(logits).max()), rel=1e-5)  # other fusions
    assert ranges.largest["image"] == pytest.approx(max(float(np.abs(tensor(seed)).max()) for seed in range(4)))


def test_input_and_output_stay_float32(fp16: ModelProto, int8: ModelProto) -> None:
    for model in (fp16, int8):
        for value, name in ((model.graph.input[0], "image"), (model.graph.output[0], "logits")):
            assert value.name == name
            assert value.type.tensor_type.elem_type == TensorProto.FLOAT


def test_fp16_keeps_layer_norm_alone_in_fp32_and_halves_the_file(network: Network, fp16: ModelProto) -> None:
    table = Network.of(fp16).nodes_by_type()
    assert {operator for operator, counts in table.items() if counts["fp32"]} == {"LayerNormalization"}
    assert Network.of(fp16).macs_by_type().keys() == {"fp16"}
    assert fp16.ByteSize() <= 0.55 * network.model.ByteSize()


def test_int8_leaves_out_what_it_must(network: Network, int8: ModelProto) -> None:
    lowered = Network.of(int8)
    quantised = {node.name for node in lowered.nodes if lowered.macs(node) and lowered.product_type(node) == "int8"}
    assert quantised == {node.name for node in quantisable_nodes(network)}
    products_of_activations = {
        node.name for node in network.nodes if node.op_type == "MatMul" and node.input[1] not in network.constants
    }
    assert products_of_activations
    assert not quantised & products_of_activations
    assert not any(name.startswith(("decoder.layers", "decoder.final", "decoder.hypernetwork")) for name in quantised)
    readers = {node.op_type for node in lowered.nodes for name in node.input if name in dequantised(lowered)}
    assert readers == {"Conv", "MatMul"}  # residual Adds, LayerNorm, Softmax and GELU read no quantised tensor


def dequantised(network: Network) -> set[str]:
    return {node.output[0] for node in network.nodes if node.op_type == "DequantizeLinear"}


def test_int8_weights_are_stored_as_int8_symmetric_and_by_channel(int8: ModelProto) -> None:
    network = Network.of(int8)
    for node in network.nodes:
        if node.op_type != "DequantizeLinear" or node.input[0] not in network.constants:
            continue
        weight, scale, zero = (numpy_helper.to_array(network.constants[name]) for name in node.input)
        assert weight.dtype == np.int8
        assert scale.dtype == np.float16
        assert not zero.any()
        axis = next(attribute.i for attribute in node.attribute if attribute.name == "axis")
        assert scale.shape == (weight.shape[axis],)
        others = tuple(index for index in range(weight.ndim) if index != axis)
        assert (np.abs(weight.astype(int)).max(axis=others) == 127).all()


def test_int8_for_a_processor_has_nothing_that_computes_in_fp16(
    network: Network, for_cpu: ModelProto, int8: ModelProto
) -> None:
    lowered = Network.of(for_cpu)
    assert not any("fp16" in counts for counts in lowered.nodes_by_type().values())
    macs, usual = lowered.macs_by_type(), Network.of(int8).macs_by_type()
    assert set(macs) == {"int8", "fp32"}
    assert macs["int8"] == usual["int8"]
    types = [
        numpy_helper.to_array(lowered.constants[node.input[1]]).dtype
        for node in lowered.nodes
        if node.op_type in ("QuantizeLinear", "DequantizeLinear")
    ]
    assert types
    assert set(types) == {np.dtype(np.float32)}
    assert for_cpu.ByteSize() < 0.55 * network.model.ByteSize()


def test_onnx_runtime_hides_fp16_and_the_emulation_does_not(tmp_path: Path) -> None:
    half = numpy_helper.from_array(np.full((1, 1), 60000, np.float16), "w")
    tiny = numpy_helper.from_array(np.full((1, 1), 1e-4, np.float16), "v")
    nodes = [
        helper.make_node("Cast", ["image"], ["a"], to=TensorProto.FLOAT16),
        helper.make_node("MatMul", ["a", "w"], ["b"]),
        helper.make_node("MatMul", ["b", "v"], ["c"]),
        helper.make_node("Cast", ["c"], ["logits"], to=TensorProto.FLOAT),
    ]
    shapes = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 1]) for name in ("image", "logits")]
    graph = helper.make_graph(nodes, "overflow", shapes[:1], shapes[1:], [half, tiny])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    image = np.full((1, 1), 2, np.float32)
    assert np.isfinite(run(model, tmp_path, image)).all()
    assert np.isinf(run(emulate(model), tmp_path, image)).all()


def test_the_simulation_of_a_plan_is_the_emulation_of_its_graph(
    network: Network,
    ranges: Ranges,
    thresholds: dict[str, float],
    fp16: ModelProto,
    int8: ModelProto,
    for_cpu: ModelProto,
    tmp_path: Path,
) -> None:
    image = tensor(9)
    reference = run(network.model, tmp_path, image)
    plans = [lowest_plan(network, ranges, precision) for precision in ("fp16", "int8")]  # type: ignore[arg-type]
    plans.append(lowest_plan(network, ranges, "int8", "cpu"))
    for model, plan in zip((fp16, int8, for_cpu), plans, strict=True):
        real = run(emulate(model), tmp_path, image)
        simulated = run(simulate(network, plan, thresholds), tmp_path, image)
        lost = np.abs(real - reference).max()
        assert lost > 0
        # Equal but for ties in rounding that another order of float32 operations breaks the other way.
        assert np.abs(real - simulated).max() <= 0.1 * lost


def test_the_emulation_multiplies_no_integers(int8: ModelProto, tmp_path: Path) -> None:
    """Without VNNI, ONNX Runtime's INT8 products saturate on CPUs; a device's do not."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    options.log_severity_level = 4
    onnxruntime.InferenceSession(emulate(int8).SerializeToString(), options, providers=["CPUExecutionProvider"])
    operators = {node.op_type for node in onnx.load(str(tmp_path / "optimised.onnx")).graph.node}
    assert "QuantizeLinear" in operators
    assert not [name for name in operators if "Integer" in name or name.startswith("QLinear")]


def test_a_hostile_network_is_nan_in_naive_fp16_and_right_in_ours(
    network: Network, thresholds: dict[str, float], tmp_path: Path
) -> None:
    model = hostile(network.model)
    hard = Network.of(model)
    image = tensor(3)
    reference = run(model, tmp_path, image)
    assert np.abs(reference - run(network.model, tmp_path, image)).max() < 1e-3  # the same function
    norms = frozenset(node.name for node in hard.nodes if node.op_type == "LayerNormalization")
    naive = run(simulate(hard, Plan(norms, frozenset()), thresholds), tmp_path, image)
    assert not np.isfinite(naive).all()
    measured = measure_ranges(hard, [tensor(seed) for seed in range(3)], [], threads=1)
    assert max(measured.largest.values()) > 65504
    plan = lowest_plan(hard, measured, "fp16")
    assert norms < plan.fp32
    ours = run(emulate(lower(hard, plan, thresholds, image)), tmp_path, image)
    spread = float(reference.max() - reference.min())
    assert np.abs(ours - reference).max() < 0.01 * spread  # FP16 rounding, as without the rescaling


def test_weights_that_fp16_would_flush_stay_in_fp32(network: Network, ranges: Ranges) -> None:
    assert fp16_holds(np.random.default_rng(0).normal(0, 0.02, (64, 64)).astype(np.float32))
    assert not fp16_holds(np.random.default_rng(0).normal(0, 2e-7, (64, 64)).astype(np.float32))
    assert not fp16_holds(np.full((2, 2), 1e5, np.float32))


def test_raising_a_group_keeps_it_out_of_int8(network: Network, ranges: Ranges) -> None:
    plan = lowest_plan(network, ranges, "int8")
    groups = plan.lowered_groups(network)
    raised = plan.raise_groups(network, groups[:2])
    assert raised.raised == tuple(groups[:2])
    assert not any(group_of(name) in groups[:2] for name in raised.int8)
    assert replace(plan, int8=frozenset()).precision == "fp16"


def test_a_group_raised_for_a_processor_computes_in_fp32(
    network: Network, ranges: Ranges, thresholds: dict[str, float]
) -> None:
    plan = lowest_plan(network, ranges, "int8", "cpu")
    group = plan.lowered_groups(network)[0]
    lowered = Network.of(lower(network, plan.raise_groups(network, [group]), thresholds, tensor(0)))
    own = {node.name for node in network.groups()[group]}
    types = {node.name: lowered.product_type(node) for node in lowered.nodes if node.name in own | plan.int8}
    assert {types[name] for name in own & plan.int8} == {"fp32"}
    assert {types[name] for name in plan.int8 - own} == {"int8"}


def test_tidy_stores_repeated_and_equal_constants_once() -> None:
    row = np.random.default_rng(0).random((1, 2048)).astype(np.float32)
    constants = {"repeated": np.repeat(row, 4, axis=0), "first": np.ones((4, 2048), np.float32)}
    constants["second"] = constants["first"].copy()
    nodes = [helper.make_node("Add", ["image", "repeated"], ["a"])]
    nodes += [helper.make_node("Mul", ["a", "first"], ["b"]), helper.make_node("Mul", ["b", "second"], ["logits"])]
    shapes = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [4, 2048]) for name in ("image", "logits")]
    tensors = [numpy_helper.from_array(values, name) for name, values in constants.items()]
    graph = helper.make_graph(nodes, "constants", shapes[:1], shapes[1:], tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    small = tidy(model)
    assert small.ByteSize() < 0.25 * model.ByteSize()
    evaluator = onnx.reference.ReferenceEvaluator
    image = {"image": np.random.default_rng(1).random((4, 2048)).astype(np.float32)}
    (before,), (after,) = evaluator(model).run(None, image), evaluator(small).run(None, image)
    assert np.abs(before - after).max() < 1e-3  # constants in FP16


def test_a_changed_modelopt_fails_with_a_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import modelopt.onnx.autocast as autocast

    modelopt_tools.check_interface()
    monkeypatch.setattr(autocast, "convert_to_mixed_precision", lambda onnx_path, low_precision_type: None)
    with pytest.raises(UserError, match=r"ModelOpt .* is not one this program knows: .* takes no keep_io_types"):
        modelopt_tools.check_interface()
    monkeypatch.delattr(autocast, "convert_to_mixed_precision")
    with pytest.raises(UserError, match="has no convert_to_mixed_precision"):
        modelopt_tools.check_interface()


@pytest.mark.rtx
@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_tensorrt_rtx_builds_the_graph_in_its_precision(
    precision: Precision, fp16: ModelProto, int8: ModelProto, tmp_path: Path
) -> None:
    if not tensorrt_api.installed("tensorrt-rtx"):
        pytest.skip("TensorRT-RTX is not installed (extra rtx)")
    model = fp16 if precision == "fp16" else int8
    file = tmp_path / f"{precision}.onnx"
    content = model.SerializeToString()
    file.write_bytes(content)
    digest = hashlib.sha256(content).hexdigest()
    graph = Graph(modality="dermoscopy", precision=precision, file=file.name, sha256=digest, image_size=SIZE)
    result = child.check(graph, file, "tensorrt-rtx")
    assert not result.refusals
    assert result.arithmetic is not None
    check_arithmetic(result.arithmetic, graph)
    ours = Network.of(model).macs_by_type()
    for dtype, macs in ours.items():  # TensorRT counts the same shares
        assert result.arithmetic.share(dtype) == pytest.approx(macs / sum(ours.values()), abs=0.02)
    assert len(build_plan(file, ["sm86"], "tensorrt-rtx")) > 100_000
