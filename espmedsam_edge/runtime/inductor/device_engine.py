"""A compiled network on a GPU as a ``DeviceEngine``: it runs on our stream, on our memory, inside our CUDA graphs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from espmedsam_edge.bundle import Graph
from espmedsam_edge.errors import UserError
from espmedsam_edge.runtime.cuda.driver import CudaError
from espmedsam_edge.runtime.cuda.memory import DeviceBuffer
from espmedsam_edge.runtime.cuda.stream import Stream
from espmedsam_edge.runtime.inductor.package import load_package

_FP32_BYTES = 4


class InductorEngine:
    """A compiled network with the memory for its input and output.

    A ``DeviceEngine`` (runtime/backends/device_engine.py), which says what its members are. What it needs to run comes
    from a pool of torch's memory that is its own: the addresses that a CUDA graph has captured are never given to
    anything else, and no run after the first asks the driver for memory.
    """

    activation_bytes = 0  # unknown before it ran; see ``_warm_up``
    capturable = True

    def __init__(self, content: bytes, graph: Graph, arithmetic: str, stream: Stream) -> None:
        """Load and run once; the device's context must be current.

        Args:
            content: the package, checked.
            graph: what it is of.
            arithmetic: what it computes in, for people.
            stream: not the default one; it warms up there.

        Raises:
            UserError: torch does not load or run it, or the GPU's memory is full.
        """
        self._graph, self._stream = graph, stream
        self.logits_shape = graph.output_shape
        self.title = f"torch {torch.__version__.partition('+')[0]}, {arithmetic} arithmetic"
        device = stream.device
        self._buffers = [
            DeviceBuffer(device, _FP32_BYTES * math.prod(shape)) for shape in (graph.input_shape, graph.output_shape)
        ]
        self.image, self.logits = (buffer.address for buffer in self._buffers)
        self._torch_device = self._torchs_device()
        self._input, self._output = (
            self._in_place(address, shape)
            for address, shape in ((self.image, graph.input_shape), (self.logits, graph.output_shape))
        )
        self._pool: Any = self._new_pool()
        self._package = load_package(content, graph, "cuda")
        self._warm_up()

    def enqueue(self, stream: Stream) -> None:
        """See ``DeviceEngine.enqueue``.

        Raises:
            CudaError: the GPU is lost.
            UserError: torch refused it.
        """
        try:
            with self._on(stream), torch.no_grad():
                self._output.copy_(self._package.run(self._input, int(stream)), non_blocking=True)
        except (UserError, RuntimeError) as error:
            try:
                stream.check()
            except CudaError as found:
                if found.lost:
                    raise
            if isinstance(error, UserError):
                raise
            raise UserError(f"torch did not run the network: {str(error).splitlines()[0]}", exit_code=1) from error

    def close(self) -> None:
        """Free what torch holds; the device frees the buffers. A second call does nothing."""
        self._package.close()
        for name in ("_input", "_output", "_pool"):
            vars(self).pop(name, None)

    def _on(self, stream: Stream) -> ExitStack:
        """torch's current device, memory pool and stream set to ours, in this thread.

        The pool first: on a stream that is captured torch would look for a CUDA graph of its own to lend the pool to.
        """
        external: Any = torch.cuda.ExternalStream
        with ExitStack() as opened:
            opened.enter_context(_without_tf32())
            opened.enter_context(torch.cuda.device(self._torch_device))
            opened.enter_context(torch.cuda.use_mem_pool(self._pool, device=self._torch_device))
            opened.enter_context(torch.cuda.stream(external(int(stream), self._torch_device)))
            return opened.pop_all()

    def _warm_up(self) -> None:
        """Run once, which loads the kernels and fills the pool."""
        before = self._stream.device.memory().free
        self._stream.fill(self.image, 0, self._buffers[0].size)
        self.enqueue(self._stream)
        self._stream.synchronize()
        self._package.warm()
        self.activation_bytes = max(0, before - self._stream.device.memory().free)

    def _torchs_device(self) -> Any:
        return torch.device("cuda", torch.cuda.current_device())  # the context that is current is its primary one

    def _in_place(self, address: int, shape: tuple[int, ...]) -> Any:
        tensor = torch.as_tensor(_Memory(address, shape), device=self._torch_device)
        if tensor.data_ptr() != address:
            raise UserError("torch does not take the GPU's memory in place.", "Update torch.", exit_code=1)
        return tensor

    def _new_pool(self) -> Any:
        return torch.cuda.MemPool()


@contextmanager
def _without_tf32() -> Iterator[None]:
    """What is FP32 is computed so, where cuDNN would take ten bits of mantissa; a program's own setting comes back."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


class _Memory:
    """float32 in the GPU's memory, as other libraries take it in place."""

    def __init__(self, address: int, shape: tuple[int, ...]) -> None:
        self.__cuda_array_interface__ = {
            "shape": shape, "typestr": "<f4", "data": (address, False), "strides": None, "version": 3, "stream": None,
        }  # fmt: skip
