"""Runs an engine on this GPU by itself, to see what it computes and how long it takes; bench does more.

``build`` says with it whether an engine can be trusted, and whether INT8 earns its place.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from espmedsam_edge.errors import UserError
from espmedsam_edge.runtime.cuda.device import CudaDevice
from espmedsam_edge.runtime.cuda.memory import DeviceBuffer, PinnedBuffer
from espmedsam_edge.runtime.cuda.stream import Event, Stream
from espmedsam_edge.runtime.engines.precision import shape_of

if TYPE_CHECKING:
    import tensorrt as trt

_WARM_UP_S = 0.5  # clocks rise within it
_MEASURE_S = 1.0
_MINIMUM_RUNS = 20
_BYTES_OF_FLOAT32 = 4  # inputs and outputs of every graph, whatever is inside
_PATTERN = 0x3C  # four of them are the float 0.0115: data without zeros, which some kernels would skip
_NOT_A_NUMBER = 0xFF  # four of them are a NaN: an output that is not written does not look like one


@dataclass(frozen=True)
class _Trial:
    """An engine's execution context with a stream and, for each input and output, its memory on the GPU."""

    context: trt.IExecutionContext
    stream: Stream
    buffers: dict[str, DeviceBuffer]

    def fill(self, name: str, value: int) -> None:
        """Enqueue setting every byte of a tensor."""
        self.stream.fill(self.buffers[name].address, value, self.buffers[name].size)

    def enqueue(self) -> None:
        """Enqueue one run."""
        if not self.context.execute_async_v3(cast(Any, int(self.stream))):
            gpu = self.stream.device.gpu
            raise UserError(f"{gpu.name} did not run the engine.", "Check its driver.", exit_code=1)


@contextmanager
def _prepared(device: CudaDevice, engine: trt.ICudaEngine) -> Iterator[_Trial]:
    context = cast("trt.IExecutionContext | None", engine.create_execution_context())
    if context is None:
        raise UserError(
            f"{device.gpu.name} has no memory to run the engine.", "Stop other programs on it.", exit_code=1
        )
    with ExitStack() as opened:
        trial = _Trial(context, opened.enter_context(Stream(device)), {})
        for index in range(engine.num_io_tensors):
            name = engine.get_tensor_name(index)
            size = math.prod(shape_of(engine.get_tensor_shape(name))) * _BYTES_OF_FLOAT32
            trial.buffers[name] = opened.enter_context(DeviceBuffer(device, size))
            context.set_tensor_address(name, trial.buffers[name].address)
        yield trial


def outputs(device: CudaDevice, engine: trt.ICudaEngine, inputs: dict[str, bytes]) -> dict[str, bytes]:
    """What one run of an engine makes of its inputs: the bytes of each tensor that is not among them.

    Raises:
        UserError: the GPU has no memory for it, or the engine does not run.
    """
    with _prepared(device, engine) as trial, ExitStack() as opened:
        host = {name: opened.enter_context(PinnedBuffer(device, buffer.size)) for name, buffer in trial.buffers.items()}
        for name, buffer in trial.buffers.items():
            if name in inputs:
                host[name].write(inputs[name])
                trial.stream.copy_to_device(buffer.address, host[name].address, buffer.size)
            else:
                trial.fill(name, _NOT_A_NUMBER)
        trial.enqueue()
        for name, buffer in trial.buffers.items():
            trial.stream.copy_to_host(host[name].address, buffer.address, buffer.size)
        trial.stream.synchronize()
        return {name: host[name].read() for name in trial.buffers if name not in inputs}


def median_milliseconds(device: CudaDevice, engine: trt.ICudaEngine) -> float:
    """Median GPU time of one run of an engine, in milliseconds, by CUDA events; transfers are not in it.

    Raises:
        UserError: the GPU has no memory for it, or the engine does not run.
    """
    with (
        _prepared(device, engine) as trial,
        Event(device, timing=True) as start,
        Event(device, timing=True) as end,
    ):
        for name in trial.buffers:
            trial.fill(name, _PATTERN)

        def once() -> float:
            start.record(trial.stream)
            trial.enqueue()
            end.record(trial.stream)
            end.synchronize()
            return 1000 * end.seconds_since(start)

        began = time.monotonic()
        once()
        while time.monotonic() - began < _WARM_UP_S:
            once()
        times: list[float] = []
        began = time.monotonic()
        while len(times) < _MINIMUM_RUNS or time.monotonic() - began < _MEASURE_S:
            times.append(once())
        return statistics.median(times)
