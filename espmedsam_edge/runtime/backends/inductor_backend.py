"""Runs a graph as torch's Inductor compiles it on this machine: on the processor, or on an NVIDIA GPU.

torch is imported when a network is loaded, and by the room ``runtime.inductor`` alone.
"""

from __future__ import annotations

import logging
import os
import sys
from importlib import import_module
from typing import Any, cast

from espmedsam_edge.bundle import Bundle, Graph
from espmedsam_edge.errors import UserError, nearest
from espmedsam_edge.imaging.geometry import Tensor
from espmedsam_edge.machine.cores import usable_cores
from espmedsam_edge.runtime.backends.backend import Backend, BackendUnavailable, check_batch, check_process
from espmedsam_edge.runtime.backends.backend_spec import BackendSpec
from espmedsam_edge.runtime.backends.device_backend import frame_memory, open_device_backend
from espmedsam_edge.runtime.cuda import driver as cuda_api
from espmedsam_edge.runtime.engines.child import OnProgress
from espmedsam_edge.runtime.inductor.building import (
    Arithmetic,
    Device,
    find_or_build,
    is_built,
    why_no_cuda,
    why_no_torch,
)

log = logging.getLogger(__name__)

_DEVICES = ("cpu", "cuda")
_WAIT_POLICY = "OMP_WAIT_POLICY"


def unavailable(name: str) -> str | None:
    """Why ``name`` cannot run on this machine, or None; imports no torch."""
    reason = why_no_torch()
    if reason is None and device_of(BackendSpec.parse(name)) == "cuda":
        return why_no_cuda() or cuda_api.unavailable()
    return reason


def device_of(spec: BackendSpec) -> Device:
    """What is meant: the device that is named, else a GPU where torch can use one.

    Raises:
        UserError: another word.
    """
    named = spec.device.lower()
    if named and named not in _DEVICES:
        raise UserError(f"backend inductor knows no device '{spec.device}'.", nearest(named, _DEVICES))
    return cast(Device, named) if named else "cpu" if why_no_cuda() is not None else "cuda"


def arithmetic_of(spec: BackendSpec, graph: Graph) -> Arithmetic:
    """What a graph is computed in: as asked for, else as it is."""
    asked = spec.arithmetic or "graph"
    return cast(Arithmetic, "fp32" if (asked, graph.precision) == ("graph", "fp32") else asked)


def built_here(name: str, graph: Graph) -> bool:
    """Whether a graph was compiled for this machine: "auto" takes it only then, since it never waits for a compiler."""
    spec = BackendSpec.parse(name)
    return is_built(graph, device_of(spec), arithmetic_of(spec, graph))


def load(name: str, bundle: Bundle, graph: Graph, threads: int | None) -> Backend:
    """Load a graph's compiled network from the cache, or compile it; see ``BackendModule.load``.

    Args:
        name: ``inductor``, which may name a device and an arithmetic; without them a GPU where torch has one, else the
            processor, and each tensor as the graph has it.
        threads: of the processor.

    Raises:
        BackendUnavailable: it cannot be compiled, or does not load here; says why and what to do.
    """
    spec = BackendSpec.parse(name)
    device, arithmetic = device_of(spec), arithmetic_of(spec, graph)
    try:
        built = find_or_build(bundle, graph, device, arithmetic, on_progress=_announced(graph, device))
        _import_torch()
        if device == "cuda":
            from espmedsam_edge.runtime.inductor.device_engine import InductorEngine

            return open_device_backend(
                str(spec),
                graph,
                lambda stream: InductorEngine(built.content, graph, arithmetic, stream),
                frame_memory(),
            )
        return InductorBackend(str(spec), built.content, graph, arithmetic, threads or usable_cores())
    except BackendUnavailable:
        raise
    except UserError as error:
        raise BackendUnavailable(error.message, error.hint, exit_code=error.exit_code) from error
    except (ImportError, OSError) as error:  # of a wheel that lacks a library, or of another system
        raise BackendUnavailable(
            f"torch is installed and cannot be loaded: {str(error)[:300]}", "Install it again.", exit_code=1
        ) from error


def _announced(graph: Graph, device: Device) -> OnProgress:
    """A progress callback that says once that a build is under way."""
    told: list[str] = []

    def on_progress(phase: str, fraction: float) -> None:
        if not told:
            told.append(phase)
            what, where = f"{graph.modality} {graph.precision}", "GPU" if device == "cuda" else "processor"
            log.info("Compiling %s with torch's Inductor for this %s, once; this takes a minute or more.", what, where)

    return on_progress


def _import_torch() -> None:
    """Import torch so that its threads sleep while they wait for each other, unless $OMP_WAIT_POLICY says otherwise.

    OpenMP reads that once. Threads that spin take the cores from decoding and other programs, and where those want the
    cores a small network takes ten times as long.
    """
    chosen = "torch" in sys.modules or _WAIT_POLICY in os.environ
    if not chosen:
        os.environ[_WAIT_POLICY] = "PASSIVE"
    try:
        import_module("espmedsam_edge.runtime.inductor.package")
    finally:
        if not chosen:
            del os.environ[_WAIT_POLICY]


class InductorBackend:
    """A compiled network on the processor, on NumPy memory in place. Other threads go on while it runs."""

    def __init__(self, name: str, content: bytes, graph: Graph, arithmetic: Arithmetic, threads: int) -> None:
        from espmedsam_edge.runtime.inductor.package import load_package

        self.name, self.graph = name, graph
        self.arithmetic = arithmetic
        self.device = f"CPU, {threads} thread{'s' if threads > 1 else ''}, {arithmetic} arithmetic"
        self._threads, self._process = threads, os.getpid()
        self._package: Any = load_package(content, graph, "cpu")
        self._package.warm()

    def run(self, image: Tensor) -> Tensor:
        check_batch(self.graph, image)
        check_process(self._process, "torch")
        return cast(Tensor, self._package.run_on_host(image, self._threads))

    def close(self) -> None:
        self._package.close()
