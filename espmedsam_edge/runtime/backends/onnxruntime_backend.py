"""Runs a graph with ONNX Runtime, on the CPU or through its CUDA provider."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import numpy as np

from espmedsam_edge.bundle import Bundle, Graph
from espmedsam_edge.imaging.geometry import Tensor
from espmedsam_edge.machine.cores import usable_cores
from espmedsam_edge.runtime.backends.backend import BackendUnavailable
from espmedsam_edge.runtime.onnx_session import (
    INPUT,
    OUTPUT,
    available_providers,
    check_signature,
    open_session,
    ort_errors,
    run_error,
)


def unavailable(name: str) -> str | None:
    """Why ``name`` cannot run on this machine, or None."""
    if find_spec("onnxruntime") is None:
        return "the package onnxruntime is not installed. Install it: pip install onnxruntime"
    if name == "onnxruntime-cuda" and "CUDAExecutionProvider" not in available_providers():
        return "this onnxruntime has no CUDA provider. Install onnxruntime-gpu in place of onnxruntime."
    return None


def load(name: str, bundle: Bundle, graph: Graph, threads: int | None) -> OnnxRuntimeBackend:
    """Create a session for a graph and check it against the manifest; see ``BackendModule.load``.

    ``onnxruntime`` takes CUDA where it works, else the CPU; ``onnxruntime-cuda`` and ``onnxruntime-cpu`` insist.

    Raises:
        BackendUnavailable: CUDA was asked for and its provider does not start.
        UserError: it is not a graph ONNX Runtime can run, or not the one the manifest describes.
    """
    threads = usable_cores() if threads is None else threads
    cuda = name != "onnxruntime-cpu" and "CUDAExecutionProvider" in available_providers()
    where = bundle.graph_path(graph)
    session = open_session(bundle.read_graph(graph), threads, cuda=cuda, where=where)
    on_cuda = "CUDAExecutionProvider" in session.get_providers()
    if name == "onnxruntime-cuda" and not on_cuda:
        raise BackendUnavailable(
            "onnxruntime's CUDA provider did not start.",
            "Its CUDA or cuDNN libraries are missing; see: espmedsam-edge doctor",
            exit_code=1,
        )
    check_signature(session, graph, where)
    device = "CUDA" if on_cuda else f"CPU, {threads} thread{'s' if threads > 1 else ''}"
    return OnnxRuntimeBackend(name, device, graph, session)


class OnnxRuntimeBackend:
    """A graph in an ONNX Runtime session, reading and writing NumPy memory in place (IO binding)."""

    def __init__(self, name: str, device: str, graph: Graph, session: Any) -> None:
        self.name = name
        self.device = device
        self.graph = graph
        self._session = session
        self._binding = session.io_binding()

    def run(self, image: Tensor) -> Tensor:
        """See ``Backend.run``."""
        if image.shape != self.graph.input_shape or image.dtype != np.float32 or not image.flags.c_contiguous:
            raise ValueError(
                f"run wants C-contiguous float32 {self.graph.input_shape}, not {image.dtype} {image.shape}"
            )
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
        """See ``Backend.close``."""
        self._session = self._binding = None
