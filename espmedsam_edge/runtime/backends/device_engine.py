"""A network on a GPU as the frame's path takes it, whatever runs it; and such an engine captured on a stream."""

from __future__ import annotations

import logging
from typing import Protocol

import numpy as np

from espmedsam_edge.errors import UserError
from espmedsam_edge.imaging.geometry import Tensor
from espmedsam_edge.runtime.cuda.driver import CudaError
from espmedsam_edge.runtime.cuda.memory import PinnedBuffer
from espmedsam_edge.runtime.cuda.stream import CudaGraph, Stream

log = logging.getLogger(__name__)


class DeviceEngine(Protocol):
    """A network with fixed input and output in a GPU's memory, float32 and C-contiguous, that has run once.

    Run it only when the run before is done: there is one input and one output.
    """

    @property
    def title(self) -> str:
        """What runs it, for people: ``TensorRT 10.16.1``."""

    @property
    def image(self) -> int:
        """Address of the input, (B, 3, S, S), on the GPU."""

    @property
    def logits(self) -> int:
        """Address of the output on the GPU."""

    @property
    def logits_shape(self) -> tuple[int, ...]:
        """(B, 1, S/4, S/4)."""

    @property
    def activation_bytes(self) -> int:
        """What it needs of the GPU's memory to run, beside weights; 0: unknown."""

    @property
    def capturable(self) -> bool:
        """Whether ``enqueue`` may be captured into a CUDA graph, as far as the engine knows; one may have its own."""

    def enqueue(self, stream: Stream) -> None:
        """Enqueue one run; returns at once, and within a capture neither allocates nor waits.

        Raises:
            CudaError: the GPU is lost.
            UserError: it was refused.
        """

    def close(self) -> None:
        """Free what it holds, when nothing runs; a second call does nothing."""


class CapturedEngine:
    """An engine on a stream, captured into a CUDA graph where it can be.

    Attributes:
        engine: what runs.
        stream: where all of it is enqueued.
        image, logits: its addresses on the GPU.
        capturable: whether ``enqueue`` can be part of a capture.
    """

    def __init__(self, engine: DeviceEngine, stream: Stream) -> None:
        """Capture; the device's context must be current.

        Raises:
            CudaError: the GPU is lost.
        """
        self.engine, self.stream = engine, stream
        self.image, self.logits = engine.image, engine.logits
        self.capturable = engine.capturable
        self._graph: CudaGraph | None = None
        self._host: tuple[PinnedBuffer, PinnedBuffer] | None = None  # image and logits, for ``run``
        if not engine.capturable:
            log.debug("%s's engine is not captured into a CUDA graph.", engine.title)
            return
        try:
            self._graph = CudaGraph.capture(stream, self.enqueue)
        except UserError as error:
            if isinstance(error, CudaError) and error.lost:
                raise
            self.capturable = False
            log.warning(
                "%s's engine cannot be captured into a CUDA graph (%s): it runs without one.",
                engine.title,
                error.message,
            )

    def enqueue(self) -> None:
        """Enqueue one run on the stream; see ``DeviceEngine.enqueue``."""
        self.engine.enqueue(self.stream)

    def launch(self) -> None:
        """Enqueue one run with a single call, where it could be captured.

        Raises:
            UserError: the engine or the driver refused it.
        """
        if self._graph is not None:
            self._graph.launch(self.stream)
        else:
            self.enqueue()

    def run(self, image: Tensor) -> Tensor:
        """Host to host, for one batch as ``Backend.run`` takes it; waits.

        Raises:
            UserError: the GPU failed.
        """
        engine, stream = self.engine, self.stream
        if self._host is None:
            logits_bytes = image.itemsize * int(np.prod(engine.logits_shape))
            self._host = PinnedBuffer(stream.device, image.nbytes), PinnedBuffer(stream.device, logits_bytes)
        source, target = self._host
        np.copyto(source.array(image.shape, np.float32), image)
        stream.copy_to_device(self.image, source.address, source.size)
        self.launch()
        stream.copy_to_host(target.address, self.logits, target.size)
        stream.synchronize()
        logits: Tensor = target.array(engine.logits_shape, np.float32).copy()
        return logits

    def close(self) -> None:
        """Free the graph and the engine; the device frees the buffers. A second call does nothing."""
        if self._graph is not None:
            self._graph.close()
            self._graph = None
        self.engine.close()
