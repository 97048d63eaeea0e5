"""Runs an engine on this GPU by itself, to see what it computes and how long it takes; bench does more.

``build`` says with it whether an engine can be trusted, and whether INT8 earns its place.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import byref, c_float, c_size_t, c_uint, c_uint64, c_void_p, create_string_buffer
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from espmedsam_edge.errors import UserError
from espmedsam_edge.runtime.cuda.gpu import GpuDevice, checked, with_context
from espmedsam_edge.runtime.engines.precision import shape_of

if TYPE_CHECKING:
    import tensorrt as trt

_WARM_UP_S = 0.5  # clocks rise within it
_MEASURE_S = 1.0
_MINIMUM_RUNS = 20
_NON_BLOCKING = 1
_BYTES_OF_FLOAT32 = 4  # inputs and outputs of every graph, whatever is inside
_PATTERN = 0x3C  # four of them are the float 0.0115: data without zeros, which some kernels would skip
_NOT_A_NUMBER = 0xFF  # four of them are a NaN: an output that is not written does not look like one


@dataclass(frozen=True)
class _Trial:
    """An engine with a stream and, for each input and output, its address on the GPU and its bytes."""

    gpu: GpuDevice
    cuda: Any
    context: trt.IExecutionContext
    stream: c_void_p
    buffers: dict[str, tuple[c_uint64, int]]

    def fill(self, name: str, value: int) -> None:
        """Enqueue setting every byte of a tensor."""
        buffer, size = self.buffers[name]
        checked(self.gpu, self.cuda.cuMemsetD8Async(buffer, value, c_size_t(size), self.stream))

    def enqueue(self) -> None:
        """Enqueue one run."""
        if not self.context.execute_async_v3(cast(Any, self.stream.value or 0)):
            raise UserError(f"{self.gpu.name} did not run the engine.", "Check its driver.", exit_code=1)

    def wait(self) -> None:
        """Wait for all that was enqueued."""
        checked(self.gpu, self.cuda.cuStreamSynchronize(self.stream))


@contextmanager
def _prepared(gpu: GpuDevice, engine: trt.ICudaEngine) -> Iterator[_Trial]:
    cuda = with_context(gpu)
    context = cast("trt.IExecutionContext | None", engine.create_execution_context())
    if context is None:
        raise UserError(f"{gpu.name} has no memory to run the engine.", "Stop other programs on it.", exit_code=1)
    trial = _Trial(gpu, cuda, context, c_void_p(), {})
    try:
        for index in range(engine.num_io_tensors):
            name = engine.get_tensor_name(index)
            size = math.prod(shape_of(engine.get_tensor_shape(name))) * _BYTES_OF_FLOAT32
            buffer = c_uint64()
            checked(gpu, cuda.cuMemAlloc_v2(byref(buffer), c_size_t(size)))
            trial.buffers[name] = buffer, size
            context.set_tensor_address(name, buffer.value or 0)
        checked(gpu, cuda.cuStreamCreate(byref(trial.stream), c_uint(_NON_BLOCKING)))
        yield trial
    finally:
        for buffer, _ in trial.buffers.values():
            cuda.cuMemFree_v2(buffer)


def outputs(gpu: GpuDevice, engine: trt.ICudaEngine, inputs: dict[str, bytes]) -> dict[str, bytes]:
    """What one run of an engine makes of its inputs: the bytes of each tensor that is not among them.

    Raises:
        UserError: the GPU has no memory for it, or the engine does not run.
    """
    with _prepared(gpu, engine) as trial:
        found = {}
        for name, (buffer, size) in trial.buffers.items():
            if name in inputs:
                checked(gpu, trial.cuda.cuMemcpyHtoDAsync_v2(buffer, inputs[name], c_size_t(size), trial.stream))
            else:
                trial.fill(name, _NOT_A_NUMBER)
                found[name] = create_string_buffer(size)
        trial.wait()
        trial.enqueue()
        trial.wait()
        for name, host in found.items():
            buffer, size = trial.buffers[name]
            checked(gpu, trial.cuda.cuMemcpyDtoHAsync_v2(host, buffer, c_size_t(size), trial.stream))
        trial.wait()
        return {name: host.raw for name, host in found.items()}


def median_milliseconds(gpu: GpuDevice, engine: trt.ICudaEngine) -> float:
    """Median GPU time of one run of an engine, in milliseconds, by CUDA events; transfers are not in it.

    Raises:
        UserError: the GPU has no memory for it, or the engine does not run.
    """
    with _prepared(gpu, engine) as trial:
        cuda, start, end = trial.cuda, c_void_p(), c_void_p()
        for name in trial.buffers:
            trial.fill(name, _PATTERN)
        checked(gpu, cuda.cuEventCreate(byref(start), c_uint(0)))
        checked(gpu, cuda.cuEventCreate(byref(end), c_uint(0)))

        def once() -> float:
            checked(gpu, cuda.cuEventRecord(start, trial.stream))
            trial.enqueue()
            checked(gpu, cuda.cuEventRecord(end, trial.stream))
            checked(gpu, cuda.cuEventSynchronize(end))
            elapsed = c_float()
            checked(gpu, cuda.cuEventElapsedTime(byref(elapsed), start, end))
            return elapsed.value

        began = time.monotonic()
        once()
        while time.monotonic() - began < _WARM_UP_S:
            once()
        times: list[float] = []
        began = time.monotonic()
        while len(times) < _MINIMUM_RUNS or time.monotonic() - began < _MEASURE_S:
            times.append(once())
        return statistics.median(times)
