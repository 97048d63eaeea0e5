"""Runs a graph with ONNX Runtime's CUDA provider, with preprocessing and postprocessing on the same GPU.

ONNX Runtime cannot be part of a CUDA graph of ours: within a capture its run frees pinned memory, which is not allowed
there, and the error ends the process (measured at https://github.com/microsoft/onnxruntime/pull/32081). So its own
graph is on, captured on our stream when it is loaded, and the kernels are enqueued before and after it.
"""

from __future__ import annotations

import ctypes
import logging
import math
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from espmedsam_edge.bundle import Bundle, Graph
from espmedsam_edge.errors import UserError
from espmedsam_edge.machine.cores import usable_cores
from espmedsam_edge.runtime.backends.backend import Backend, BackendUnavailable
from espmedsam_edge.runtime.backends.backend_spec import BackendSpec
from espmedsam_edge.runtime.backends.device_backend import frame_memory, open_device_backend
from espmedsam_edge.runtime.backends.onnxruntime_backend import OnnxRuntimeBackend
from espmedsam_edge.runtime.cuda import driver as cuda_api
from espmedsam_edge.runtime.cuda.driver import CudaError, CudaUnavailable
from espmedsam_edge.runtime.cuda.gpu import driver_installed, find_gpu
from espmedsam_edge.runtime.cuda.memory import DeviceBuffer
from espmedsam_edge.runtime.cuda.stream import Stream
from espmedsam_edge.runtime.engines.remedies import remedy
from espmedsam_edge.runtime.onnx_session import (
    INPUT,
    OUTPUT,
    available_providers,
    check_signature,
    open_session,
    ort_errors,
    run_error,
    why_not_installed,
)

log = logging.getLogger(__name__)

CUDA = "CUDAExecutionProvider"
_LIBRARY = "libonnxruntime_providers_cuda.so"
_FP32_BYTES = 4
_WARM_UP_RUNS = 3  # memory, the choice of convolutions, and the capture of its graph
_GRAPH = "enable_cuda_graph"
_TITLE = "ONNX Runtime"

OpenSession = Callable[[Mapping[str, str]], Any]
"""A session on the CUDA provider with these options of it, checked against the manifest."""


def unavailable(name: str) -> str | None:
    """Why ``name`` cannot run on this machine, or None."""
    lacking = why_not_installed("onnxruntime-gpu")
    if lacking is not None:
        return lacking
    if CUDA not in available_providers():
        return "this onnxruntime has no CUDA provider. Install onnxruntime-gpu in place of onnxruntime."
    if not driver_installed():
        return "there is no NVIDIA driver here. To use a GPU install it; in a container run it with --gpus all."
    if find_gpu() is None:
        return "the driver finds no GPU. Check nvidia-smi and CUDA_VISIBLE_DEVICES."
    return None


def load(name: str, bundle: Bundle, graph: Graph, threads: int | None) -> Backend:
    """Load a graph for the GPU here, with frames and masks there too; without cuda-python the network alone.

    Raises:
        BackendUnavailable: the provider, its CUDA libraries, the graph or the kernels do not load here; says why.
        UserError: the graph is not what the manifest describes; see ``frame_memory``.
    """
    memory, where = frame_memory(), bundle.graph_path(graph)
    content = bundle.read_graph(graph)
    layout = {"prefer_nhwc": "1"} if BackendSpec.parse(name).layout == "nhwc" else {}

    def session(options: Mapping[str, str]) -> Any:
        opened = open_session(
            content, threads or usable_cores(), providers=[CUDA], options={**_OPTIONS, **layout, **options}, where=where
        )
        if CUDA not in opened.get_providers():
            reason, fix = _why_not_started(), "Install its CUDA libraries: pip install 'onnxruntime-gpu[cuda,cudnn]'"
            raise BackendUnavailable(
                f"onnxruntime's CUDA provider did not start: {reason}.", remedy(reason, fix, _TITLE), exit_code=1
            )
        check_signature(opened, graph, where)
        return opened

    try:
        lacking = cuda_api.unavailable()
        if lacking is None:
            try:
                return open_device_backend(
                    name, graph, lambda stream: OnnxRuntimeEngine(graph, stream, session), memory
                )
            except CudaUnavailable as error:  # NVRTC, for the kernels
                lacking = str(error)
        log.info("Frames go to the GPU and back for %s, which takes longer: %s", name, lacking)
        return OnnxRuntimeBackend(name, "CUDA", graph, session({}))
    except BackendUnavailable:
        raise
    except UserError as error:
        hint = remedy(error.message, error.hint, _TITLE)
        raise BackendUnavailable(error.message, hint, exit_code=1) from error


# Products in FP32 are computed in FP32, as by the other engines. Memory is taken as it is needed, not in powers of two.
_OPTIONS = {"use_tf32": "0", "arena_extend_strategy": "kSameAsRequested"}


class BoundSession:
    """A session that reads and writes float32 tensors at fixed addresses."""

    def __init__(self, session: Any, graph: Graph, image: int, logits: int, device: tuple[str, int]) -> None:
        """Bind.

        Args:
            session: ONNX Runtime's.
            graph: the manifest's entry, whose shapes the tensors have.
            image: address of the input.
            logits: address of the output.
            device: whose memory they lie in, as ONNX Runtime names it, and its number.
        """
        import onnxruntime

        self._session, self._graph = session, graph
        self._binding = session.io_binding()
        self._binding.bind_input(INPUT, *device, np.float32, graph.input_shape, image)
        self._binding.bind_output(OUTPUT, *device, np.float32, graph.output_shape, logits)
        self._options = onnxruntime.RunOptions()
        # The call returns when all is enqueued; up to ONNX Runtime 1.26 it waits all the same while its graph is on.
        self._options.add_run_config_entry("disable_synchronize_execution_providers", "1")

    def run(self) -> None:
        """Run, or on a GPU enqueue a run.

        Raises:
            UserError: ONNX Runtime refused it.
        """
        try:
            self._session.run_with_iobinding(self._binding, self._options)
        except ort_errors() as error:
            raise run_error(self._graph, error) from error


class OnnxRuntimeEngine:
    """A session on the CUDA provider as a ``DeviceEngine``.

    All its calls are made in one thread of its own: ONNX Runtime keeps a CUDA graph for each thread that runs it.
    """

    activation_bytes = 0  # it does not tell
    capturable = False

    def __init__(self, graph: Graph, stream: Stream, open_session: OpenSession) -> None:
        """Load and warm up; the device's context must be current.

        Args:
            graph: the manifest's entry.
            stream: the only one it will run on.
            open_session: what it runs; called a second time, without a CUDA graph, where one with it does not work.

        Raises:
            UserError: ONNX Runtime does not load or run it, or the GPU's memory is full.
        """
        import onnxruntime

        self._graph, self._stream = graph, stream
        self.logits_shape = graph.output_shape
        self._image = DeviceBuffer(stream.device, _FP32_BYTES * math.prod(graph.input_shape))
        self._logits = DeviceBuffer(stream.device, _FP32_BYTES * math.prod(graph.output_shape))
        self.image, self.logits = self._image.address, self._logits.address
        self._bound: BoundSession | None = None
        self._thread = ThreadPoolExecutor(1, "espmedsam-onnxruntime")
        self.title = f"{_TITLE} {onnxruntime.__version__}"
        try:
            self._load(open_session)
        except BaseException:
            self.close()
            raise

    def _load(self, open_session: OpenSession) -> None:
        options = {
            "device_id": str(self._stream.device.ordinal),
            "user_compute_stream": str(int(self._stream)),
        }
        try:
            self._thread.submit(self._warm_up, open_session, {**options, _GRAPH: "1"}).result()
        except UserError as error:  # whose traceback holds what was loaded: it must be gone before the second attempt
            if isinstance(error, BackendUnavailable) or (isinstance(error, CudaError) and error.lost):
                raise
            log.debug("ONNX Runtime's CUDA graph is left off: %s", error.message)
        else:
            self.title += ", its CUDA graph"
            return
        self._thread.submit(self._give_up).result()
        self._thread.submit(self._warm_up, open_session, options).result()

    def _give_up(self) -> None:
        """Of an attempt that failed: end a capture that it left on the stream, then free its memory."""
        self._stream.device.make_current()
        self._stream.end_capture()
        self._bound = None

    def _warm_up(self, open_session: OpenSession, options: Mapping[str, str]) -> None:
        device = self._stream.device
        device.make_current()
        self._bound = BoundSession(
            open_session(options), self._graph, self.image, self.logits, ("cuda", device.ordinal)
        )
        self._stream.fill(self.image, 0, self._image.size)
        for _ in range(_WARM_UP_RUNS):
            self._bound.run()
        self._stream.synchronize()

    def enqueue(self, stream: Stream) -> None:
        """See ``DeviceEngine.enqueue``; the stream is that of loading.

        Raises:
            CudaError: the GPU is lost.
            UserError: ONNX Runtime refused it; carries its reason.
        """
        assert stream is self._stream
        if self._bound is None:
            raise RuntimeError("the engine is closed")
        try:
            self._thread.submit(self._bound.run).result()
        except UserError:
            try:
                stream.check()
            except CudaError as error:
                if error.lost:
                    raise
            raise

    def close(self) -> None:
        """Free the session, in its thread; the device frees the buffers. A second call does nothing."""

        def free() -> None:
            self._bound = None

        if self._bound is not None:
            self._thread.submit(free).result()
        self._thread.shutdown()


def _why_not_started() -> str:
    """What is missing for the provider's library to load, in the system's words."""
    import onnxruntime

    try:
        ctypes.CDLL(str(Path(onnxruntime.__file__).with_name("capi") / _LIBRARY))
    except OSError as error:
        return str(error)
    return "it gave no reason"
