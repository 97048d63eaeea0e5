"""Frames of one set of sizes through the GPU: preprocess, engine and postprocess as one CUDA graph between copies."""

from __future__ import annotations

import contextlib
import math
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from espmedsam_edge.bundle import Graph as BundleGraph
from espmedsam_edge.errors import UserError
from espmedsam_edge.imaging.geometry import Frame
from espmedsam_edge.imaging.overlay import OverlayStyle
from espmedsam_edge.runtime.backend import FrameOptions
from espmedsam_edge.runtime.cuda_api import CudaError, megabytes
from espmedsam_edge.runtime.cuda_stream import Event, Graph, Stream
from espmedsam_edge.runtime.frame_buffers import FrameInput, FrameOutputs
from espmedsam_edge.runtime.frame_view import FrameView, PixelFormat
from espmedsam_edge.runtime.kernels.launch import FrameKernels
from espmedsam_edge.runtime.lent_memory import Lender
from espmedsam_edge.runtime.segmentation import Drawn, Segmentation, Timings
from espmedsam_edge.runtime.tensorrt_engine import Engine

STAGES: tuple[str, ...] = ("upload", "preprocess", "engine", "postprocess", "download")
KEPT_SIZES = 4
"""How many sets of frame sizes stay captured."""

_NO_OVERLAY = OverlayStyle((0, 0, 0), outline=False)


@dataclass(frozen=True)
class FrameMachine:
    """What frames of every size share: the engine, the kernels and the stream they run on.

    Attributes:
        graph: the network's entry in the manifest.
        mapped: let the kernels read and write the host's pinned memory instead of copying (boards that share memory).
    """

    stream: Stream
    engine: Engine
    kernels: FrameKernels
    graph: BundleGraph
    lender: Lender
    mapped: bool = False


@dataclass(frozen=True)
class FrameKey:
    """What a captured graph has fixed: each frame's (width, height), which are on the GPU, and the options."""

    sizes: tuple[tuple[int, int], ...]
    on_gpu: tuple[bool, ...]
    options: FrameOptions


class FrameGraph:
    """Buffers for one group of frames, and the graph that makes results of them.

    The copies are enqueued around the graph and not in it, so that they may go from and to any pinned memory: frames
    written to ``Lender``'s arrays are uploaded from there, and results are downloaded to arrays that are handed out.

    Frames that lie on the GPU are read there, at an address that changes: for a group with such frames the stages are
    enqueued one by one, with the engine as a captured graph of its own.
    """

    def __init__(self, machine: FrameMachine, key: FrameKey) -> None:
        """Allocate, warm up and capture.

        Raises:
            UserError: no memory for frames of these sizes, or a size the kernels cannot take.
        """
        self._machine, self._key = machine, key
        self._graph: Graph | None = None
        self._opened = ExitStack()
        with ExitStack() as opened:
            self._inputs: list[FrameInput | None] = []
            self._outputs: list[FrameOutputs] = []
            for (width, height), on_gpu in zip(key.sizes, key.on_gpu, strict=True):
                self._inputs.append(None if on_gpu else self._input(opened, width, height))
                overlay = key.options.overlay is not None
                outputs = FrameOutputs(machine.stream, width, height, overlay=overlay, mapped=machine.mapped)
                opened.callback(outputs.close)
                self._outputs.append(outputs)
            if not any(key.on_gpu) and machine.engine.capturable:
                self._capture(opened)
            self._opened = opened.pop_all()

    def run(self, frames: Sequence[FrameView | Frame]) -> list[Segmentation]:
        """Segment frames of the key's sizes; waits for the result.

        The results' timings: copying frames to pinned memory, then all that the GPU does, then copying results out.

        Raises:
            UserError: the GPU failed.
        """
        began = time.perf_counter()
        views = self._write(frames)
        lender = self._machine.lender
        lent = [lender.take(outputs.size) if outputs.can_lend else None for outputs in self._outputs]
        written = time.perf_counter()
        self._upload(frames)
        if self._graph is not None:
            self._graph.launch(self._machine.stream)
        else:
            self._enqueue(views, self._machine.engine.launch)
        self._download(lent)
        self._machine.stream.synchronize()
        finished = time.perf_counter()
        count = len(frames)
        results = []
        for index in range(count):
            results.append(self._result(index, lent[index], (written - began) / count, (finished - written) / count))
        return results

    def stage_seconds(self, frames: Sequence[FrameView | Frame]) -> dict[str, float]:
        """Seconds on the GPU of each of ``STAGES``, by events between them; enqueued one by one, not as one graph.

        Raises:
            UserError: as for ``run``.
        """
        device, stream = self._machine.stream.device, self._machine.stream
        views = self._write(frames)
        with ExitStack() as stack:
            marks = [stack.enter_context(Event(device, timing=True)) for _ in range(len(STAGES) + 1)]
            remaining = iter(marks)

            def mark() -> None:
                next(remaining).record(stream)

            mark()
            self._upload(frames)
            mark()
            self._enqueue(views, self._machine.engine.launch, mark)
            self._download([None] * len(views))
            mark()
            stream.synchronize()
            return {
                stage: after.seconds_since(before)
                for stage, before, after in zip(STAGES, marks, marks[1:], strict=False)
            }

    def close(self) -> None:
        """Free the graph and the buffers; a second call does nothing."""
        self._opened.close()

    def _input(self, opened: ExitStack, width: int, height: int) -> FrameInput:
        made = FrameInput(self._machine.stream.device, PixelFormat.BGR8, width, height, mapped=self._machine.mapped)
        opened.callback(made.close)
        return made

    def _capture(self, opened: ExitStack) -> None:
        views = [source.view for source in self._inputs if source is not None]
        # Once outside the capture: the first launch of a kernel loads it, which cannot be captured.
        self._enqueue(views, self._machine.engine.enqueue)
        self._machine.stream.synchronize()
        captured = Graph.capture(self._machine.stream, lambda: self._enqueue(views, self._machine.engine.enqueue))
        opened.callback(captured.close)
        self._graph = captured

    def _write(self, frames: Sequence[FrameView | Frame]) -> list[FrameView]:
        """Copy what is in the host's memory to the pinned buffers; the rest is looked at where it is."""
        views = []
        for frame, source in zip(frames, self._inputs, strict=True):
            if isinstance(frame, FrameView):
                views.append(frame)
            else:
                assert source is not None  # by the key
                if self._lent_address(frame, source) is None:
                    source.write(frame)
                views.append(source.view)
        return views

    def _lent_address(self, frame: Frame, source: FrameInput) -> int | None:
        return self._machine.lender.address_of(frame) if source.takes_rows else None

    def _upload(self, frames: Sequence[FrameView | Frame]) -> None:
        for frame, source in zip(frames, self._inputs, strict=True):
            if source is not None and not isinstance(frame, FrameView):
                source.upload(self._machine.stream, self._lent_address(frame, source))

    def _download(self, lent: Sequence[NDArray[np.uint8] | None]) -> None:
        for outputs, memory in zip(self._outputs, lent, strict=True):
            outputs.download(self._machine.stream, None if memory is None else int(memory.ctypes.data))
        self._machine.engine.download()

    def _enqueue(
        self, views: Sequence[FrameView], engine: Callable[[], None], mark: Callable[[], None] = lambda: None
    ) -> None:
        """What is between the copies, on the stream; ``mark`` is called after each stage."""
        machine, options = self._machine, self._key.options
        stream, side = machine.stream, machine.graph.image_size
        machine.kernels.preprocess(stream, views, machine.engine.image, side, options.normalization)
        mark()
        engine()
        mark()
        height, width = machine.graph.output_shape[2:]
        canvases = [
            outputs.canvas(view, machine.engine.logits + 4 * height * width * row)
            for row, (view, outputs) in enumerate(zip(views, self._outputs, strict=True))
        ]
        style = options.overlay or _NO_OVERLAY
        machine.kernels.postprocess(stream, canvases, (height, width), options.threshold, style)
        mark()

    def _result(self, row: int, lent: NDArray[np.uint8] | None, written: float, computed: float) -> Segmentation:
        """A frame's results in memory of their own; its share of the seconds for writing frames and computing."""
        begin = time.perf_counter()
        outputs, options = self._outputs[row], self._key.options
        if lent is not None:
            mask, overlay, measured = outputs.arrays_in(lent)
        else:
            mask, measured = outputs.mask.copy(), outputs.measured
            overlay = None if outputs.overlay is None else outputs.overlay.copy()
        drawn = None if overlay is None or options.overlay is None else Drawn(overlay, options.overlay)
        logits = self._machine.engine.logits_on_host()[row, 0].copy()
        return Segmentation(
            mask=mask,
            modality=self._machine.graph.modality,
            logits=logits,
            threshold=options.threshold,
            timings=Timings(written, computed, time.perf_counter() - begin),
            measured=measured,
            drawn=drawn,
        )


class FrameGraphs:
    """Frame graphs by what they have fixed, the least recently used of them given up for a new one."""

    def __init__(self, machine: FrameMachine, kept: int = KEPT_SIZES) -> None:
        self._machine, self._kept = machine, kept
        self._graphs: OrderedDict[FrameKey, FrameGraph] = OrderedDict()

    def __len__(self) -> int:
        return len(self._graphs)

    def get(self, key: FrameKey) -> FrameGraph:
        """The graph of a key, made where there is none.

        Raises:
            UserError: no memory, even with all others freed; says what fits.
        """
        found = self._graphs.get(key)
        if found is None:
            while len(self._graphs) >= self._kept:
                self._drop_oldest()
            found = self._make(key)
            self._graphs[key] = found
        self._graphs.move_to_end(key)
        return found

    def close(self) -> None:
        """Free all."""
        while self._graphs:
            self._drop_oldest()

    def _drop_oldest(self) -> None:
        self._graphs.popitem(last=False)[1].close()

    def _make(self, key: FrameKey) -> FrameGraph:
        with contextlib.suppress(_OutOfMemory):
            return self._attempt(key)
        self.close()
        try:
            return self._attempt(key)
        except _OutOfMemory as full:
            raise self._does_not_fit(key) from full.__cause__

    def _attempt(self, key: FrameKey) -> FrameGraph:
        try:
            return FrameGraph(self._machine, key)
        except CudaError as error:
            if error.out_of_memory:
                raise _OutOfMemory from error
            raise

    def _does_not_fit(self, key: FrameKey) -> UserError:
        device = self._machine.stream.device
        free = device.memory().free
        each = 3 + 1 + (3 if key.options.overlay is not None else 0)  # bytes a pixel: the frame, its mask, its overlay
        needed = sum(each * width * height for width, height in key.sizes)
        width, height = max(key.sizes, key=math.prod)
        ratio = math.sqrt(min(1.0, free / needed)) if needed else 0.0
        fits = f"Frames up to about {int(width * ratio)}x{int(height * ratio)} fit. " if free > needed // 100 else ""
        what = f"a group of {len(key.sizes)} frames up to" if len(key.sizes) > 1 else "a frame of"
        return UserError(
            f"{what} {width}x{height} pixels needs {megabytes(needed)} on the GPU and in pinned memory; "
            f"{megabytes(free)} are free on {device.gpu.name}.",
            f"{fits}Stop other programs (nvidia-smi, or tegrastats on a Jetson, shows them), use fewer modalities at a "
            "time, or --backend onnxruntime.",
            exit_code=1,
        )


class _OutOfMemory(Exception):
    """The GPU, or what can be pinned of the host's memory, is full."""
