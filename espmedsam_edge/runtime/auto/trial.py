"""Tries what may run a modality here, on processor or GPU: each in a process of its own, in turn with the reference.

A candidate that crashes, hangs or is refused is a line in the result and never the end of the trial.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import queue
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from numpy.typing import NDArray

from espmedsam_edge.bundle import Bundle, Graph, Manifest
from espmedsam_edge.errors import UserError
from espmedsam_edge.files import temporary_file
from espmedsam_edge.imaging.geometry import logit, preprocess
from espmedsam_edge.machine.children import close_pipes, end_child, how_it_died, start_child
from espmedsam_edge.metrics import dice
from espmedsam_edge.phantoms import phantom
from espmedsam_edge.runtime.auto.fastest import IF_BUILT, ON_GPU, REFERENCE, built_here, graphs_of, on_gpu, why_not
from espmedsam_edge.runtime.auto.kept_trials import Trial, Tried, depends_on
from espmedsam_edge.runtime.backends.backend import load_backend, unavailable

Mask = NDArray[np.bool_]

REFERENCE_CPU = f"{REFERENCE}-cpu"
_OTHERS = ("openvino", "openvino:bf16")

_LOADING_S = 120.0  # the slowest boards compile for a minute
_BUILDING_S = 1800.0  # an engine for a GPU, on a Jetson
_RUN_S = 60.0
_ROUNDS, _SECONDS = 3, 1.0  # of a candidate in turn with the reference: at least, both
_MODULE = "espmedsam_edge.runtime.auto.trial"


def try_backends(
    bundle: Bundle,
    modality: str | None = None,
    precision: str | None = None,
    threads: int | None = None,
    on_candidate: Callable[[str], None] = lambda title: None,
) -> tuple[Trial, list[str]]:
    """Time everything that "auto" may take here, and compare its mask with ONNX Runtime's.

    Args:
        bundle, modality, precision, threads: as ``load_fastest`` takes them.
        on_candidate: called with the title of each before it is tried.

    Returns:
        What was found, and why others were not tried, a sentence each.

    Raises:
        UserError: no such graph, or ONNX Runtime does not run it.
    """
    graph, only = bundle.graph(modality, precision), precision is not None
    passed_over: list[str] = []
    candidates: list[tuple[Graph, str]] = []
    for other in graphs_of(bundle, graph, only):
        for backend in dict.fromkeys((REFERENCE_CPU, *_OTHERS, *on_gpu(), *_built(other))):
            if (other, backend) == (graph, REFERENCE_CPU):
                continue
            reason = unavailable(backend) or why_not(bundle, other, backend, only)
            if reason is None:
                candidates.append((other, backend))
            elif reason:
                passed_over.append(f"not {title_of(other, backend)}: {reason}")
    with _child(bundle, graph, REFERENCE_CPU, threads) as reference:
        try:
            reference.load()
            masks = {graph.sha256: reference.mask()}
        except _FailedError as error:
            raise UserError(f"onnxruntime does not run {bundle.graph_path(graph)}: {error}", exit_code=1) from error
        times: list[float] = []
        tried = []
        for other, backend in candidates:
            on_candidate(title_of(other, backend))
            tried.append(_try(bundle, other, backend, threads, reference, masks, times))
        while len(times) < _ROUNDS:
            times.append(reference.run())
    trial = Trial(
        made_of=depends_on(graph, threads),
        date=datetime.date.today().isoformat(),
        milliseconds=1000 * statistics.median(times),
        tried=tried,
    )
    return trial, passed_over


def _built(graph: Graph) -> list[str]:
    return [name for name in IF_BUILT if built_here(name, graph)]


def title_of(graph: Graph, backend: str) -> str:
    """``int8 on openvino:bf16``."""
    return f"{graph.precision} on {backend}"


def _try(
    bundle: Bundle,
    graph: Graph,
    backend: str,
    threads: int | None,
    reference: _Child,
    masks: dict[str, Mask],
    times: list[float],
) -> Tried:
    """Time one candidate in turn with the reference, and compare its mask with ONNX Runtime's.

    The reference's times are added to ``times``, and ONNX Runtime's mask of the graph to ``masks`` if it is not there.
    """
    try:
        if graph.sha256 not in masks:
            with _child(bundle, graph, REFERENCE_CPU, threads) as other:
                other.load()
                masks[graph.sha256] = other.mask()
        with _child(bundle, graph, backend, threads) as child:
            child.load()
            alike = dice(child.mask(), masks[graph.sha256])
            own: list[float] = []
            first = len(times)
            while len(own) < _ROUNDS or sum(own) < _SECONDS:
                times.append(reference.run())
                own.append(child.run())
        ratio = statistics.median(one / other for one, other in zip(own, times[first:], strict=True))
        return Tried(precision=graph.precision, graph_sha256=graph.sha256, backend=backend, ratio=ratio, dice=alike)
    except _FailedError as error:
        return Tried(precision=graph.precision, graph_sha256=graph.sha256, backend=backend, failed=str(error))


class _FailedError(Exception):
    """A child that crashed, hung or refused; says how in one line."""


class _Child:
    """A process that runs one graph on one backend, one run for each line that it is sent."""

    def __init__(self, process: subprocess.Popen[bytes], stderr: Any, request: dict[str, Any]) -> None:
        self._process, self._stderr, self._request = process, stderr, request
        self._side = Graph.model_validate(request["graph"]).output_shape[-1]
        self._lines: queue.Queue[bytes] = queue.Queue()
        threading.Thread(target=self._read, name="espmedsam-trial", daemon=True).start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        with contextlib.suppress(ValueError):  # closed at the end
            for line in self._process.stdout:
                self._lines.put(line)
        self._lines.put(b"")

    def load(self) -> None:
        """Load the graph."""
        self._ask(self._request, _BUILDING_S if self._request["backend"] in ON_GPU else _LOADING_S)

    def run(self) -> float:
        """Seconds of one run."""
        return float(self._ask("run", _RUN_S)["seconds"])

    def mask(self) -> Mask:
        """(B * S/4, S/4) bool: masks of a generated picture, the batch's under each other; after a run to warm up."""
        self.run()
        answer = self._ask("mask", _RUN_S)
        if not answer["finite"]:
            raise _FailedError("it gives logits that are not numbers.")
        bits = np.unpackbits(np.frombuffer(bytes.fromhex(answer["mask"]), np.uint8))
        return bits.reshape(-1, self._side).astype(bool)

    def _ask(self, what: Any, patience: float) -> dict[str, Any]:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it died: what it left says how
            self._process.stdin.write(json.dumps(what).encode() + b"\n")
            self._process.stdin.flush()
        try:
            line = self._lines.get(timeout=patience)
        except queue.Empty:
            raise _FailedError(f"it gave no answer within {patience:.0f} s.") from None
        try:
            answer: dict[str, Any] = json.loads(line)
        except ValueError:
            raise _FailedError(self._death()) from None
        if "error" in answer:
            raise _FailedError(answer["error"])
        return answer

    def _death(self) -> str:
        try:
            code = self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            return "it closed its pipe."
        self._stderr.seek(0)
        return f"it {how_it_died(code, self._stderr.read().decode('utf-8', 'replace'))}."


@contextmanager
def _child(bundle: Bundle, graph: Graph, backend: str, threads: int | None) -> Iterator[_Child]:
    request = {
        "bundle": str(bundle.path.absolute()),
        "manifest": bundle.manifest.model_dump(mode="json"),
        "graph": graph.model_dump(mode="json"),
        "backend": backend,
        "threads": threads,
    }
    with temporary_file() as stderr:
        process = start_child(_MODULE, "a process for the trial", stderr)
        try:
            yield _Child(process, stderr, request)
        finally:
            end_child(process)
            process.wait()
            close_pipes(process)


def main() -> None:
    """The child's side: a request in a line of standard input, then "run" and "mask"; each is answered by a line."""
    with open(os.dup(1), "w") as answers:
        os.dup2(2, 1)  # what a library prints is no answer
        try:
            _serve(sys.stdin, answers)
        except UserError as error:
            _answer(answers, {"error": str(error)})


def _serve(requests: TextIO, answers: TextIO) -> None:
    request = json.loads(requests.readline())
    bundle = Bundle(Path(request["bundle"]), Manifest.model_validate(request["manifest"]))
    graph = Graph.model_validate(request["graph"])
    backend = load_backend(bundle, graph, request["backend"], request["threads"]).backend
    frame, _ = phantom(graph.modality, 0, (graph.image_size, graph.image_size))
    image = preprocess(frame, graph.image_size, bundle.manifest.input.normalization)
    image = np.ascontiguousarray(np.repeat(image, graph.batch, axis=0))
    _answer(answers, {})
    for line in requests:
        begin = time.perf_counter()
        logits = backend.run(image)
        seconds = time.perf_counter() - begin
        if json.loads(line) == "run":
            _answer(answers, {"seconds": seconds})
        else:
            mask = logits >= logit(bundle.manifest.threshold)
            _answer(answers, {"finite": bool(np.isfinite(logits).all()), "mask": np.packbits(mask).tobytes().hex()})


def _answer(answers: TextIO, values: dict[str, Any]) -> None:
    answers.write(json.dumps(values) + "\n")
    answers.flush()
