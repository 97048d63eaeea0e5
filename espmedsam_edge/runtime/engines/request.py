"""What is asked of the child that parses, builds, times and compares, and what it answers."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel

from espmedsam_edge.bundle import Graph, Normalization, Sha256
from espmedsam_edge.runtime.engines.agreement import Agreement
from espmedsam_edge.runtime.engines.precision import Arithmetic
from espmedsam_edge.runtime.engines.tensorrt_api import Flavour, Refusal


class EngineRequest(BaseModel, extra="forbid", frozen=True):
    """What the child is asked to do. ``targets`` empty means the GPU of this machine.

    ``macs`` (``Manifest.macs``), ``normalization`` and ``threshold`` are what the graph's manifest says;
    ``plan_sha256`` is of the plan to time or compare.
    """

    command: Literal["check", "build", "time", "compare"]
    graph: Graph
    graph_path: Path
    macs: dict[str, float] = {}
    normalization: Normalization = Normalization()
    threshold: float = 0.5
    flavour: Flavour
    targets: tuple[str, ...] = ()
    tf32: bool = False
    plan_path: Path | None = None
    plan_sha256: Sha256 | None = None
    timing_cache: Path | None = None
    log_path: Path | None = None


class Dla(BaseModel, extra="forbid", frozen=True):
    """How many of the network's layers could run on the board's deep learning accelerator. None is placed there."""

    cores: int
    layers: int
    of: int


class EngineResult(BaseModel, extra="forbid", frozen=True):
    """What the child found; ``engine_layers`` is empty where no GPU loaded the plan, or its inspector is mute.

    ``plan_sha256`` is of the plan as it was built, not of what a file held later.
    """

    version: str
    opset: int | None = None
    refusals: list[Refusal] = []
    arithmetic: Arithmetic | None = None
    plan_sha256: Sha256 | None = None
    plan_bytes: int = 0
    engine_loaded: bool = False
    engine_layers: dict[str, int] = {}
    dla: Dla | None = None
    workspace_bytes: int | None = None
    build_seconds: float = 0.0
    median_ms: float | None = None
    agreement: Agreement | None = None
    peak_memory_bytes: int | None = None
    warnings: list[str] = []
