"""What runs a graph: the protocol every backend fulfils, their registry, and the choice among them."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Protocol

from espmedsam_edge.bundle import Bundle, Graph
from espmedsam_edge.errors import UserError, nearest
from espmedsam_edge.imaging.geometry import Tensor


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


class BackendModule(Protocol):
    """What a module named in ``BACKENDS`` provides."""

    def unavailable(self, name: str) -> str | None:
        """Why this backend cannot run on this machine, with the remedy, as one sentence; None if it can."""

    def load(self, name: str, graph: Graph, file: Path, threads: int | None) -> Backend:
        """Load a graph's file, whose hash has been checked.

        Raises:
            BackendUnavailable: cannot run this graph on this machine.
            UserError: the graph is not what its manifest says.
        """


class BackendUnavailable(UserError):
    """This backend cannot run here: the choice "auto" goes on to the next one, a backend asked for by name fails."""


BACKENDS: dict[str, str] = {
    "onnxruntime": "espmedsam_edge.runtime.onnxruntime_backend",
    "onnxruntime-cuda": "espmedsam_edge.runtime.onnxruntime_backend",
    "onnxruntime-cpu": "espmedsam_edge.runtime.onnxruntime_backend",
}
"""Backend name -> the module that provides it, imported when it is tried."""

AUTO: tuple[str, ...] = ("onnxruntime",)
"""What "auto" tries, best first."""


@dataclass(frozen=True)
class Choice:
    """A loaded backend, and why those tried before it were not taken (one sentence each)."""

    backend: Backend
    passed_over: tuple[str, ...] = ()

    def __str__(self) -> str:
        taken = f"{self.backend.name} ({self.backend.device})"
        return f"{taken}; {'; '.join(self.passed_over)}" if self.passed_over else taken


def unavailable(name: str) -> str | None:
    """Why the backend ``name`` cannot run on this machine, or None if it can; loads no graph."""
    return _module(name).unavailable(name)


def load_backend(bundle: Bundle, graph: Graph, name: str = "auto", threads: int | None = None) -> Choice:
    """Load a graph on a backend.

    Args:
        bundle: where the graph's file is.
        graph: one of its graphs.
        name: a key of ``BACKENDS``, or "auto" for the first of ``AUTO`` that can run it here.
        threads: CPU threads for backends that compute on the CPU; None: the physical cores the process may use.

    Raises:
        UserError: unknown name, a graph that does not fit its manifest, or no backend that can run it here.
    """
    if name != "auto" and name not in BACKENDS:
        raise UserError(f"unknown backend '{name}'.", nearest(name, ["auto", *BACKENDS]))
    if threads is not None and not 1 <= threads <= 1024:
        raise UserError(f"{threads} threads asked for.", "Give a number from 1 to 1024, or leave it out.")
    file = bundle.graph_path(graph)
    if name != "auto":
        return Choice(_load(name, graph, file, threads))
    passed_over: list[str] = []
    for candidate in AUTO:
        try:
            return Choice(_load(candidate, graph, file, threads), tuple(passed_over))
        except BackendUnavailable as error:
            passed_over.append(f"not {candidate}: {error}")
    raise UserError(
        f"no backend can run {file} here: {'; '.join(passed_over)}",
        "See what is missing: espmedsam-edge doctor",
        exit_code=1,
    )


def _load(name: str, graph: Graph, file: Path, threads: int | None) -> Backend:
    module = _module(name)
    reason = module.unavailable(name)
    if reason is not None:
        raise BackendUnavailable(f"backend {name} cannot run here: {reason}", exit_code=1)
    return module.load(name, graph, file, threads)


def _module(name: str) -> BackendModule:
    module: BackendModule = import_module(BACKENDS[name])
    return module
