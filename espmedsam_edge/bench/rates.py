"""Measures what a backend's machine can do at best: matrix products, through the backend itself, and copies."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from espmedsam_edge.bench.competitors import runs_on_gpu
from espmedsam_edge.bench.graph_cost import graph_cost
from espmedsam_edge.bench.roofline import HALVES, GraphCost, Rates, Roofline
from espmedsam_edge.bundle import PRECISIONS, Bundle, Manifest, Precision, Weights, graph_file_name, write_bundle
from espmedsam_edge.files import temporary_folder
from espmedsam_edge.runtime.backends.backend import FrameBackend, FrameOptions, ReducingBackend, load_backend
from espmedsam_edge.runtime.cuda.device import CudaDevice
from espmedsam_edge.runtime.cuda.memory import DeviceBuffer
from espmedsam_edge.runtime.cuda.stream import Event, Stream
from espmedsam_edge.runtime.segmenter import Segmenter

if TYPE_CHECKING:
    from onnx import NodeProto, TensorProto

_RUNS = 5
_SECONDS = 0.5
_HOST_COPY = 64 << 20  # bytes a thread: more than any cache
_DEVICE_COPY, _DEVICE_COPIES = 256 << 20, 10  # bytes: more than any cache on a GPU
_MINOR = 0.1  # a type with less of the products is not measured for itself


def roofline(segmenter: Segmenter, threads: int, seconds: float) -> Roofline:
    """A segmenter's graph against what its machine can do.

    Args:
        segmenter: what was measured.
        threads: CPU threads that it may use.
        seconds: median of one run of its graph.

    Raises:
        UserError: onnx is not installed, or the backend does not take the product.
    """
    bundle, graph = segmenter.bundle, segmenter.graph
    cost = graph_cost(bundle.read_graph(graph), bundle.graph_path(graph))
    rates, backend = measured_rates(segmenter, threads, _main_types(cost)), segmenter.choice.backend
    if isinstance(backend, ReducingBackend) and backend.arithmetic in HALVES:
        cost, rates = cost.computed_in(backend.arithmetic), rates.of_fp32_in(backend.arithmetic)
    return Roofline(cost, rates, seconds)


def _main_types(cost: GraphCost) -> list[Precision]:
    total = sum(cost.flop.values())
    return [name for name in PRECISIONS if cost.flop.get(name, 0) > _MINOR * total] or ["fp32"]


def measured_rates(segmenter: Segmenter, threads: int, types: Sequence[Precision]) -> Rates:
    """The best rates of a segmenter's backend.

    Args:
        segmenter: whose backend; a graph of products alone is compiled for the same one.
        threads: CPU threads.
        types: of products: "fp32", "fp16", "int8".

    Raises:
        UserError: the backend does not take the product.
    """
    on_gpu, backend = runs_on_gpu(segmenter), segmenter.choice.backend.name
    products: dict[str, float] = {}
    for name in types:
        products[name] = product_rate(backend, name, threads, on_gpu=on_gpu)
    return Rates(products, copy_rate() if on_gpu else host_copy_rate(threads))


def host_copy_rate(threads: int) -> float:
    """Bytes read and written a second while each thread copies memory of its own; the best of several."""
    buffers = [(np.ones(_HOST_COPY, np.uint8), np.zeros(_HOST_COPY, np.uint8)) for _ in range(threads)]
    best = math.inf
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(2 + _RUNS):
            begin = time.perf_counter()
            list(pool.map(lambda pair: np.copyto(pair[1], pair[0]), buffers))
            best = min(best, time.perf_counter() - begin)
    return 2 * _HOST_COPY * threads / best


def product_rate(backend: str, type_name: Precision, threads: int, *, on_gpu: bool = False) -> float:
    """FLOP/s of one large matrix product, many times over, as a backend compiles it; the best of several runs.

    Args:
        backend: its name.
        type_name: "fp32", "fp16" or "int8".
        threads: CPU threads.
        on_gpu: measure products large enough for a GPU.

    Raises:
        UserError: the backend does not take it.
    """
    side, width, count = (2048, 4096, 12) if on_gpu else (512, 1024, 4)
    flop = count * 2 * 3 * side * side * width
    with temporary_folder() as folder:
        bundle = _product_bundle(folder / "product.bundle", type_name, side, width, count)
        graph = bundle.manifest.graphs[0]
        loaded = load_backend(bundle, graph, backend, threads).backend
        try:
            if isinstance(loaded, FrameBackend):
                frame, options = (
                    np.zeros((side, side, 3), np.uint8),
                    FrameOptions(bundle.manifest.input.normalization, 0.5),
                )

                def run() -> float:
                    return loaded.stage_seconds([frame], options)["engine"]
            else:
                image = np.random.default_rng(0).standard_normal(graph.input_shape, np.float32)

                def run() -> float:
                    begin = time.perf_counter()
                    loaded.run(image)
                    return time.perf_counter() - begin

            run()
            taken: list[float] = []
            while len(taken) < _RUNS or sum(taken) < _SECONDS:
                taken.append(run())
        finally:
            loaded.close()
    return flop / min(taken)


def _product_bundle(path: Path, type_name: Precision, side: int, width: int, count: int) -> Bundle:
    """A bundle whose graph multiplies its input by one matrix again and again."""
    with write_bundle(path) as draft:
        name = graph_file_name("product", type_name, 1)
        _save_product(draft.new_file(name), type_name, side, width, count)
        entry = draft.graph(name, modality="product", precision=type_name, image_size=side, batch=1)
        draft.manifest = Manifest(
            preset="product", weights=Weights(checkpoint_sha256="0" * 64, origin="random"), graphs=[entry]
        )
    return Bundle.open(path)


def _save_product(file: Path, type_name: Precision, side: int, width: int, count: int) -> None:
    from onnx import TensorProto, helper, numpy_helper

    matrix = np.random.default_rng(0).standard_normal((width, width)) / math.sqrt(width)  # values keep their size
    low = np.float16 if type_name == "fp16" else np.float32
    rows, kept = 3 * side * side // width, side * side // 16
    nodes: list[NodeProto] = [helper.make_node("Reshape", ["image", "rows"], ["x"])]
    constants: list[TensorProto] = [
        numpy_helper.from_array(np.array([rows, width], np.int64), "rows"),
        numpy_helper.from_array(np.array([1, 1, side // 4, side // 4], np.int64), "square"),
        *(numpy_helper.from_array(np.array([value], np.int64), name) for name, value in (("begin", 0), ("end", kept))),
        numpy_helper.from_array(np.array([-1], np.int64), "flat"),
    ]
    last = "x"
    if type_name == "int8":
        scale = float(np.abs(matrix).max()) / 127
        constants += [
            numpy_helper.from_array(np.rint(matrix / scale).astype(np.int8), "stored"),
            numpy_helper.from_array(np.float32(scale).reshape(()), "matrix_scale"),
            numpy_helper.from_array(np.float32(4 / 127).reshape(()), "scale"),
            numpy_helper.from_array(np.int8(0).reshape(()), "zero"),
        ]
        nodes.append(helper.make_node("DequantizeLinear", ["stored", "matrix_scale", "zero"], ["matrix"]))
    else:
        constants.append(numpy_helper.from_array(matrix.astype(low), "matrix"))
        if type_name == "fp16":
            nodes.append(helper.make_node("Cast", [last], ["low"], to=TensorProto.FLOAT16))
            last = "low"
    for number in range(count):
        if type_name == "int8":
            nodes.append(helper.make_node("QuantizeLinear", [last, "scale", "zero"], [f"q{number}"]))
            nodes.append(helper.make_node("DequantizeLinear", [f"q{number}", "scale", "zero"], [f"d{number}"]))
            last = f"d{number}"
        nodes.append(helper.make_node("MatMul", [last, "matrix"], [f"y{number}"], name=f"product{number}"))
        last = f"y{number}"
    if type_name == "fp16":
        nodes.append(helper.make_node("Cast", [last], ["high"], to=TensorProto.FLOAT))
        last = "high"
    nodes += [
        helper.make_node("Reshape", [last, "flat"], ["all"]),
        helper.make_node("Slice", ["all", "begin", "end"], ["part"]),
        helper.make_node("Reshape", ["part", "square"], ["logits"]),
    ]
    graph = helper.make_graph(
        nodes,
        "product",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, [1, 3, side, side])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [1, 1, side // 4, side // 4])],
        constants,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    file.write_bytes(model.SerializeToString())


def copy_rate() -> float:
    """Bytes read and written a second; the best of several copies, of less memory where little is free.

    Raises:
        UserError: no usable GPU, or its memory is full.
    """
    with ExitStack() as opened:
        device = opened.enter_context(CudaDevice.open())
        size = min(_DEVICE_COPY, max(1 << 20, device.memory().free // 4))
        stream = opened.enter_context(Stream(device))
        source, target = (opened.enter_context(DeviceBuffer(device, size)) for _ in range(2))
        begin, end = (opened.enter_context(Event(device, timing=True)) for _ in range(2))
        taken = []
        stream.fill(source.address, 1, size)
        for _ in range(1 + _DEVICE_COPIES):
            begin.record(stream)
            stream.copy_on_device(target.address, source.address, size)
            end.record(stream)
            end.synchronize()
            taken.append(end.seconds_since(begin))
    return 2 * size / min(taken[1:])
