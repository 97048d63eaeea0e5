"""A TensorRT engine on the GPU, ready to run: loaded, with fixed buffers, warmed up."""

from __future__ import annotations

import hashlib
import logging
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from espmedsam_edge.bundle import Graph
from espmedsam_edge.errors import UserError
from espmedsam_edge.files import atomic_write
from espmedsam_edge.machine.cache import PRIVATE_FILE, read_kept
from espmedsam_edge.runtime.cuda.driver import CudaError, megabytes
from espmedsam_edge.runtime.cuda.memory import DeviceBuffer
from espmedsam_edge.runtime.cuda.stream import Stream
from espmedsam_edge.runtime.engines.precision import shape_of, type_name
from espmedsam_edge.runtime.engines.remedies import remedy, tells_of_full_memory
from espmedsam_edge.runtime.engines.tensorrt_api import Log, TensorRT, make_logger

if TYPE_CHECKING:
    import tensorrt as trt

log = logging.getLogger(__name__)

_INPUT, _OUTPUT = "image", "logits"
_FP32_BYTES = 4
_DIGEST_BYTES = 32


class TensorRtEngine:
    """One plan with an execution context, and the memory for its input and output.

    A ``DeviceEngine`` (runtime/backends/device_engine.py), which says what its members are.
    """

    def __init__(self, api: TensorRT, content: bytes, plan: Path, graph: Graph, stream: Stream) -> None:
        """Load and warm up; the device's context must be current.

        Args:
            api: what built the plan.
            content: the plan, verified; not kept.
            plan: its file, whose name messages use; kernels compiled for it are kept beside it.
            graph: the bundle's entry that it was built from.
            stream: not the default one; it warms up there.

        Raises:
            UserError: TensorRT does not load or run it, or the GPU's memory is full.
        """
        self._api, self._plan, self._graph, self._stream = api, plan, graph, stream
        self._plan_bytes = len(content)
        self._log = Log()
        logger = make_logger(api, self._log)
        runtime = cast("trt.Runtime | None", api.module.Runtime(logger))
        if runtime is None:
            raise self._refused("cannot start")
        engine = cast("trt.ICudaEngine | None", runtime.deserialize_cuda_engine(content))
        if engine is None:
            raise self._refused(f"cannot load {plan.name}")
        self._check_signature(engine)
        self.activation_bytes = _activation_bytes(engine)
        self._runtime_cache = RuntimeCache.of(engine, plan)
        context = self._runtime_cache.context(engine) if self._runtime_cache else engine.create_execution_context()
        if context is None:
            raise self._refused(f"cannot prepare {plan.name}, which needs {megabytes(self.activation_bytes)} to run,")
        # Each must outlive the next, and Python frees attributes in no order of ours: see close.
        self._held: list[Any] = [logger, runtime, engine, self._runtime_cache, context]
        self._context = cast("trt.IExecutionContext", context)
        device = stream.device
        self._image = DeviceBuffer(device, _FP32_BYTES * math.prod(graph.input_shape))
        self._logits = DeviceBuffer(device, _FP32_BYTES * math.prod(graph.output_shape))
        self.logits_shape = graph.output_shape
        self.image, self.logits = self._image.address, self._logits.address
        for name, address in ((_INPUT, self.image), (_OUTPUT, self.logits)):
            if not self._context.set_tensor_address(name, address):
                raise self._refused(f"does not take a buffer for '{name}' of {plan.name}")
        self._warm_up()

    @property
    def plan_bytes(self) -> int:
        """Size of the plan, which is nearly that of its weights on the GPU."""
        return self._plan_bytes

    @property
    def title(self) -> str:
        """TensorRT's name and version."""
        return self._api.title

    def enqueue(self, stream: Stream) -> None:
        """See ``DeviceEngine.enqueue``.

        Raises:
            CudaError: the GPU is lost.
            UserError: TensorRT refused it; carries its reason.
        """
        if self._context.execute_async_v3(cast(Any, int(stream))):
            return
        try:
            stream.check()
        except CudaError as error:
            if error.lost:
                raise
        raise self._refused(f"did not run {self._plan.name}")

    def close(self) -> None:
        """Free what TensorRT holds; the device frees the buffers. A second call does nothing."""
        self._runtime_cache = None
        vars(self).pop("_context", None)
        while self._held:
            self._held.pop()

    def _warm_up(self) -> None:
        """Run once, which loads and for TensorRT-RTX compiles its kernels."""
        self._stream.fill(self.image, 0, self._image.size)
        self.enqueue(self._stream)
        self._stream.synchronize()
        if self._runtime_cache is not None:
            self._runtime_cache.save()
        asked = getattr(self._context, "is_stream_capturable", None)  # TensorRT-RTX's
        self.capturable = asked is None or bool(asked(int(self._stream)))

    def _check_signature(self, engine: trt.ICudaEngine) -> None:
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        found = {
            name: (type_name(engine.get_tensor_dtype(name)), shape_of(engine.get_tensor_shape(name))) for name in names
        }
        expected = {_INPUT: ("fp32", self._graph.input_shape), _OUTPUT: ("fp32", self._graph.output_shape)}
        if found != expected:
            shown = ", ".join(f"'{name}' {kind} {'x'.join(map(str, shape))}" for name, (kind, shape) in found.items())
            raise UserError(
                f"{self._plan} has {shown or 'no inputs'}, which does not fit its graph.",
                "Build it again: espmedsam-edge build --force",
                exit_code=1,
            )

    def _refused(self, what: str) -> UserError:
        errors = self._log.errors()
        reason = " ".join(errors[0].split())[:300].rstrip(".") if errors else "it gave no reason"
        said = " ".join(errors)
        hint = remedy(said, "Build the engine again (espmedsam-edge build --force), or use --backend onnxruntime.")
        if tells_of_full_memory(said):
            memory, gpu = self._stream.device.memory(), self._stream.device.gpu
            hint = (
                f"{megabytes(memory.free)} of {megabytes(memory.total)} are free on {gpu.name}: stop other programs "
                "(nvidia-smi, or tegrastats on a Jetson, shows them), or use fewer modalities at a time, fp16 or a "
                "smaller --image-size."
            )
        return UserError(f"{self._api.title} {what}: {reason}.", hint, exit_code=1)


class RuntimeCache:
    """The kernels that TensorRT-RTX compiles for this GPU when an engine first runs, kept beside the plan.

    The file is their SHA-256 and then what TensorRT-RTX made of them: it takes bytes on trust.
    """

    def __init__(self, config: Any, cache: Any, file: Path) -> None:
        self._config, self._cache, self._file = config, cache, file
        self._kept = b""
        try:
            content = read_kept(file, file.parent.parent)
        except OSError:
            return
        digest, kept = content[:_DIGEST_BYTES], content[_DIGEST_BYTES:]
        if hashlib.sha256(kept).digest() != digest:
            log.warning("%s is damaged and not used: TensorRT-RTX compiles its kernels for this GPU again.", file.name)
        elif cache.deserialize(kept):  # False: of another GPU, driver or version
            self._kept = kept

    @classmethod
    def of(cls, engine: Any, plan: Path) -> RuntimeCache | None:
        """The engine's cache, or None where this TensorRT has none."""
        if not hasattr(engine, "create_runtime_config"):
            return None
        config = engine.create_runtime_config()
        if not hasattr(config, "create_runtime_cache"):
            return None
        cache = config.create_runtime_cache()
        return None if cache is None else cls(config, cache, plan.with_suffix(".runtime"))

    def context(self, engine: Any) -> Any:
        """An execution context that uses the cache; None where TensorRT gives none."""
        self._config.set_runtime_cache(self._cache)
        return engine.create_execution_context(self._config)

    def save(self) -> None:
        """Keep what was compiled since; a folder that cannot be written costs the compilation next time."""
        content = bytes(self._cache.serialize() or b"")
        if content and content != self._kept:
            try:
                atomic_write(self._file, hashlib.sha256(content).digest() + content, PRIVATE_FILE)
            except UserError:
                return
            self._kept = content


def _activation_bytes(engine: trt.ICudaEngine) -> int:
    for name in ("device_memory_size_v2", "device_memory_size"):  # each is missing in some release
        size = getattr(engine, name, None)
        if size is not None:
            return int(size)
    return 0
