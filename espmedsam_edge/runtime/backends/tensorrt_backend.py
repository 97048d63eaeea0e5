"""Runs a graph with TensorRT or TensorRT-RTX, with preprocessing and postprocessing on the same GPU."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, cast

from espmedsam_edge.bundle import Bundle, Graph
from espmedsam_edge.errors import UserError
from espmedsam_edge.machine.environment import jetson
from espmedsam_edge.runtime.backends.backend import BackendUnavailable
from espmedsam_edge.runtime.cuda import driver as cuda_api
from espmedsam_edge.runtime.cuda.gpu import driver_installed, find_gpu
from espmedsam_edge.runtime.engines.tensorrt_api import TITLES, Flavour, how_to_install, installed
from espmedsam_edge.runtime.engines.tensorrt_api import load as load_tensorrt

if TYPE_CHECKING:
    from espmedsam_edge.runtime.backends.device_backend import DeviceBackend

log = logging.getLogger(__name__)


def unavailable(name: str) -> str | None:
    """Why ``name`` cannot run on this machine, or None; loads no library but the driver's."""
    flavour = cast(Flavour, name)
    if not driver_installed():
        return "there is no NVIDIA driver here. To use a GPU install it; in a container run it with --gpus all."
    if find_gpu() is None:
        return cuda_api.unavailable() or "the driver finds no GPU. Check nvidia-smi and CUDA_VISIBLE_DEVICES."
    if flavour == "tensorrt-rtx" and jetson() is not None:
        return how_to_install(flavour)
    if not installed(flavour):
        return f"{TITLES[flavour]} is not installed. {how_to_install(flavour)}"
    return cuda_api.unavailable()


def load(name: str, bundle: Bundle, graph: Graph, threads: int | None) -> DeviceBackend:
    """Load a graph's engine from the cache, or build it; ``threads`` is for other backends.

    Raises:
        UserError: see ``frame_memory``.
        BackendUnavailable: TensorRT, its engine or the kernels do not load here; says why and what to do.
    """
    # Whether there is a GPU is asked on machines without one, too, whose first result need not wait for all this.
    from espmedsam_edge.runtime.backends.device_backend import frame_memory, open_device_backend
    from espmedsam_edge.runtime.engines.cache import find_or_build
    from espmedsam_edge.runtime.engines.engine import TensorRtEngine

    flavour, memory = cast(Flavour, name), frame_memory()
    try:
        api = load_tensorrt(flavour)
        plan = find_or_build(bundle, graph, flavour=flavour, on_progress=_announced(graph, flavour))
        return open_device_backend(
            name, graph, lambda stream: TensorRtEngine(api, plan.read(), plan.path, graph, stream), memory
        )
    except BackendUnavailable:
        raise
    except UserError as error:
        raise BackendUnavailable(error.message, error.hint, exit_code=error.exit_code) from error


def _announced(graph: Graph, flavour: Flavour) -> Callable[[str, float], None]:
    """A progress callback that says once that a build is under way."""
    told: list[str] = []

    def on_progress(phase: str, fraction: float) -> None:
        if not told:
            told.append(phase)
            what = f"the {TITLES[flavour]} engine of {graph.modality} {graph.precision}"
            log.info("Building %s for this GPU, once; this takes minutes.", what)

    return on_progress
