"""Runs a graph with ONNX Runtime, on the CPU or through one of its providers; that of CUDA has a module of its own."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np

from espmedsam_edge.bundle import Bundle, Graph
from espmedsam_edge.errors import UserError, nearest
from espmedsam_edge.imaging.geometry import Tensor
from espmedsam_edge.machine.cores import usable_cores
from espmedsam_edge.runtime.backends.backend import Backend, BackendUnavailable, check_batch
from espmedsam_edge.runtime.backends.backend_spec import BackendSpec
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

_SUFFIX = "ExecutionProvider"
_CPU, _CUDA = f"CPU{_SUFFIX}", f"CUDA{_SUFFIX}"
_OTHER_NAMES = {"directml": "dml"}  # as people say


def unavailable(name: str) -> str | None:
    """Why ``name`` cannot run on this machine, or None."""
    return why_not_installed()


def load(name: str, bundle: Bundle, graph: Graph, threads: int | None) -> Backend:
    """Create a session for a graph and check it against the manifest; see ``BackendModule.load``.

    ``onnxruntime`` takes CUDA where it works, else the CPU; ``onnxruntime-cpu`` and a provider that is named after a
    colon insist.

    Raises:
        BackendUnavailable: the provider that was asked for is not in this ONNX Runtime, or does not start.
        UserError: it is not a graph ONNX Runtime can run, or not the one the manifest describes.
    """
    spec = BackendSpec.parse(name)
    threads = usable_cores() if threads is None else threads
    where = bundle.graph_path(graph)
    wanted = _provider(spec)
    if wanted == _CUDA:
        from espmedsam_edge.runtime.backends import onnxruntime_cuda_backend  # which imports this module

        reason = onnxruntime_cuda_backend.unavailable(name)
        try:
            if reason is not None:
                raise BackendUnavailable(f"onnxruntime's CUDA provider cannot run here: {reason}", exit_code=1)
            return onnxruntime_cuda_backend.load(str(spec), bundle, graph, threads)
        except BackendUnavailable as error:
            if spec.provider:
                raise
            log.log(logging.WARNING if reason is None else logging.DEBUG, "onnxruntime goes on with the CPU: %s", error)
        wanted = _CPU
    content = bundle.read_graph(graph)
    try:
        session = open_session(content, threads, providers=[wanted], where=where)
    except UserError as error:
        if wanted == _CPU:
            raise
        hint = "Its libraries or its device are missing, or it does not take this graph."
        raise BackendUnavailable(
            f"onnxruntime's {_short(wanted)} provider: {error.message}", hint, exit_code=1
        ) from error
    if wanted not in session.get_providers():
        raise BackendUnavailable(
            f"onnxruntime's {_short(wanted)} provider did not start.",
            "Its libraries or its device are missing.",
            exit_code=1,
        )
    check_signature(session, graph, where)
    if wanted != _CPU:
        return OnnxRuntimeBackend(str(spec), _short(wanted), graph, session)
    if graph.precision != "fp32":
        has_fp32 = any((g.modality, g.precision) == (graph.modality, "fp32") for g in bundle.manifest.graphs)
        log.info(
            "On a processor ONNX Runtime takes longer for %s graphs than for fp32.%s",
            graph.precision,
            " Use --precision fp32 here." if has_fp32 else "",
        )
    return OnnxRuntimeBackend(str(spec), f"CPU, {threads} thread{'s' if threads > 1 else ''}", graph, session)


def _provider(spec: BackendSpec) -> str:
    """ONNX Runtime's name of the provider that is meant.

    Raises:
        BackendUnavailable: one was named that this ONNX Runtime does not have.
    """
    there = available_providers()
    if not spec.provider:
        return _CUDA if spec.name == "onnxruntime" and _CUDA in there else _CPU
    asked = _short(spec.provider).lower()
    asked = _OTHER_NAMES.get(asked, asked)
    known = {_short(provider).lower(): provider for provider in there}
    if asked not in known:
        raise BackendUnavailable(
            f"this onnxruntime has no provider {spec.provider}.", nearest(asked, known), exit_code=1
        )
    return known[asked]


def _short(provider: str) -> str:
    return provider[: -len(_SUFFIX)] if provider.lower().endswith(_SUFFIX.lower()) else provider


class OnnxRuntimeBackend:
    """A graph in an ONNX Runtime session, reading and writing NumPy memory in place (IO binding)."""

    def __init__(self, name: str, device: str, graph: Graph, session: Any) -> None:
        self.name = name
        self.device = device
        self.graph = graph
        self._session = session
        self._binding = session.io_binding()

    def run(self, image: Tensor) -> Tensor:
        check_batch(self.graph, image)
        logits = np.empty(self.graph.output_shape, np.float32)
        self._binding.bind_cpu_input(INPUT, image)
        self._binding.bind_output(OUTPUT, "cpu", 0, np.float32, logits.shape, logits.ctypes.data)
        try:
            self._session.run_with_iobinding(self._binding)
        except ort_errors() as error:
            raise run_error(self.graph, error) from error
        finally:
            self._binding.clear_binding_inputs()
            self._binding.clear_binding_outputs()
        return logits

    def close(self) -> None:
        self._session = self._binding = None
