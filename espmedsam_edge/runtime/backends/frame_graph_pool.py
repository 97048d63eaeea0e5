"""Frame graphs by frame size, several of one size for groups that overlap, and the groups that are under way."""

from __future__ import annotations

import contextlib
import math
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence

from espmedsam_edge.errors import UserError
from espmedsam_edge.imaging.geometry import Frame
from espmedsam_edge.runtime.backends.frame_graph import FrameGraph, FrameKey, FrameMachine
from espmedsam_edge.runtime.cuda.driver import CudaError, megabytes
from espmedsam_edge.runtime.kernels.frame_view import FrameView
from espmedsam_edge.runtime.segmentation import DoesNotFit, Segmentation

KEPT_SIZES = 4
"""How many sets of frame sizes stay captured; with a batch at least twice as many as it holds frames, since groups of
fewer frames are sets of their own."""
KEPT_SHARE = 4
"""Of the memory that was free when the engine was loaded, they take one part in so many; the size in use may take more.
"""
IN_FLIGHT = 3
"""Groups of frames under way at most: one that is copied in, one that is computed, one that is copied out."""


class StartedGroup:
    """A group of frames on its way through the GPU."""

    def __init__(self, finish: Callable[[], list[Segmentation]]) -> None:
        self._finish = finish
        self._results: list[Segmentation] | None = None
        self._error: UserError | None = None

    @property
    def settled(self) -> bool:
        """Whether it was waited for, with results or an error."""
        return self._results is not None or self._error is not None

    def settle(self) -> None:
        """Wait for it and keep what came of it; a second call does nothing."""
        if not self.settled:
            try:
                self._results = self._finish()
            except UserError as error:
                self._error = error

    def results(self) -> list[Segmentation]:
        """Wait for it: one result a frame, in the order of the frames.

        Raises:
            UserError: the GPU failed; each call says so again.
        """
        self.settle()
        if self._error is not None:
            raise self._error
        assert self._results is not None
        return self._results


class _Sized:
    """The graphs of one key, each with the group that it works on."""

    def __init__(self) -> None:
        self.graphs: list[FrameGraph] = []
        self.groups: list[StartedGroup | None] = []
        self.full = False  # there was no memory for one more

    def add(self, graph: FrameGraph) -> None:
        self.graphs.append(graph)
        self.groups.append(None)

    @property
    def size(self) -> int:
        """Bytes of all of them."""
        return sum(graph.size for graph in self.graphs)

    def idle(self) -> int | None:
        """The first one that is free."""
        for index, group in enumerate(self.groups):
            if group is None or group.settled:
                return index
        return None

    def close(self) -> None:
        for group in self.groups:
            if group is not None:
                group.settle()
        for graph in self.graphs:
            graph.close()


class FrameGraphPool:
    """Frame graphs by what they have fixed. Few are kept, within a share of the memory, by their last use."""

    def __init__(self, machine: FrameMachine) -> None:
        self._machine, self._kept = machine, max(KEPT_SIZES, 2 * machine.graph.batch if machine.graph.batch > 1 else 0)
        self._budget = machine.stream.device.memory().free // KEPT_SHARE
        self._sized: OrderedDict[FrameKey, _Sized] = OrderedDict()
        self._started: deque[StartedGroup] = deque()

    def get(self, key: FrameKey) -> FrameGraph:
        """The graph of a key, made where there is none, once all that was started is done.

        Raises:
            DoesNotFit: no memory, even with all others freed; says what fits.
            UserError: the GPU failed.
        """
        self.settle()
        return self._of(key).graphs[0]

    def start(
        self,
        key: FrameKey,
        frames: Sequence[FrameView | Frame],
        finish: Callable[[FrameGraph], list[Segmentation]],
    ) -> StartedGroup:
        """Start a group; the oldest one is waited for first where ``IN_FLIGHT`` are under way.

        Args:
            key: of the frames.
            frames: they stay as they are until the group is settled.
            finish: calls the graph's ``finish``, with what must be around it.

        Raises:
            UserError: as ``get``; the GPU failed.
        """
        while len(self._started) >= IN_FLIGHT:
            self._started.popleft().settle()
        sized = self._of(key)
        index = sized.idle()
        if index is None:
            index = self._one_more(key, sized)
        graph = sized.graphs[index]
        graph.start(frames)
        group = StartedGroup(lambda: finish(graph))
        sized.groups[index] = group
        self._started.append(group)
        return group

    def settle(self) -> None:
        """Wait for all that was started."""
        while self._started:
            self._started.popleft().settle()

    def close(self) -> None:
        """Wait for what was started, and free all."""
        self.settle()
        while self._sized:
            self._drop_oldest()

    def _drop_oldest(self) -> None:
        self._sized.popitem(last=False)[1].close()

    def _of(self, key: FrameKey) -> _Sized:
        found = self._sized.get(key)
        if found is None:
            while len(self._sized) >= self._kept:
                self._drop_oldest()
            found = _Sized()
            found.add(self._make(key))
            self._sized[key] = found
        self._sized.move_to_end(key)
        self._keep_within_budget()
        return found

    def _keep_within_budget(self) -> None:
        """Give up sizes for those used later; the last one stays, whatever it takes."""
        while len(self._sized) > 1 and sum(sized.size for sized in self._sized.values()) > self._budget:
            self._drop_oldest()

    def _one_more(self, key: FrameKey, sized: _Sized) -> int:
        """The number of a further graph of a key; where there is no memory for it, of its oldest one, waited for."""
        if not sized.full:
            try:
                sized.add(self._attempt(key))
            except _OutOfMemory:
                sized.full = True
            else:
                self._keep_within_budget()
                return len(sized.graphs) - 1
        self.settle()
        return 0

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

    def _does_not_fit(self, key: FrameKey) -> DoesNotFit:
        device = self._machine.stream.device
        free = device.memory().free
        each = 3 + 1 + (3 if key.options.overlay is not None else 0)  # bytes a pixel: the frame, its mask, its overlay
        needed = sum(each * width * height for width, height in key.sizes)
        width, height = max(key.sizes, key=math.prod)
        ratio = math.sqrt(free / needed)
        # With enough of it free, it is memory that can be pinned that ran out: nobody knows how much of that there is.
        fits = f"Frames up to about {int(width * ratio)}x{int(height * ratio)} fit. " if 0.1 < ratio < 1 else ""
        what = f"a group of {len(key.sizes)} frames up to" if len(key.sizes) > 1 else "a frame of"
        return DoesNotFit(
            f"{what} {width}x{height} pixels needs {megabytes(needed)} on the GPU and in pinned memory; "
            f"{megabytes(free)} are free on {device.gpu.name}.",
            f"{fits}Stop other programs (nvidia-smi, or tegrastats on a Jetson, shows them), use fewer modalities at a "
            "time, or --backend onnxruntime.",
            exit_code=1,
        )


class _OutOfMemory(Exception):
    """The GPU, or what can be pinned of the host's memory, is full."""
