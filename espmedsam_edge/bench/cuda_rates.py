"""The best rate at which the GPU copies within its own memory, measured through the driver alone."""

from __future__ import annotations

from contextlib import ExitStack

from espmedsam_edge.runtime.cuda.device import CudaDevice
from espmedsam_edge.runtime.cuda.memory import DeviceBuffer
from espmedsam_edge.runtime.cuda.stream import Event, Stream

_SIZE = 256 << 20  # bytes: more than any cache on a GPU
_RUNS = 10


def copy_rate() -> float:
    """Bytes read and written a second; the best of several copies, of less memory where little is free.

    Raises:
        UserError: no usable GPU, or its memory is full.
    """
    with ExitStack() as opened:
        device = opened.enter_context(CudaDevice.open())
        size = min(_SIZE, max(1 << 20, device.memory().free // 4))
        stream = opened.enter_context(Stream(device))
        source, target = (opened.enter_context(DeviceBuffer(device, size)) for _ in range(2))
        begin, end = (opened.enter_context(Event(device, timing=True)) for _ in range(2))
        taken = []
        stream.fill(source.address, 1, size)
        for _ in range(1 + _RUNS):
            begin.record(stream)
            stream.copy_on_device(target.address, source.address, size)
            end.record(stream)
            end.synchronize()
            taken.append(end.seconds_since(begin))
    return 2 * size / min(taken[1:])
