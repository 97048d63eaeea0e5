"""The child process that parses and builds: TensorRT may crash or be killed in it, and only this process ends.

``main`` reads one ``EngineRequest`` as JSON from standard input and answers as ``child_side`` says.
"""

from __future__ import annotations

import hashlib
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from espmedsam_edge.errors import UserError
from espmedsam_edge.files import ChangedError, atomic_write, read_checked, write_errors
from espmedsam_edge.machine.cache import read_kept
from espmedsam_edge.machine.environment import process_memory
from espmedsam_edge.onnx_file import read_header
from espmedsam_edge.runtime.cuda.gpu import GpuDevice, find_gpu, free_bytes
from espmedsam_edge.runtime.engines.agreement import agree
from espmedsam_edge.runtime.engines.child_side import Report, answer
from espmedsam_edge.runtime.engines.precision import (
    Arithmetic,
    check_arithmetic,
    check_engine,
    read_arithmetic,
    read_engine,
)
from espmedsam_edge.runtime.engines.progress import EngineProgress, make_monitor
from espmedsam_edge.runtime.engines.remedies import remedy, tells_of_full_memory
from espmedsam_edge.runtime.engines.request import Dla, EngineRequest, EngineResult
from espmedsam_edge.runtime.engines.tensorrt_api import (
    Log,
    ParsedGraph,
    TensorRT,
    load,
    make_logger,
    parse_graph,
    refusal_error,
    set_targets,
)

if TYPE_CHECKING:
    import tensorrt as trt

    from espmedsam_edge.runtime.cuda.device import CudaDevice

MIB = 1 << 20
# A context, the parsed weights and the smallest useful kernels; below it TensorRT fails with words nobody understands.
MINIMUM_FREE = 512 * MIB
# Kept out of the workspace: weights, activations of the plan being timed, and on a board the system itself.
RESERVE = 512 * MIB
MINIMUM_WORKSPACE = 128 * MIB
# Without a GPU nobody says how much there is; the plan's scratch memory must fit the smallest cards.
WORKSPACE_WITHOUT_GPU = 2048 * MIB


def workspace_limit(gpu: GpuDevice | None, graph_bytes: int) -> int:
    """How much scratch memory TensorRT may use, in bytes: half of what is free beside the weights and a reserve.

    Raises:
        UserError: too little is free to build at all.
    """
    if gpu is None:
        return WORKSPACE_WITHOUT_GPU
    free = free_bytes(gpu)
    if free < MINIMUM_FREE + 2 * graph_bytes:
        raise UserError(
            f"{gpu.name} has {free // MIB} MiB free; building {graph_bytes // MIB} MiB of weights needs "
            f"{(MINIMUM_FREE + 2 * graph_bytes) // MIB} MiB.",
            "Stop other programs on the device (on a Jetson the desktop, too) and build again.",
            exit_code=1,
        )
    return max(MINIMUM_WORKSPACE, (free - RESERVE - 2 * graph_bytes) // 2)


def read_wanted(path: Path, sha256: str) -> bytes:
    """A graph's or plan's content, checked by this process: it is another one than that which asks, and later.

    Raises:
        UserError: it has another hash, or cannot be read.
    """
    try:
        return read_checked(path, sha256)
    except ChangedError as error:
        raise UserError(f"{path} was changed meanwhile (SHA-256 differs).", "Try again.", exit_code=1) from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}.", "Try again.", exit_code=1) from error


def configure(
    parsed: ParsedGraph, request: EngineRequest, gpu: GpuDevice | None, graph_bytes: int
) -> tuple[trt.IBuilderConfig, int]:
    """The builder's configuration and its workspace limit in bytes, for a graph of so many bytes.

    Types come from the graph alone: no precision flag is ever set. TF32 is off unless asked for, so that what the
    graph keeps in FP32 is computed in FP32.
    """
    api, config = parsed.api, parsed.builder.create_builder_config()
    set_targets(api, config, request.targets)
    limit = workspace_limit(gpu, graph_bytes)
    config.set_memory_pool_limit(api.module.MemoryPoolType.WORKSPACE, limit)
    tf32 = getattr(api.module.BuilderFlag, "TF32", None)
    if tf32 is not None:
        (config.set_flag if request.tf32 else config.clear_flag)(tf32)
    if hasattr(api.module, "ProfilingVerbosity"):  # so that the inspector names the types of the layers
        config.profiling_verbosity = api.module.ProfilingVerbosity.DETAILED
    return config, limit


def attach_timing_cache(parsed: ParsedGraph, config: trt.IBuilderConfig, request: EngineRequest) -> bool:
    """Give the builder the kernel timings of earlier builds on this GPU. TensorRT-RTX times nothing and takes none."""
    if request.timing_cache is None or parsed.api.flavour != "tensorrt":
        return False
    try:
        earlier = read_kept(request.timing_cache, request.timing_cache.parent.parent)
    except OSError:
        earlier = b""
    cache = config.create_timing_cache(earlier)
    if cache is None or not config.set_timing_cache(cache, False):
        cache = config.create_timing_cache(b"")  # of another GPU or version, or damaged: begin anew
        return cache is not None and bool(config.set_timing_cache(cache, False))
    return True


def save_timing_cache(config: trt.IBuilderConfig, file: Path) -> None:
    """Keep the kernel timings for the next build; the build does not fail when they cannot be kept."""
    cache = config.get_timing_cache()
    if cache is not None:
        try:
            atomic_write(file, bytes(cast(Any, cache.serialize())))
        except (OSError, UserError):
            return


def survey_dla(parsed: ParsedGraph) -> Dla | None:
    """Which layers a deep learning accelerator could take, on a board that has one. Places nothing there."""
    cores = int(getattr(parsed.builder, "num_DLA_cores", 0) or 0)
    if cores == 0:
        return None
    config = parsed.builder.create_builder_config()
    if not hasattr(config, "can_run_on_DLA") or not hasattr(parsed.api.module, "DeviceType"):
        return None
    config.default_device_type = parsed.api.module.DeviceType.DLA
    config.DLA_core = 0
    layers = [parsed.network.get_layer(index) for index in range(parsed.network.num_layers)]
    return Dla(cores=cores, layers=sum(bool(config.can_run_on_DLA(layer)) for layer in layers), of=len(layers))


def check(request: EngineRequest) -> EngineResult:
    """Parse only: the refused nodes, and what the network would compute in."""
    api = load(request.flavour)
    content = read_wanted(request.graph_path, request.graph.sha256)
    parsed = parse_graph(api, content, request.graph_path)
    header = read_header(content)
    return EngineResult(
        version=api.version,
        opset=header.opset if header else None,
        refusals=parsed.refusals,
        arithmetic=None if parsed.refusals else read_arithmetic(api, parsed.network),
        dla=None if parsed.refusals else survey_dla(parsed),
        warnings=parsed.log.of("WARNING"),
    )


def build(request: EngineRequest, report: Report) -> EngineResult:
    """Build the plan, write it to ``request.plan_path``, and read back what it computes in.

    Raises:
        UserError: refused by the parser, not what the manifest says, no memory, or the builder failed.
    """
    assert request.plan_path is not None
    began = time.monotonic()
    api = load(request.flavour)
    gpu = find_gpu()
    content = read_wanted(request.graph_path, request.graph.sha256)
    parsed = parse_graph(api, content, request.graph_path)
    try:
        if parsed.refusals:
            raise refusal_error(request.graph_path, api, parsed.refusals)
        arithmetic = read_arithmetic(api, parsed.network)
        check_arithmetic(arithmetic, request.graph, request.macs)
        config, limit = configure(parsed, request, gpu, len(content))
        timed = attach_timing_cache(parsed, config, request)
        progress = EngineProgress(report)
        monitor = make_monitor(api, progress)
        if monitor is not None and hasattr(config, "progress_monitor"):
            config.progress_monitor = monitor
        plan = cast("trt.IHostMemory | None", parsed.builder.build_serialized_network(parsed.network, config))
        if plan is None:
            raise failed_build(parsed, request, gpu)
        built = memoryview(cast(Any, plan))
        with write_errors(request.plan_path):
            request.plan_path.write_bytes(built)
        if timed and request.timing_cache is not None:
            save_timing_cache(config, request.timing_cache)
        loaded, layers = (False, {}) if gpu is None else inspect(parsed, request, gpu, arithmetic, plan)
    finally:
        if request.log_path is not None:
            with suppress(OSError):  # of a disk that is full, say: it is no reason to fail, nor to hide one
                request.log_path.write_text(parsed.log.text() + "\n", encoding="utf-8")
    return EngineResult(
        version=api.version,
        arithmetic=arithmetic,
        plan_sha256=hashlib.sha256(built).hexdigest(),
        plan_bytes=built.nbytes,
        engine_loaded=loaded,
        engine_layers=layers,
        dla=survey_dla(parsed),
        workspace_bytes=limit,
        build_seconds=round(time.monotonic() - began, 3),
        peak_memory_bytes=process_memory()[1],
        warnings=parsed.log.of("WARNING"),
    )


def inspect(
    parsed: ParsedGraph, request: EngineRequest, gpu: GpuDevice, arithmetic: Arithmetic, plan: trt.IHostMemory
) -> tuple[bool, dict[str, int]]:
    """Load the new plan on this GPU and compare it with its network: (loaded, layers by output type).

    A plan for other GPU generations than this one's cannot be loaded here, and is not.
    """
    if request.targets and gpu.sm not in request.targets:
        return False, {}
    _, engine = load_engine(parsed.api, plan, parsed.log)
    inputs, outputs, layers = read_engine(parsed.api, engine)
    check_engine(request.graph, arithmetic, inputs, outputs, layers)
    return True, layers


def load_engine(api: TensorRT, plan: Any, log: Log) -> tuple[trt.Runtime, trt.ICudaEngine]:
    """A plan's engine on this GPU, with the runtime that must outlive it.

    Raises:
        UserError: TensorRT does not load it; carries its reason.
    """
    runtime = cast("trt.Runtime", api.module.Runtime(make_logger(api, log)))
    engine = cast("trt.ICudaEngine | None", runtime.deserialize_cuda_engine(plan))
    if engine is None:
        raise UserError(
            f"{api.title} built the engine but cannot load it: {_reason(log)}.",
            remedy(" ".join(log.errors()), "Check the GPU driver's version."),
            exit_code=1,
        )
    return runtime, engine


def time_engine(request: EngineRequest) -> EngineResult:
    """The median time of one run of the plan on this GPU.

    Raises:
        UserError: there is no GPU or no cuda-python, or the GPU does not load or run the plan.
    """
    from espmedsam_edge.runtime.engines.trial import median_milliseconds  # not for a build: it brings NumPy

    with _loaded(request) as (api, device, engine):
        return EngineResult(version=api.version, median_ms=round(median_milliseconds(device, engine), 4))


def compare_engine(request: EngineRequest) -> EngineResult:
    """How the plan's masks agree with ONNX Runtime's of the same graph.

    Raises:
        UserError: there is no GPU or no cuda-python, the GPU does not load or run the plan, or ONNX Runtime does not
            run the graph.
    """
    from espmedsam_edge.runtime.engines.trial import outputs

    with _loaded(request) as (api, device, engine):
        agreement = agree(
            request.graph,
            read_wanted(request.graph_path, request.graph.sha256),
            lambda image: outputs(device, engine, {"image": image})["logits"],
            normalization=request.normalization,
            threshold=request.threshold,
        )
    return EngineResult(version=api.version, agreement=agreement)


@contextmanager
def _loaded(request: EngineRequest) -> Iterator[tuple[TensorRT, CudaDevice, trt.ICudaEngine]]:
    """The plan that an earlier child built, on this GPU."""
    from espmedsam_edge.runtime.cuda.device import CudaDevice

    assert request.plan_path is not None
    assert request.plan_sha256 is not None
    api = load(request.flavour)
    with CudaDevice.open() as device:
        runtime, engine = load_engine(api, read_wanted(request.plan_path, request.plan_sha256), Log())
        try:
            yield api, device, engine
        finally:
            del engine, runtime  # in this order, and before the GPU's context


def failed_build(parsed: ParsedGraph, request: EngineRequest, gpu: GpuDevice | None) -> UserError:
    """The one line for a builder that gave no plan, with TensorRT's own reason."""
    reason = _reason(parsed.log)
    hint = remedy(parsed.log.text(), "The graph or this TensorRT is at fault; the log has the details.")
    if tells_of_full_memory(parsed.log.text()):
        hint = "The device ran out of memory: stop other programs on it and build again."
    elif gpu is None and not request.targets:
        hint = "There is no GPU here: name the GPU generations with --target."
    elif "turing" in reason.lower():
        hint = "Turing (sm75) lacks what later generations have: leave sm75 out, or use another precision."
    return UserError(f"{parsed.api.title} could not build {request.graph_path.name}: {reason}.", hint, exit_code=1)


def _reason(log: Log) -> str:
    errors = log.errors()
    # The first error says what happened; those after it say that something happened.
    return " ".join(errors[0].split())[:300].rstrip(".") if errors else "it gave no reason"


def main() -> int:
    """Do what the request on standard input asks; 0 when an answer (a result or an error) was written."""
    warnings.filterwarnings("ignore", category=DeprecationWarning)  # TensorRT's own, about itself
    return answer(_work)


def _work(content: bytes, report: Report) -> EngineResult:
    request = EngineRequest.model_validate_json(content)
    if request.command == "check":
        return check(request)
    if request.command == "time":
        return time_engine(request)
    if request.command == "compare":
        return compare_engine(request)
    return build(request, report)
