"""Times an engine on this GPU by itself, so that ``build`` can say whether INT8 earns its place; bench does more."""

from __future__ import annotations

import math
import statistics
import time
from ctypes import byref, c_float, c_size_t, c_uint, c_uint64, c_void_p
from typing import TYPE_CHECKING, Any, cast

from espmedsam_edge.errors import UserError
from espmedsam_edge.runtime.cuda_driver import GpuDevice, checked, with_context
from espmedsam_edge.runtime.network_precision import shape_of

if TYPE_CHECKING:
    import tensorrt as trt

_WARM_UP_S = 0.5  # clocks rise within it
_MEASURE_S = 1.0
_MINIMUM_RUNS = 20
_NON_BLOCKING = 1
_BYTES_OF_FLOAT32 = 4  # inputs and outputs of every graph, whatever is inside
_PATTERN = 0x3C  # four of them are the float 0.0115: data without zeros, which some kernels would skip


def median_milliseconds(gpu: GpuDevice, engine: trt.ICudaEngine) -> float:
    """Median GPU time of one run of an engine, in milliseconds, by CUDA events; transfers are not in it.

    Raises:
        UserError: the GPU has no memory for it, or the engine does not run.
    """
    cuda = with_context(gpu)
    context = cast("trt.IExecutionContext | None", engine.create_execution_context())
    if context is None:
        raise UserError(f"{gpu.name} has no memory to run the engine.", "Stop other programs on it.", exit_code=1)
    buffers: list[c_uint64] = []
    stream, start, end = c_void_p(), c_void_p(), c_void_p()
    try:
        for index in range(engine.num_io_tensors):
            name = engine.get_tensor_name(index)
            size = math.prod(shape_of(engine.get_tensor_shape(name))) * _BYTES_OF_FLOAT32
            buffer = c_uint64()
            checked(gpu, cuda.cuMemAlloc_v2(byref(buffer), c_size_t(size)))
            buffers.append(buffer)
            checked(gpu, cuda.cuMemsetD8_v2(buffer, _PATTERN, c_size_t(size)))
            context.set_tensor_address(name, buffer.value or 0)
        checked(gpu, cuda.cuStreamCreate(byref(stream), c_uint(_NON_BLOCKING)))
        checked(gpu, cuda.cuEventCreate(byref(start), c_uint(0)))
        checked(gpu, cuda.cuEventCreate(byref(end), c_uint(0)))

        def once() -> float:
            checked(gpu, cuda.cuEventRecord(start, stream))
            if not context.execute_async_v3(cast(Any, stream.value or 0)):
                raise UserError(f"{gpu.name} did not run the engine.", "Check its driver.", exit_code=1)
            checked(gpu, cuda.cuEventRecord(end, stream))
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
    finally:
        for buffer in buffers:
            cuda.cuMemFree_v2(buffer)
