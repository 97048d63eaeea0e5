"""What runs a graph: the protocol every backend fulfils, their registry, and the choice among them."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Protocol, runtime_checkable

import numpy as np

from espmedsam_edge.bundle import Bundle, Graph, Normalization
from espmedsam_edge.errors import UserError, nearest
from espmedsam_edge.imaging.geometry import Frame, Tensor
from espmedsam_edge.imaging.overlay import OverlayStyle
from espmedsam_edge.machine.cores import check_threads
from espmedsam_edge.runtime.backends.backend_spec import BackendSpec
from espmedsam_edge.runtime.kernels.frame_view import FrameView
from espmedsam_edge.runtime.segmentation import Segmentation

log = logging.getLogger(__name__)


class DlpackFrame(Protocol):
    """A frame that another library holds, offered through DLPack (torch, CuPy)."""

    def __dlpack__(self, *, stream: Any = ...) -> Any:
        """The array's capsule."""

    def __dlpack_device__(self) -> Any:
        """The kind of device and its number."""


class CudaArrayFrame(Protocol):
    """A frame that another library holds on a GPU, offered by address (PyCUDA, Numba)."""

    @property
    def __cuda_array_interface__(self) -> Any:
        """Address, shape, strides and type."""


AnyFrame = Frame | FrameView | DlpackFrame | CudaArrayFrame
"""(H, W, 3) uint8 BGR in the host's memory; or on a GPU, where grey ones, and as ``FrameView`` NV12, are taken too."""


class Backend(Protocol):
    """A loaded graph. Used by one thread at a time (the segmenter sees to it), not always the one that loaded it."""

    @property
    def name(self) -> str:
        """The registry's name, such as ``onnxruntime``."""

    @property
    def device(self) -> str:
        """Where it runs, for reports: ``CPU, 4 threads``."""

    @property
    def graph(self) -> Graph:
        """The manifest's entry of the graph: modality, precision, shapes."""

    def run(self, image: Tensor) -> Tensor:
        """The network's output for one batch.

        Args:
            image: (B, 3, S, S) float32, C-contiguous, normalised RGB planes; not written to.

        Returns:
            (B, 1, S/4, S/4) float32 logits, a new array that the caller owns.

        Raises:
            UserError: the machine failed (memory, device); the backend is not usable any more.
        """

    def close(self) -> None:
        """Free the graph; a second call does nothing."""


def check_batch(graph: Graph, image: Tensor) -> None:
    """Refuse what no graph's input is, in ``Backend.run``.

    Raises:
        ValueError: another shape or type than the graph's, or not C-contiguous.
    """
    if image.shape != graph.input_shape or image.dtype != np.float32 or not image.flags.c_contiguous:
        raise ValueError(f"run wants C-contiguous float32 {graph.input_shape}, not {image.dtype} {image.shape}")


def check_process(loaded_by: int, runtime: str) -> None:
    """Refuse to run a network whose threads stayed in another process: to wait for them would be for ever.

    Args:
        loaded_by: the number of the process that loaded it.
        runtime: what runs it, for people.

    Raises:
        UserError: this process was split off from that one.
    """
    if os.getpid() != loaded_by:
        raise UserError(
            f"this process was split off (fork) after the network was loaded with {runtime}.",
            "Load it in the process that uses it, or start processes with 'spawn'.",
            exit_code=1,
        )


@runtime_checkable
class ReducingBackend(Backend, Protocol):
    """A backend that can compute a graph's float32 tensors in less."""

    @property
    def arithmetic(self) -> str:
        """What it computes them in: "fp32", "bf16", "fp16", or "graph" for each tensor as the graph has it."""


class StartedRun(Protocol):
    """A run of the network that was handed to a backend and is on its way."""

    def logits(self) -> Tensor:
        """Wait for it: what ``Backend.run`` gives; a second call gives the same.

        Raises:
            UserError: the machine failed.
        """


@runtime_checkable
class OverlappingBackend(Backend, Protocol):
    """A backend of the network alone that computes while its caller prepares and finishes other frames."""

    @property
    def in_flight(self) -> int:
        """How many runs may be under way; one more waits for the oldest."""

    def start(self, image: Tensor) -> StartedRun:
        """As ``run``, without waiting; the image stays as it is until the logits were asked for."""


@dataclass(frozen=True)
class FrameOptions:
    """What a backend that takes whole frames must know of them.

    Attributes:
        normalization: the network input's.
        threshold: the probability (between 0 and 1) from which a pixel is foreground.
        overlay: how to draw the mask on each frame; None: do not.
    """

    normalization: Normalization
    threshold: float
    overlay: OverlayStyle | None = None


@dataclass(frozen=True)
class DeviceUse:
    """Bytes of the GPU's memory.

    Attributes:
        loaded: what disappeared from the free memory while the engine was loaded: context, weights, activations.
        activations: what the engine needs to run, part of ``loaded``.
        buffers: frames, masks, the network's input and output.
        free: of the GPU now.
        total: of the GPU.
    """

    loaded: int
    activations: int
    buffers: int
    free: int
    total: int

    def __str__(self) -> str:
        return (
            f"{self.loaded / 1e6:.0f} MB for the engine, {self.buffers / 1e6:.0f} MB for frames; "
            f"{self.free / 1e9:.1f} of {self.total / 1e9:.1f} GB free"
        )


class Started(Protocol):
    """Frames that were handed to a backend and are on their way."""

    def results(self) -> list[Segmentation]:
        """Wait for them: one result a frame, in order; a second call gives the same.

        Raises:
            UserError: the machine failed, or a frame could not be taken.
        """


@runtime_checkable
class FrameBackend(Backend, Protocol):
    """A backend that does preprocessing and postprocessing as well, where the network runs."""

    def segment_frames(self, frames: Sequence[AnyFrame], options: FrameOptions) -> list[Segmentation]:
        """Segment at most a batch of frames of any sizes.

        Raises:
            DoesNotFit: the device has no room for them; others may still come.
            UserError: a frame it cannot take, or the machine failed.
        """

    @property
    def in_flight(self) -> int:
        """How many groups of ``start_frames`` overlap; one more waits for the oldest."""

    def start_frames(self, frames: Sequence[AnyFrame], options: FrameOptions) -> Started:
        """As ``segment_frames``, without waiting: copies and computing of several groups overlap, in their order.

        The frames stay as they are until the results were asked for.

        Raises:
            DoesNotFit: as for ``segment_frames``.
            UserError: a frame it cannot take, or the machine failed.
        """

    def stage_seconds(self, frames: Sequence[AnyFrame], options: FrameOptions) -> dict[str, float]:
        """Seconds on the device of each stage of one such run, by the device's own clock; for measuring only."""

    def device_use(self) -> DeviceUse:
        """The device's memory that it takes, and what is left."""


class BackendModule(Protocol):
    """What a module named in ``BACKENDS`` provides."""

    def unavailable(self, name: str) -> str | None:
        """Why this backend cannot run on this machine, with the remedy, as one sentence; None if it can."""

    def load(self, name: str, bundle: Bundle, graph: Graph, threads: int | None) -> Backend:
        """Load a graph of a bundle.

        Raises:
            BackendUnavailable: cannot run this graph on this machine.
            UserError: the graph is not what its manifest says.
        """


class BackendUnavailable(UserError):
    """This backend cannot run here: the choice "auto" goes on to the next one, a backend asked for by name fails."""


class BackendAway(BackendUnavailable):
    """What runs the network elsewhere is out of reach; it may come back, and the backend can be asked again."""


BACKENDS: dict[str, str] = {
    "tensorrt": "espmedsam_edge.runtime.backends.tensorrt_backend",
    "tensorrt-rtx": "espmedsam_edge.runtime.backends.tensorrt_backend",
    "onnxruntime": "espmedsam_edge.runtime.backends.onnxruntime_backend",
    "onnxruntime-cuda": "espmedsam_edge.runtime.backends.onnxruntime_cuda_backend",
    "onnxruntime-cpu": "espmedsam_edge.runtime.backends.onnxruntime_backend",
    "openvino": "espmedsam_edge.runtime.backends.openvino_backend",
    "inductor": "espmedsam_edge.runtime.backends.inductor_backend",
    "triton": "espmedsam_edge.runtime.backends.triton_backend",
}
"""Backend name -> the module that provides it, imported when it is tried."""

AUTO: tuple[str, ...] = ("tensorrt", "tensorrt-rtx", "onnxruntime")
"""What ``load_backend`` tries for "auto", best first; ``auto.fastest`` chooses among more."""


@dataclass(frozen=True)
class Candidate:
    """A graph and a backend (as ``load_backend`` takes it) that "auto" may take, and why it would, as a clause."""

    graph: Graph
    backend: str
    why: str = ""


@dataclass(frozen=True)
class Choice:
    """A loaded backend, why those before it were not taken (one sentence each), and why this one was (a clause)."""

    backend: Backend
    passed_over: tuple[str, ...] = ()
    why: str = ""

    @property
    def taken(self) -> str:
        """For people: ``onnxruntime (CPU, 4 threads)``."""
        return f"{self.backend.name} ({self.backend.device})"

    def tell(self) -> None:
        """Log what was taken, and why nothing better, a line each."""
        log.info("Running on %s%s.", self.taken, f": {self.why}" if self.why else "")
        for reason in self.passed_over:
            log.info("%s", reason)

    def __str__(self) -> str:
        return "; ".join((self.taken, *self.passed_over))


def unavailable(name: str) -> str | None:
    """Why the backend ``name`` cannot run on this machine, or None if it can; loads no graph."""
    return _module(name).unavailable(name)


def check_known(name: str) -> None:
    """See that a name is "auto" or of ``BACKENDS``, whatever words follow it; whether it can run here is not asked.

    Raises:
        UserError: it is none; names the nearest.
    """
    spec = BackendSpec.parse(name)
    if name != "auto" and spec.name not in BACKENDS:
        raise UserError(f"unknown backend '{name}'.", nearest(spec.name, ["auto", *BACKENDS]))


def load_backend(bundle: Bundle, graph: Graph, name: str = "auto", threads: int | None = None) -> Choice:
    """Load a graph on a backend.

    Args:
        bundle: where the graph's file is.
        graph: one of its graphs.
        name: a key of ``BACKENDS``, with the words after colons that ``BackendSpec`` knows, or "auto" for the first of
            ``AUTO`` that can run it here.
        threads: CPU threads for backends that compute on the CPU; None: the physical cores the process may use.

    Raises:
        UserError: unknown name, a graph that does not fit its manifest, or no backend that can run it here.
    """
    check_known(name)
    check_threads(threads)
    if name != "auto":
        reason = unavailable(name)
        if reason is not None:
            raise BackendUnavailable(f"backend {name} cannot run here: {reason}", exit_code=1)
        return _chosen(Choice(_module(name).load(name, bundle, graph, threads)))
    return load_first(bundle, [Candidate(graph, candidate) for candidate in AUTO], threads)


def load_first(bundle: Bundle, candidates: Sequence[Candidate], threads: int | None = None) -> Choice:
    """Load the first of some candidates that can run here.

    Args:
        bundle: where their graphs are.
        candidates: best first; at least one.
        threads: as ``load_backend``.

    Raises:
        UserError: a graph that does not fit its manifest, or none can run here.
    """
    check_threads(threads)
    reasons: dict[str, list[str]] = {}  # reason -> the backends that have it
    for candidate in candidates:
        reason = unavailable(candidate.backend)
        if reason is None:
            try:
                backend = _module(candidate.backend).load(candidate.backend, bundle, candidate.graph, threads)
                return _chosen(Choice(backend, _sentences(reasons), candidate.why))
            except BackendUnavailable as error:
                reason = str(error)
        reasons.setdefault(reason, []).append(candidate.backend)
    raise UserError(
        f"no backend can run {bundle.graph_path(candidates[-1].graph)} here: {'; '.join(_sentences(reasons))}",
        "See what is missing: espmedsam-edge doctor",
        exit_code=1,
    )


def _chosen(choice: Choice) -> Choice:
    graph = choice.backend.graph
    log.debug("%s %s is loaded on %s", graph.modality, graph.precision, choice)
    return choice


def _sentences(reasons: dict[str, list[str]]) -> tuple[str, ...]:
    return tuple(f"not {' or '.join(names)}: {reason}" for reason, names in reasons.items())


def _module(name: str) -> BackendModule:
    module: BackendModule = import_module(BACKENDS[BackendSpec.parse(name).name])
    return module
