"""Where a processor's time goes in a graph, operation by operation, and whether graphs of equal result take less.

    python benchmarks/operations.py --bundles runs/processors --name operations-MACHINE

For the FP32 graphs of the bundles that ``processors.py prepare`` makes, in ONNX Runtime and in OpenVINO (FP32 and
bfloat16): milliseconds by kind of operation, as each runtime's own profile has them, beside the floating-point
operations of the products. Then the graph rewritten in ways that compute the same, each against the graph as it is, in
turn, with how far its logits are off. Two minutes on two cores that nobody else uses; ``operations.md`` says what was
expected and what came of it.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import numpy_helper
from processors import image_of, in_turn, summary

from espmedsam_edge.bundle import Bundle
from espmedsam_edge.files import atomic_write
from espmedsam_edge.machine.cores import usable_cores
from espmedsam_edge.machine.environment import collect_environment
from espmedsam_edge.runtime.backends.openvino_api import core
from espmedsam_edge.runtime.onnx_session import INPUT, open_session

RESULTS = Path(__file__).parent / "results"
SIZES = ("448", "1024")
ORT, OPENVINO, BF16 = "onnxruntime", "openvino", "openvino:bf16"
_AS_IT_IS = "as it is"
_RUNS = 5  # of a profile, after one that is not counted
_NEVER = -1e30  # a key whose bias this is gets no weight, exactly

Graph = onnx.GraphProto


def windows(graph: Graph) -> list[tuple[onnx.NodeProto, ...]]:
    """Of each window attention: keys joined to the bag's, their Transpose, scores, bias, Softmax, values, result."""
    by_output = {output: node for node in graph.node for output in node.output}
    by_input = {name: node for node in graph.node for name in node.input}
    found = []
    for softmax in graph.node:
        if softmax.op_type != "Softmax" or softmax.input[0] not in by_output:
            continue
        bias = by_output[softmax.input[0]]
        scores = by_output.get(bias.input[0])
        if bias.op_type != "Add" or scores is None or scores.op_type != "MatMul":
            continue
        turned, result = by_output[scores.input[1]], by_input[softmax.output[0]]
        keys, values = by_output.get(turned.input[0]), by_output.get(result.input[1])
        if turned.op_type == "Transpose" and keys and values and keys.op_type == values.op_type == "Concat":
            found.append((keys, turned, scores, bias, softmax, values, result))
    return found


def padded(graph: Graph, multiple: int) -> None:
    """Give every window a multiple of so many keys: zeros whose bias lets them have no weight."""
    _, constants = _makers(graph)
    for keys, _, _, bias, _, values, _ in windows(graph):
        biases = numpy_helper.to_array(constants[bias.input[1]])
        more = -biases.shape[-1] % multiple
        for joined in (keys, values):
            own = numpy_helper.to_array(constants[joined.input[1]])
            zeros = np.zeros((*own.shape[:2], more, own.shape[3]), np.float32)
            joined.input[1] = _constant(graph, f"{joined.name}_padded", np.concatenate([own, zeros], axis=2))
        never = np.full((*biases.shape[:2], more), _NEVER, np.float32)
        bias.input[1] = _constant(graph, f"{bias.name}_padded", np.concatenate([biases, never], axis=2))
    graph.ClearField("value_info")


def keys_turned_once(graph: Graph) -> None:
    """Bring keys into the product's order when windows are made, instead of turning them once more afterwards."""
    by_output, constants = _makers(graph)
    for keys, turned, scores, *_ in windows(graph):
        shaped = by_output[keys.input[0]]
        moved = by_output[shaped.input[0]]
        rows, columns, heads, height, width, depth = _shape(graph, moved)
        order = next(one for one in moved.attribute if one.name == "perm")
        order.ints[:] = [*order.ints[:3], order.ints[5], *order.ints[3:5]]
        side = np.array([rows * columns, heads, depth, height * width], np.int64)
        shaped.input[1] = _constant(graph, f"{shaped.name}_turned", side)
        own = numpy_helper.to_array(constants[keys.input[1]])
        keys.input[1] = _constant(graph, f"{keys.name}_turned", own.swapaxes(2, 3))
        next(one for one in keys.attribute if one.name == "axis").i = 3
        scores.input[1] = keys.output[0]
        graph.node.remove(turned)
    graph.ClearField("value_info")


def three_products(graph: Graph) -> None:
    """Queries, keys and values by a product each, instead of one that is split."""
    by_output, constants = _makers(graph)
    for split in [node for node in graph.node if node.op_type == "Split"]:
        chain = [split]
        while chain[-1].op_type != "MatMul":
            chain.append(by_output[chain[-1].input[0]])
        place = list(graph.node).index(chain[-1])
        parts = []
        for part, output in enumerate(split.output):
            name = chain[-1].input[0]
            for node in reversed(chain[1:]):
                copy = onnx.NodeProto()
                copy.CopyFrom(node)
                copy.name, copy.input[0] = f"{node.name}_{part}", name
                if node.op_type in ("MatMul", "Add"):
                    own = np.split(numpy_helper.to_array(constants[node.input[1]]), len(split.output), axis=-1)[part]
                    copy.input[1] = _constant(graph, f"{node.name}_{part}", own)
                name = copy.output[0] = output if node is chain[1] else f"{node.output[0]}_{part}"
                parts.append(copy)
        for node in chain:
            graph.node.remove(node)
        for node in reversed(parts):
            graph.node.insert(place, node)
    graph.ClearField("value_info")


def _makers(graph: Graph) -> tuple[dict[str, onnx.NodeProto], dict[str, onnx.TensorProto]]:
    """What makes each tensor: a node, or nothing, since it is a constant."""
    nodes = {output: node for node in graph.node for output in node.output}
    return nodes, {one.name: one for one in graph.initializer}


def _constant(graph: Graph, name: str, values: np.ndarray) -> str:
    graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(values), name))
    return name


def _shape(graph: Graph, node: onnx.NodeProto) -> list[int]:
    """Of a node's result, as shape inference noted it."""
    (value,) = (one for one in graph.value_info if one.name == node.output[0])
    return [size.dim_value for size in value.type.tensor_type.shape.dim]


WAYS: dict[str, Callable[[Graph], None]] = {
    "keys padded to 8": lambda graph: padded(graph, 8),
    "keys padded to 16": lambda graph: padded(graph, 16),
    "keys turned once": keys_turned_once,
    "three products": three_products,
}


def products(graph: Graph) -> dict[str, float]:
    """GFLOP by kind of product."""
    constants = {one.name: list(one.dims) for one in graph.initializer}
    shapes = {one.name: [size.dim_value for size in one.type.tensor_type.shape.dim] for one in graph.value_info}
    found: Counter[str] = Counter()
    for node in graph.node:
        if node.op_type == "MatMul":
            inner = (constants.get(node.input[1]) or shapes[node.input[1]])[-2]
            kind = "MatMul with weights" if node.input[1] in constants else "MatMul of attention"
        elif node.op_type == "Conv":
            inner = int(np.prod(constants[node.input[1]][1:]))
            kind = "Conv, depthwise" if constants[node.input[1]][1] == 1 else "Conv, dense"
        else:
            continue
        found[kind] += 2 * inner * float(np.prod(shapes.get(node.output[0], [1]))) / 1e9
    return {kind: round(value, 2) for kind, value in found.items()}


def loaded(content: bytes, runtime: str) -> Callable[[np.ndarray], np.ndarray]:
    """The graph in a runtime, with the settings of the backends."""
    if runtime == ORT:
        session = open_session(content, usable_cores())
        return lambda image: np.asarray(session.run(None, {INPUT: image})[0])
    compiled = core().compile_model(core().read_model(content), "CPU", _settings(runtime))
    request = compiled.create_infer_request()
    return lambda image: np.array(request.infer([image])[0])


def _settings(runtime: str) -> dict[str, Any]:
    return {
        "INFERENCE_PRECISION_HINT": "bf16" if runtime == BF16 else "f32", "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": 1, "ENABLE_CPU_PINNING": False, "INFERENCE_NUM_THREADS": usable_cores(),
    }  # fmt: skip


def profile(content: bytes, runtime: str, image: np.ndarray, folder: Path) -> dict[str, float]:
    """Milliseconds of a run by kind of operation, as the runtime calls them, most first."""
    kinds: Counter[str] = Counter()
    if runtime == ORT:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.enable_profiling = usable_cores(), True
        options.profile_file_prefix = str(folder / "profile")
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        for _ in range(_RUNS + 1):
            session.run(None, {INPUT: image})
        events = [one for one in json.loads(Path(session.end_profiling()).read_text()) if one["cat"] == "Node"]
        events = events[len(events) // (_RUNS + 1) :]  # without the first run's
        for event in events:
            kinds[event["args"]["op_name"]] += event["dur"] / 1000 / _RUNS
    else:
        compiled = core().compile_model(core().read_model(content), "CPU", {**_settings(runtime), "PERF_COUNT": True})
        request = compiled.create_infer_request()
        for run in range(_RUNS + 1):
            request.infer([image])
            for one in request.get_profiling_info() if run else ():
                kinds[one.node_type] += 1000 * one.real_time.total_seconds() / _RUNS
    return {kind: round(value, 2) for kind, value in kinds.most_common() if value >= 0.05}


def measure(bundles: Path, size: str, rounds: int, folder: Path) -> dict[str, Any]:
    """One bundle's FP32 graph."""
    bundle = Bundle.open(bundles / f"{size}.bundle")
    entry = bundle.graph(None, "fp32")
    model = onnx.shape_inference.infer_shapes(onnx.load_from_string(bundle.read_graph(entry)))
    image = image_of(bundle, entry)
    found: dict[str, Any] = {"gflop": products(model.graph), "profile": {}, "ways": {}}
    print(f"{size}: {found['gflop']} GFLOP")
    contents = {_AS_IT_IS: model.SerializeToString()}
    for name, way in WAYS.items():
        other = onnx.ModelProto()
        other.CopyFrom(model)
        way(other.graph)
        onnx.checker.check_model(other)
        contents[name] = other.SerializeToString()
    for runtime in (ORT, OPENVINO, BF16):
        found["profile"][runtime] = profile(contents[_AS_IT_IS], runtime, image, folder)
        print(f"  {runtime}: {found['profile'][runtime]}", flush=True)
        ways = {name: loaded(content, runtime) for name, content in contents.items()}
        expected = ways[_AS_IT_IS](image)
        rows = summary(in_turn({name: lambda w=w: w(image) for name, w in ways.items()}, rounds), _AS_IT_IS)
        for name, way in ways.items():
            rows[name]["logits_off"] = float(np.abs(way(image) - expected).max())
        found["ways"][runtime] = {
            name: {key: row[key] for key in ("of", "logits_off")} | {"p50_ms": row["ms"]["p50"]}
            for name, row in rows.items()
        }
    return found


def main() -> None:
    """Measure and keep."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--bundles", type=Path, default=Path("runs/processors"))
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--name", required=True, help="of the file in benchmarks/results/, without its ending")
    arguments = parser.parse_args()
    result: dict[str, Any] = {"schema": 1, "kind": "operations", "environment": collect_environment()}
    with tempfile.TemporaryDirectory(prefix="espmedsam-") as folder:
        for size in SIZES:
            result[size] = measure(arguments.bundles, size, arguments.rounds, Path(folder))
    atomic_write(RESULTS / f"{arguments.name}.json", json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
