"""ONNX Runtime sessions: opened with one set of options, checked against a bundle's manifest, errors in one line."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from espmedsam_edge.bundle import Graph
from espmedsam_edge.errors import UserError
from espmedsam_edge.imaging.geometry import Tensor
from espmedsam_edge.machine.cores import usable_cores
from espmedsam_edge.machine.installation import installed

_CPU = "CPUExecutionProvider"
INPUT, OUTPUT = "image", "logits"
"""The names of every graph's input and output."""


def open_session(
    content: bytes,
    threads: int,
    *,
    providers: Sequence[str] = (),
    options: Mapping[str, str] | None = None,
    where: str | Path = "the graph",
) -> Any:
    """An ONNX Runtime session with this package's settings, on a graph that need not belong to a bundle.

    Args:
        content: the graph as ONNX, whole: it comes from memory, so that what runs is what was checked.
        threads: of the CPU.
        providers: ONNX Runtime's names of what takes as much of the graph as it can, where it starts; the CPU the rest.
        options: of the first of them.
        where: what messages call it.

    Raises:
        UserError: not a graph that ONNX Runtime can load.
    """
    import onnxruntime

    _prepare(onnxruntime, providers)
    settings = onnxruntime.SessionOptions()
    settings.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    settings.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    settings.intra_op_num_threads = threads
    settings.inter_op_num_threads = 1
    settings.log_severity_level = 4  # errors come as exceptions; its own lines on stderr would only repeat them
    # Waiting threads sleep: spinning ones are no faster on frames of this size, take an eighth more CPU, and slow a run
    # down by a fifth when decoding, encoding or other programs want the cores.
    settings.add_session_config_entry("session.intra_op.allow_spinning", "0")
    first, *others = dict.fromkeys((*providers, _CPU))
    try:
        # Without a provider that fails it would start again, and print that.
        session = onnxruntime.InferenceSession(
            content,
            settings,
            providers=[(first, dict(options or {})), *others],
            enable_fallback=0,
        )
    except ort_errors() as error:
        raise UserError(
            f"onnxruntime {onnxruntime.__version__} cannot load {where}: {_first_line(error)}",
            "Export the bundle again, or update onnxruntime.",
            exit_code=1,
        ) from error
    session._model_bytes = None  # kept for changing providers later, which nobody does: as much memory as the file
    return session


def _prepare(onnxruntime: Any, providers: Sequence[str]) -> None:
    """Have it report nothing, if it was imported before this package; find CUDA's libraries, where they are wanted."""
    onnxruntime.disable_telemetry_events()
    if "CUDAExecutionProvider" not in providers:
        return
    onnxruntime.set_default_logger_severity(4)  # of a provider that does not start, too, what is wrong is said once
    if hasattr(onnxruntime, "preload_dlls"):  # from 1.21 on
        onnxruntime.print = lambda *_: None  # it prints what it misses, which may be elsewhere
        try:
            onnxruntime.preload_dlls()  # those beside onnxruntime itself
            for libraries in _libraries_elsewhere(Path(onnxruntime.__file__).parents[1] / "nvidia"):
                onnxruntime.preload_dlls(directory=str(libraries))
        finally:
            del onnxruntime.print


def _libraries_elsewhere(beside: Path) -> list[Path]:
    """The folders of NVIDIA's packages in other places that Python looks in, such as the system's of an environment."""
    found = find_spec("nvidia")
    places = [] if found is None else [Path(place) for place in found.submodule_search_locations or []]
    return [folder for place in places if place != beside for folder in sorted(place.glob("*/lib"))]


Node = tuple[str, str, tuple[Any, ...]]
"""Name, type and shape of a graph's input or output, as ONNX Runtime has them."""


def check_signature(session: Any, graph: Graph, where: str | Path) -> None:
    """Compare a session's input and output (names, dtypes, shapes) with the manifest's entry.

    Raises:
        UserError: they differ; names the first difference.
    """
    inputs, outputs = (
        [(node.name, node.type, tuple(node.shape)) for node in nodes]
        for nodes in (session.get_inputs(), session.get_outputs())
    )
    check_nodes(inputs, outputs, graph, where)


def check_nodes(inputs: list[Node], outputs: list[Node], graph: Graph, where: str | Path) -> None:
    """Compare inputs and outputs with the manifest's entry.

    Raises:
        UserError: they differ; names the first difference.
    """
    for kind, actual, name, shape in (
        ("input", inputs, INPUT, graph.input_shape),
        ("output", outputs, OUTPUT, graph.output_shape),
    ):
        if actual != [(name, "tensor(float)", shape)]:
            raise UserError(
                f"{where} does not fit its manifest: its {kind} is {_describe(actual)}, "
                f"not {_describe([(name, 'tensor(float)', shape)])}.",
                "Export the bundle again.",
            )


def reference_logits(graph: Graph, content: bytes, image: Tensor) -> Tensor:
    """What ONNX Runtime computes on the CPU for one batch: what other ways to run a graph are compared with.

    Args:
        graph: the manifest's entry.
        content: the graph as ONNX.
        image: (B, 3, S, S) float32, normalised RGB planes.

    Returns:
        (B, 1, S/4, S/4) float32 logits.

    Raises:
        UserError: it is no graph that ONNX Runtime can run, or not the one the manifest describes.
    """
    session = open_session(content, usable_cores(), where=graph.file)
    check_signature(session, graph, graph.file)
    try:
        (logits,) = session.run([OUTPUT], {INPUT: image})
    except ort_errors() as error:
        raise run_error(graph, error) from error
    return np.asarray(logits, np.float32)


def run_error(graph: Graph, error: Exception) -> UserError:
    """The one line for a session that failed while it ran."""
    return UserError(
        f"onnxruntime failed on the {graph.modality} {graph.precision} graph: {_first_line(error)}",
        "If memory ran out, close other programs or export a smaller --image-size.",
        exit_code=1,
    )


def why_not_installed(package: str = "onnxruntime") -> str | None:
    """Why ONNX Runtime cannot be used, with the package that is wanted, or None; loads nothing."""
    if installed("onnxruntime"):
        return None
    return f"the package onnxruntime is not installed. Install it: {sys.executable} -m pip install {package}"


def available_providers() -> list[str]:
    """The names of what the installed ONNX Runtime can run on."""
    import onnxruntime

    return list(onnxruntime.get_available_providers())


def ort_errors() -> tuple[type[Exception], ...]:
    """ONNX Runtime's exception classes; they share no base class of their own."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    classes = [value for value in vars(state).values() if isinstance(value, type) and issubclass(value, Exception)]
    return (*classes, RuntimeError)


def _describe(nodes: list[Node]) -> str:
    return " and ".join(f"'{name}' {kind} {'x'.join(map(str, shape))}" for name, kind, shape in nodes) or "missing"


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__
