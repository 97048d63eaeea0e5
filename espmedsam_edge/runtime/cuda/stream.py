"""Work in order on a GPU: streams, the events between them, and graphs that replay what was captured."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from espmedsam_edge.runtime.cuda.device import CudaDevice, Resource
from espmedsam_edge.runtime.cuda.driver import CudaError

_NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING: no waiting for the legacy default stream
_DISABLE_TIMING = 2  # CU_EVENT_DISABLE_TIMING
_NOT_READY = 600


class Stream(Resource):
    """A queue of work. All methods but ``synchronize`` return at once.

    Addresses are plain integers; copies to and from the host want pinned memory (``PinnedBuffer``).

    Attributes:
        handle: cuda-python's ``CUstream``; ``int(stream)`` is the pointer that TensorRT and DLPack take.
    """

    def __init__(self, device: CudaDevice) -> None:
        self.handle: Any = device.driver.call("cuStreamCreate", _NON_BLOCKING)
        super().__init__(device)

    def __int__(self) -> int:
        return int(self.handle)

    def synchronize(self) -> None:
        """Wait until all that was enqueued is done.

        Raises:
            CudaError: something that was enqueued failed.
        """
        self.device.driver.call("cuStreamSynchronize", self.handle)

    def check(self) -> None:
        """Say whether what was enqueued has failed so far, without waiting for it.

        Raises:
            CudaError: something that was enqueued failed, or the GPU is lost.
        """
        try:
            self.device.driver.call("cuStreamQuery", self.handle)
        except CudaError as error:
            if error.code != _NOT_READY:
                raise

    def wait(self, event: Event) -> None:
        """Let what is enqueued from now on wait for an event of any stream."""
        self.device.driver.call("cuStreamWaitEvent", self.handle, event.handle, 0)

    def wait_for_foreign(self, stream: int) -> None:
        """Let what is enqueued from now on wait for all that is enqueued on another library's stream.

        Args:
            stream: its pointer; 1 is the legacy default stream, 2 the thread's own default stream.
        """
        with Event(self.device) as event:  # the wait outlives it
            driver = self.device.driver
            driver.call("cuEventRecord", event.handle, driver.handle("CUstream", stream))
            self.wait(event)

    def end_capture(self) -> None:
        """End a capture that somebody left under way, and drop it; without one nothing happens."""
        driver = self.device.driver
        _, graph = driver.attempt("cuStreamEndCapture", self.handle)
        if graph is not None and int(graph):
            driver.attempt("cuGraphDestroy", graph)

    def copy_to_device(self, target: int, source: int, size: int) -> None:
        """Copy ``size`` bytes from the host to the GPU."""
        self.device.driver.call("cuMemcpyHtoDAsync", target, source, size, self.handle)

    def copy_to_host(self, target: int, source: int, size: int) -> None:
        """Copy ``size`` bytes from the GPU to the host."""
        self.device.driver.call("cuMemcpyDtoHAsync", target, source, size, self.handle)

    def copy_on_device(self, target: int, source: int, size: int) -> None:
        """Copy ``size`` bytes within the GPU's memory."""
        self.device.driver.call("cuMemcpyDtoDAsync", target, source, size, self.handle)

    def fill(self, target: int, value: int, size: int) -> None:
        """Set ``size`` bytes of the GPU's memory to ``value``."""
        self.device.driver.call("cuMemsetD8Async", target, value, size, self.handle)

    def _free(self) -> None:
        self.device.driver.call("cuStreamDestroy", self.handle)


class Event(Resource):
    """A mark in a stream: something to wait for, or one end of a time measured on the GPU."""

    def __init__(self, device: CudaDevice, *, timing: bool = False) -> None:
        self.handle: Any = device.driver.call("cuEventCreate", 0 if timing else _DISABLE_TIMING)
        super().__init__(device)

    def record(self, stream: Stream) -> None:
        """Set the mark after all that is enqueued on ``stream``."""
        self.device.driver.call("cuEventRecord", self.handle, stream.handle)

    def synchronize(self) -> None:
        """Wait until the stream has passed the mark."""
        self.device.driver.call("cuEventSynchronize", self.handle)

    def passed(self) -> bool:
        """Whether the stream has passed the mark (True if it was never set).

        Raises:
            CudaError: work before the mark failed.
        """
        code, _ = self.device.driver.attempt("cuEventQuery", self.handle)
        if code == _NOT_READY:
            return False
        if code:
            self.synchronize()  # raises the same error, in words
        return True

    def seconds_since(self, earlier: Event) -> float:
        """GPU time between two marks that were passed; both events need ``timing=True``."""
        return float(self.device.driver.call("cuEventElapsedTime", earlier.handle, self.handle)) / 1000

    def _free(self) -> None:
        self.device.driver.call("cuEventDestroy", self.handle)


class CudaGraph(Resource):
    """Work captured once and replayed with one call, with the same addresses each time."""

    def __init__(self, device: CudaDevice, executable: Any) -> None:
        self._executable = executable
        super().__init__(device)

    @classmethod
    def capture(cls, stream: Stream, enqueue: Callable[[], None]) -> CudaGraph:
        """Record what ``enqueue`` puts on ``stream`` without running it.

        Only this thread is bound by the rules of capture: others may allocate and synchronize meanwhile.

        Raises:
            CudaError: something was called that cannot be captured, an allocation or a synchronization.
        """
        device, driver = stream.device, stream.device.driver
        mode = driver.constant("CUstreamCaptureMode", "CU_STREAM_CAPTURE_MODE_THREAD_LOCAL")
        driver.call("cuStreamBeginCapture", stream.handle, mode)
        try:
            enqueue()
        except BaseException:
            stream.end_capture()  # a stream left in capture would be lost
            raise
        graph = driver.call("cuStreamEndCapture", stream.handle)
        try:
            executable = driver.call("cuGraphInstantiate", graph, 0)
        finally:
            driver.call("cuGraphDestroy", graph)
        return cls(device, executable)

    def launch(self, stream: Stream) -> None:
        """Enqueue the whole graph. One graph may run once at a time; a second launch waits for the first."""
        self.device.driver.call("cuGraphLaunch", self._executable, stream.handle)

    def _free(self) -> None:
        self.device.driver.call("cuGraphExecDestroy", self._executable)
