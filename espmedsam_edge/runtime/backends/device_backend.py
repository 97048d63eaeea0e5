"""The frames' path on a GPU as a backend, around any engine that runs there (``DeviceEngine``)."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import numpy as np

from espmedsam_edge.bundle import Graph
from espmedsam_edge.errors import UserError
from espmedsam_edge.imaging.geometry import Frame, Tensor
from espmedsam_edge.imaging.overlay import outline_width
from espmedsam_edge.runtime.backends.backend import AnyFrame, DeviceUse, FrameOptions, check_batch
from espmedsam_edge.runtime.backends.device_engine import CapturedEngine, DeviceEngine
from espmedsam_edge.runtime.backends.frame_graph import FrameGraph, FrameKey, FrameMachine
from espmedsam_edge.runtime.backends.frame_graph_pool import IN_FLIGHT, FrameGraphPool, StartedGroup
from espmedsam_edge.runtime.backends.gpu_arrays import frame_in_place, on_gpu
from espmedsam_edge.runtime.cuda.device import CudaDevice
from espmedsam_edge.runtime.cuda.driver import CudaError
from espmedsam_edge.runtime.cuda.pinned_pool import PinnedPool
from espmedsam_edge.runtime.cuda.stream import Stream
from espmedsam_edge.runtime.kernels.frame_view import FrameView
from espmedsam_edge.runtime.kernels.launch import FrameKernels
from espmedsam_edge.runtime.kernels.parameters import MAX_OUTLINE
from espmedsam_edge.runtime.segmentation import DeviceLost, DoesNotFit, Segmentation

_MEMORY_VARIABLE = "ESPMEDSAM_FRAME_MEMORY"


def open_device_backend(
    name: str, graph: Graph, load_engine: Callable[[Stream], DeviceEngine], memory: str | None = None
) -> DeviceBackend:
    """Open the GPU and put an engine on the frames' path there: kernels, CUDA graphs, overlap, arrays in place.

    Args:
        name: the backend's, of the registry.
        graph: the manifest's entry that the engine runs.
        load_engine: loads the engine and runs it once; called with the GPU's context current and a stream to use.
        memory: ``mapped``: the kernels read and write frames and results in the host's memory in place; ``copied``: not
            so; None: mapped where the GPU shares the host's memory.

    Raises:
        UserError: no GPU or no memory; what ``load_engine`` raises.
    """
    with ExitStack() as opened:
        device = opened.enter_context(CudaDevice.open())
        free = device.memory().free
        stream, upload, download = (Stream(device) for _ in range(3))
        loaded = load_engine(stream)
        opened.callback(loaded.close)
        engine = CapturedEngine(loaded, stream)
        opened.callback(engine.close)
        kernels = FrameKernels.load(device)
        pool, mapped = PinnedPool(device), device.gpu.integrated if memory is None else memory == "mapped"
        machine = FrameMachine(stream, engine, kernels, graph, pool, upload, download, mapped=mapped)
        taken = max(0, free - device.memory().free)
        where = ", ".join([device.gpu.name, loaded.title, *(["mapped frames"] if mapped else [])])
        return DeviceBackend(name, where, machine, taken, opened.pop_all())


class DeviceBackend:
    """A graph's engine on a GPU, on a stream of its own; takes whole frames (``FrameBackend``) and tensors."""

    def __init__(
        self,
        name: str,
        device: str,
        machine: FrameMachine,
        loaded_bytes: int,
        opened: ExitStack,
    ) -> None:
        self.name = name
        self.device = device
        self.graph = machine.graph
        self._machine = machine
        self._graphs = FrameGraphPool(machine)
        self._loaded_bytes = loaded_bytes
        self._opened = opened
        self._lost: DeviceLost | None = None
        self._busy_until = 0.0  # of the GPU, with groups that overlap
        self._closed = False

    def run(self, image: Tensor) -> Tensor:
        check_batch(self.graph, image)
        with self._at_work():
            return self._machine.engine.run(image)

    def segment_frames(self, frames: Sequence[AnyFrame], options: FrameOptions) -> list[Segmentation]:
        with self._at_work():
            taken, order = self._taken(frames)
            self._busy_until = 0.0
            return _restored(self._graphs.get(_key(taken, options)).run(taken), order)

    @property
    def in_flight(self) -> int:
        return IN_FLIGHT

    def start_frames(self, frames: Sequence[AnyFrame], options: FrameOptions) -> StartedGroup:
        with self._at_work():
            taken, order = self._taken(frames)

            def finish(graph: FrameGraph) -> list[Segmentation]:
                with self._at_work():
                    results = graph.finish(self._busy_until)
                    self._busy_until = time.perf_counter()
                    return _restored(results, order)

            return self._graphs.start(_key(taken, options), taken, finish)

    def stage_seconds(self, frames: Sequence[AnyFrame], options: FrameOptions) -> dict[str, float]:
        with self._at_work():
            taken, _ = self._taken(frames)
            return self._graphs.get(_key(taken, options)).stage_seconds(taken)

    def device_use(self) -> DeviceUse:
        """The GPU memory that this backend takes, and what is left.

        Raises:
            UserError: the GPU does not answer.
        """
        with self._at_work():
            memory = self._machine.stream.device.memory()
        return DeviceUse(
            self._loaded_bytes, self._machine.engine.engine.activation_bytes, memory.held, memory.free, memory.total
        )

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        # On a GPU that is lost everything is gone already, and every call would only say so again.
        with contextlib.suppress(*([CudaError] if self._lost else [])):
            self._machine.stream.device.make_current()
            self._graphs.close()
            self._opened.close()

    def _taken(self, frames: Sequence[AnyFrame]) -> tuple[list[FrameView | Frame], list[int]]:
        """Frames as views of the GPU's memory where they lie there, else as arrays; and which each of them was.

        They are in order of size: a group of the same sizes in another order needs no graph of its own.
        """
        stream = self._machine.stream
        taken: list[FrameView | Frame] = []
        for frame in frames:
            if isinstance(frame, (np.ndarray, FrameView)):
                taken.append(frame)
            else:
                taken.append(frame_in_place(frame, stream) if on_gpu(frame) else np.asarray(frame))
        order = sorted(range(len(taken)), key=lambda row: (_size(taken[row]), isinstance(taken[row], FrameView)))
        return [taken[row] for row in order], order

    @contextmanager
    def _at_work(self) -> Iterator[None]:
        """The GPU's context current in this thread; a GPU that is lost stays lost, with the same words.

        Raises:
            DoesNotFit: the work needs more memory than there is.
            DeviceLost: the GPU gave up on this program, now or before.
        """
        if self._lost is not None:
            raise DeviceLost(self._lost.message, self._lost.hint, exit_code=1) from self._lost.__cause__
        try:
            self._machine.stream.device.make_current()
            yield
        except CudaError as error:
            if error.lost:
                self._lost = DeviceLost(error.message, error.hint, exit_code=1)
                raise self._lost from error
            if error.out_of_memory:
                raise DoesNotFit(error.message, error.hint, exit_code=1) from error
            raise


def frame_memory() -> str | None:
    """``mapped`` or ``copied`` where the environment variable ``ESPMEDSAM_FRAME_MEMORY`` says so.

    Raises:
        UserError: another word.
    """
    chosen = os.environ.get(_MEMORY_VARIABLE) or None
    if chosen not in (None, "mapped", "copied"):
        raise UserError(f"{_MEMORY_VARIABLE} is '{chosen}'.", "Set it to mapped or copied, or leave it out.")
    return chosen


def _size(frame: FrameView | Frame) -> tuple[int, int]:
    """(H, W) in pixels."""
    return frame.size if isinstance(frame, FrameView) else (frame.shape[0], frame.shape[1])


def _key(taken: Sequence[FrameView | Frame], options: FrameOptions) -> FrameKey:
    sizes = [_size(frame) for frame in taken]
    views = tuple(isinstance(frame, FrameView) for frame in taken)
    if any(outline_width(size) > MAX_OUTLINE for size in sizes):
        options = replace(options, overlay=None)  # Segmentation.overlay draws it on the CPU
    return FrameKey(tuple((width, height) for height, width in sizes), views, options)


def _restored(results: Sequence[Segmentation], order: Sequence[int]) -> list[Segmentation]:
    """Results of frames that were put in ``order``, as the frames were before."""
    return [result for _, result in sorted(zip(order, results, strict=True), key=lambda pair: pair[0])]
