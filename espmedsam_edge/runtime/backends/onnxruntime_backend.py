"""Runs a graph with ONNX Runtime, on the CPU or through its CUDA provider."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from espmedsam_edge.bundle import Bundle, Graph
from espmedsam_edge.errors import UserError
from espmedsam_edge.imaging.geometry import Tensor
from espmedsam_edge.machine.cores import usable_cores
from espmedsam_edge.runtime.backends.backend import BackendUnavailable, Say, silent

_INPUT, _OUTPUT = "image", "logits"


def unavailable(name: str) -> str | None:
    """Why ``name`` cannot run on this machine, or None."""
    if find_spec("onnxruntime") is None:
        return "the package onnxruntime is not installed. Install it: pip install onnxruntime"
    if name == "onnxruntime-cuda" and "CUDAExecutionProvider" not in _providers():
        return "this onnxruntime has no CUDA provider. Install onnxruntime-gpu in place of onnxruntime."
    return None


def load(name: str, bundle: Bundle, graph: Graph, threads: int | None, say: Say = silent) -> OnnxRuntimeBackend:
    """See ``BackendModule.load``; ``load_file`` says more."""
    return load_file(name, graph, bundle.graph_path(graph), threads)


def load_file(name: str, graph: Graph, file: Path, threads: int | None) -> OnnxRuntimeBackend:
    """Create a session for a graph's file and check it against the manifest.

    ``onnxruntime`` takes CUDA where it works, else the CPU; ``onnxruntime-cuda`` and ``onnxruntime-cpu`` insist.

    Raises:
        BackendUnavailable: CUDA was asked for and its provider does not start.
        UserError: the file is not a graph ONNX Runtime can run, or not the one the manifest describes.
    """
    threads = usable_cores() if threads is None else threads
    cuda = name != "onnxruntime-cpu" and "CUDAExecutionProvider" in _providers()
    session = open_session(file, threads, cuda=cuda)
    on_cuda = "CUDAExecutionProvider" in session.get_providers()
    if name == "onnxruntime-cuda" and not on_cuda:
        raise BackendUnavailable(
            "onnxruntime's CUDA provider did not start.",
            "Its CUDA or cuDNN libraries are missing; see: espmedsam-edge doctor",
            exit_code=1,
        )
    check_signature(session, graph, file)
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
        self._binding.bind_cpu_input(_INPUT, image)
        self._binding.bind_output(_OUTPUT, "cpu", 0, np.float32, logits.shape, logits.ctypes.data)
        try:
            self._session.run_with_iobinding(self._binding)
        except _ort_errors() as error:
            raise UserError(
                f"onnxruntime failed on the {self.graph.modality} {self.graph.precision} graph: {_first_line(error)}",
                "If memory ran out, close other programs or export a smaller --image-size.",
                exit_code=1,
            ) from error
        finally:
            self._binding.clear_binding_inputs()
            self._binding.clear_binding_outputs()
        return logits

    def close(self) -> None:
        """See ``Backend.close``."""
        self._session = self._binding = None


def check_signature(session: Any, graph: Graph, file: Path) -> None:
    """Compare a session's input and output (names, dtypes, shapes) with the manifest's entry.

    Raises:
        UserError: they differ; names the first difference.
    """
    for kind, found, name, shape in (
        ("input", session.get_inputs(), _INPUT, graph.input_shape),
        ("output", session.get_outputs(), _OUTPUT, graph.output_shape),
    ):
        actual = [(node.name, node.type, tuple(node.shape)) for node in found]
        if actual != [(name, "tensor(float)", shape)]:
            raise UserError(
                f"{file} does not fit its manifest: its {kind} is {_describe(actual)}, "
                f"not {_describe([(name, 'tensor(float)', shape)])}.",
                "Export the bundle again.",
            )


def _describe(nodes: list[tuple[str, str, tuple[Any, ...]]]) -> str:
    return " and ".join(f"'{name}' {kind} {'x'.join(map(str, shape))}" for name, kind, shape in nodes) or "missing"


def open_session(file: Path, threads: int, *, cuda: bool) -> Any:
    """An ONNX Runtime session with this backend's settings, on a file that need not belong to a bundle.

    Raises:
        UserError: not a graph that ONNX Runtime can load.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 4  # errors come as exceptions; its own lines on stderr would only repeat them
    # Waiting threads sleep: spinning ones are no faster on frames of this size, take an eighth more CPU, and slow a run
    # down by a fifth when decoding, encoding or other programs want the cores.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    providers = ["CUDAExecutionProvider"] if cuda else []
    try:
        return onnxruntime.InferenceSession(str(file), options, providers=[*providers, "CPUExecutionProvider"])
    except _ort_errors() as error:
        raise UserError(
            f"onnxruntime {onnxruntime.__version__} cannot load {file}: {_first_line(error)}",
            "Export the bundle again, or update onnxruntime.",
            exit_code=1,
        ) from error


def _providers() -> list[str]:
    import onnxruntime

    return list(onnxruntime.get_available_providers())


def _ort_errors() -> tuple[type[Exception], ...]:
    """ONNX Runtime's exception classes; they share no base class of their own."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    classes = [value for value in vars(state).values() if isinstance(value, type) and issubclass(value, Exception)]
    return (*classes, RuntimeError)


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__
