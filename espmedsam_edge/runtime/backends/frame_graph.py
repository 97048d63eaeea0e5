"""Frames of one set of sizes through the GPU: preprocess, engine and postprocess as one CUDA graph between copies."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from espmedsam_edge.bundle import Graph
from espmedsam_edge.errors import UserError
from espmedsam_edge.imaging.geometry import Frame
from espmedsam_edge.imaging.overlay import OverlayStyle
from espmedsam_edge.runtime.backends.backend import FrameOptions
from espmedsam_edge.runtime.backends.device_engine import CapturedEngine
from espmedsam_edge.runtime.backends.frame_buffers import FrameInput, FrameOutputs
from espmedsam_edge.runtime.cuda.memory import DeviceBuffer, PinnedBuffer
from espmedsam_edge.runtime.cuda.pinned_pool import PinnedPool
from espmedsam_edge.runtime.cuda.stream import CudaGraph, Event, Stream
from espmedsam_edge.runtime.kernels.frame_view import FrameView, PixelFormat
from espmedsam_edge.runtime.kernels.launch import FP32_BYTES, FrameKernels
from espmedsam_edge.runtime.segmentation import Drawn, Segmentation, Timings

STAGES: tuple[str, ...] = ("upload", "preprocess", "engine", "postprocess", "download")
_NO_OVERLAY = OverlayStyle((0, 0, 0), outline=False)


@dataclass(frozen=True)
class FrameMachine:
    """What frames of every size share: the engine, the kernels and the streams they run on.

    Attributes:
        stream: where all computing is enqueued; a frame that is waited for at once is copied there too.
        upload: where frames are copied in while others are computed.
        download: where results are copied out while others are computed.
        graph: the network's entry in the manifest.
        mapped: let the kernels read and write the host's pinned memory instead of copying (boards that share memory).
    """

    stream: Stream
    engine: CapturedEngine
    kernels: FrameKernels
    graph: Graph
    pool: PinnedPool
    upload: Stream
    download: Stream
    mapped: bool = False


@dataclass(frozen=True)
class _Started:
    """A group on its way: its frames, which must live until they are read, where results go, and seconds of the clock.

    ``written``: a frame's share of the time that copying frames to pinned memory took; ``since``: when it was enqueued.
    """

    frames: Sequence[FrameView | Frame]
    pinned: Sequence[NDArray[np.uint8] | None]
    written: float
    since: float


@dataclass
class _Lane:
    """What a group that others overlap with has for itself: its logits, and the marks between the three streams."""

    logits: DeviceBuffer
    uploaded: Event
    computed: Event
    downloaded: Event


@dataclass(frozen=True)
class FrameKey:
    """What a captured graph has fixed: each frame's (width, height), which are on the GPU, and the options."""

    sizes: tuple[tuple[int, int], ...]
    on_gpu: tuple[bool, ...]
    options: FrameOptions


class FrameGraph:
    """Buffers for one group of frames, and the graph that makes results of them.

    The copies are enqueued around the graph and not in it, so that results may go to any pinned memory: they are
    downloaded to arrays that are handed out.

    Frames that lie on the GPU are read there, at an address that changes: for a group with such frames the stages are
    enqueued one by one, with the engine as a captured graph of its own.
    """

    def __init__(self, machine: FrameMachine, key: FrameKey) -> None:
        """Allocate, warm up and capture.

        Raises:
            CudaError: no memory for frames of these sizes, for example.
            DoesNotFit: a size the kernels cannot take.
        """
        self._machine, self._key = machine, key
        self._graph: CudaGraph | None = None
        self._started: _Started | None = None
        self._opened = ExitStack()
        with ExitStack() as opened:
            self._logits = opened.enter_context(
                PinnedBuffer(machine.stream.device, FP32_BYTES * math.prod(machine.graph.output_shape))
            )
            self._lane = self._make_lane(opened)
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

    @property
    def size(self) -> int:
        """Bytes of its frames and results: on the GPU, or where both share the memory, in that."""
        sources = sum(source.size for source in self._inputs if source is not None)
        return sources + sum(outputs.size for outputs in self._outputs)

    def run(self, frames: Sequence[FrameView | Frame]) -> list[Segmentation]:
        """Segment frames of the key's sizes; waits for the result. Nothing started here may be under way.

        The results' timings: copying frames to pinned memory, then all that the GPU does, then copying results out.

        Raises:
            UserError: the GPU failed.
        """
        stream = self._machine.stream
        views, started = self._begin(frames)
        self._upload(stream)
        self._launch(views)
        self._download(started.pinned, stream, self._machine.engine.logits)
        stream.synchronize()
        return self._results(started, time.perf_counter() - started.since)

    def start(self, frames: Sequence[FrameView | Frame]) -> None:
        """Enqueue what ``run`` does and return: the copies on streams of their own, so that they overlap with the work
        of other groups. ``finish`` comes before the next group, and before frames are written to again.

        Raises:
            UserError: the GPU failed; nothing was started.
        """
        views, started = self._begin(frames)
        try:
            self._enqueue_overlapping(views, started)
        except UserError:
            # What was enqueued may still read the frames and write the results: it must be over before they go.
            with contextlib.suppress(UserError):
                for stream in (self._machine.upload, self._machine.stream, self._machine.download):
                    stream.synchronize()
            raise
        self._started = started

    def _enqueue_overlapping(self, views: Sequence[FrameView], started: _Started) -> None:
        machine, lane = self._machine, self._lane
        self._upload(machine.upload)
        lane.uploaded.record(machine.upload)
        machine.stream.wait(lane.uploaded)
        self._launch(views)
        # The next group's engine writes its logits to the same place: on the GPU they are out of its way at once.
        machine.stream.copy_on_device(lane.logits.address, machine.engine.logits, lane.logits.size)
        lane.computed.record(machine.stream)
        machine.download.wait(lane.computed)
        self._download(started.pinned, machine.download, lane.logits.address)
        lane.downloaded.record(machine.download)

    def finish(self, busy_until: float = 0.0) -> list[Segmentation]:
        """Wait for the group that was started, and give its results.

        Args:
            busy_until: until when (``time.perf_counter``) the GPU was at work on the group before, which is not
                counted as this one's time.

        Raises:
            UserError: the GPU failed.
        """
        started = self._started
        assert started is not None
        self._started = None
        self._lane.downloaded.synchronize()
        return self._results(started, time.perf_counter() - max(started.since, busy_until))

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
            self._upload(stream)
            mark()
            self._enqueue(views, self._machine.engine.launch, mark)
            self._download([None] * len(views), stream, self._machine.engine.logits)
            mark()
            stream.synchronize()
            return {
                stage: after.seconds_since(before)
                for stage, before, after in zip(STAGES, marks, marks[1:], strict=False)
            }

    def close(self) -> None:
        """Free the graph and the buffers, when nothing is under way; a second call does nothing."""
        self._opened.close()

    def _make_lane(self, opened: ExitStack) -> _Lane:
        device = self._machine.stream.device
        logits = opened.enter_context(DeviceBuffer(device, self._logits.size))
        return _Lane(logits, *(opened.enter_context(Event(device)) for _ in range(3)))

    def _begin(self, frames: Sequence[FrameView | Frame]) -> tuple[list[FrameView], _Started]:
        """Bring frames to pinned memory, and find memory for their results."""
        began = time.perf_counter()
        views = self._write(frames)
        pool = self._machine.pool
        pinned = [pool.take(outputs.size) if outputs.unpadded else None for outputs in self._outputs]
        now = time.perf_counter()
        return views, _Started(frames, pinned, (now - began) / len(frames), now)

    def _launch(self, views: Sequence[FrameView]) -> None:
        if self._graph is not None:
            self._graph.launch(self._machine.stream)
        else:
            self._enqueue(views, self._machine.engine.launch)

    def _results(self, started: _Started, computed: float) -> list[Segmentation]:
        share = computed / len(started.frames)
        return [self._result(row, pinned, started.written, share) for row, pinned in enumerate(started.pinned)]

    def _input(self, opened: ExitStack, width: int, height: int) -> FrameInput:
        made = FrameInput(self._machine.stream.device, PixelFormat.BGR8, width, height, mapped=self._machine.mapped)
        opened.callback(made.close)
        return made

    def _capture(self, opened: ExitStack) -> None:
        views = [source.view for source in self._inputs if source is not None]
        # Once outside the capture: the first launch of a kernel loads it, which cannot be captured.
        self._enqueue(views, self._machine.engine.enqueue)
        self._machine.stream.synchronize()
        captured = CudaGraph.capture(self._machine.stream, lambda: self._enqueue(views, self._machine.engine.enqueue))
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
                source.write(frame)
                views.append(source.view)
        return views

    def _upload(self, stream: Stream) -> None:
        for source in self._inputs:
            if source is not None:
                source.upload(stream)

    def _download(self, pinned: Sequence[NDArray[np.uint8] | None], stream: Stream, logits: int) -> None:
        for outputs, memory in zip(self._outputs, pinned, strict=True):
            outputs.download(stream, None if memory is None else int(memory.ctypes.data))
        stream.copy_to_host(self._logits.address, logits, self._logits.size)

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

    def _result(self, row: int, pinned: NDArray[np.uint8] | None, written: float, computed: float) -> Segmentation:
        """A frame's results in memory of their own; its share of the seconds for writing frames and computing."""
        begin = time.perf_counter()
        outputs, options = self._outputs[row], self._key.options
        if pinned is not None:
            mask, overlay, measured = outputs.arrays_in(pinned)
        else:
            mask, measured = outputs.mask.copy(), outputs.measured
            overlay = None if outputs.overlay is None else outputs.overlay.copy()
        drawn = None if overlay is None or options.overlay is None else Drawn(overlay, options.overlay)
        logits = self._logits.array(self._machine.graph.output_shape, np.float32)[row, 0].copy()
        return Segmentation(
            mask=mask,
            modality=self._machine.graph.modality,
            logits=logits,
            threshold=options.threshold,
            timings=Timings(written, computed, time.perf_counter() - begin),
            measured=measured,
            drawn=drawn,
        )
