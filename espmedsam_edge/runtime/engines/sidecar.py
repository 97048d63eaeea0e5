"""The JSON file beside an engine's plan: what it was built from, by what, for which GPU, and whether that fits here."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ValidationError

from espmedsam_edge.bundle import FormatVersion, Graph, Sha256
from espmedsam_edge.machine.cache import read_kept
from espmedsam_edge.runtime.cuda.gpu import GpuDevice
from espmedsam_edge.runtime.engines.agreement import Agreement
from espmedsam_edge.runtime.engines.precision import Arithmetic
from espmedsam_edge.runtime.engines.request import Dla
from espmedsam_edge.runtime.engines.tensorrt_api import TITLES, Flavour

_MAX_BYTES = 1 << 20


class EngineGpu(BaseModel, extra="forbid", frozen=True):
    """The GPU an engine was built on and for."""

    name: str
    sm: str
    sm_count: int

    @classmethod
    def of(cls, gpu: GpuDevice) -> EngineGpu:
        """What matters of a GPU for the engines built on it."""
        return cls(name=gpu.name, sm=gpu.sm, sm_count=gpu.sm_count)

    def __str__(self) -> str:
        return f"{self.name} (SM {self.sm[2:-1]}.{self.sm[-1]}, {self.sm_count} SMs)"


class Sidecar(BaseModel, extra="forbid", frozen=True):
    """The JSON file beside a plan. ``targets`` are GPU generations (``sm86``); with none the engine fits ``gpu`` alone.

    ``engine_loaded``: a GPU has loaded the plan and its inputs, outputs and types were compared with the network's.
    ``median_ms``: GPU time of one run on ``gpu``, right after the build; ``agreement``: what was compared there.
    """

    schema_version: FormatVersion = 1
    plan: str
    plan_sha256: Sha256
    plan_bytes: int
    graph: Graph
    bundle: str
    flavour: Flavour
    version: str
    cuda: str | None
    gpu: EngineGpu | None
    targets: tuple[str, ...]
    tf32: bool
    arithmetic: Arithmetic
    engine_loaded: bool
    engine_layers: dict[str, int]
    dla: Dla | None
    workspace_bytes: int | None
    build_seconds: float
    median_ms: float | None
    agreement: Agreement | None = None
    peak_memory_bytes: int | None
    built: str
    built_by: str

    @property
    def place(self) -> str:
        """Where the engine runs, for people."""
        return ", ".join(self.targets) if self.targets else str(self.gpu or "unknown")


@dataclass(frozen=True)
class Wanted:
    """What an engine must be to be used: of this graph, by this TensorRT, for this GPU or these generations."""

    graph: Graph
    bundle: str
    flavour: Flavour
    version: str
    gpu: EngineGpu | None
    targets: tuple[str, ...]
    tf32: bool

    @property
    def stem(self) -> str:
        """The file name of its plan, without suffix: words for people, then a hash of everything that matters."""
        where = "-".join(self.targets) if self.targets else self.gpu.sm if self.gpu else "here"
        values = [self.graph.sha256, self.flavour, self.version, repr(self.gpu), self.targets, self.tf32]
        key = hashlib.sha256(json.dumps(values).encode()).hexdigest()[:12]
        size = f"{self.graph.image_size}x{self.graph.batch}"
        return f"{self.graph.modality}-{self.graph.precision}-{size}-{self.flavour}-{where[:48]}-{key}"

    def misfit(self, sidecar: Sidecar) -> str | None:
        """Why an engine must not be used here, as one clause; None when it fits."""
        if sidecar.graph.sha256 != self.graph.sha256:
            return f"it was built from an older {sidecar.graph.file}"
        if sidecar.version != self.version:
            title = TITLES[self.flavour]
            return f"it was built by {title} {sidecar.version} and this is {title} {self.version}"
        if self.targets and sidecar.targets:
            missing = [target for target in self.targets if target not in sidecar.targets]
            if missing:
                return f"it was built for {', '.join(sidecar.targets)} and not for {', '.join(missing)}"
        elif (self.targets, self.gpu) != (sidecar.targets, sidecar.gpu):
            here = ", ".join(self.targets) or str(self.gpu or "another place")
            return f"it was built for {sidecar.place} and this is for {here}"
        if sidecar.tf32 != self.tf32:
            return f"it was built {'with' if sidecar.tf32 else 'without'} TF32"
        return None


def read_sidecar(file: Path) -> Sidecar | None:
    """A plan's sidecar, or None when it is not one of this program's or names a plan other than its own.

    Nor is it one where another user owns or may write it.
    """
    try:
        if file.stat().st_size > _MAX_BYTES:
            return None
        sidecar = Sidecar.model_validate_json(read_kept(file, file.parent.parent))
    except (OSError, ValidationError):
        return None
    return sidecar if sidecar.plan == f"{file.stem}.plan" else None


def damage(folder: Path, sidecar: Sidecar) -> str | None:
    """What is wrong with a plan's bytes, as one clause; None when they are those that were written."""
    file = folder / sidecar.plan
    try:
        if file.stat().st_size != sidecar.plan_bytes:
            return f"its plan has {file.stat().st_size} bytes, not {sidecar.plan_bytes}"
        if hashlib.sha256(read_kept(file, folder.parent)).hexdigest() != sidecar.plan_sha256:
            return "its plan is damaged (SHA-256 differs)"
    except FileNotFoundError:
        return "its plan is gone"
    except OSError as error:
        return f"its plan cannot be used ({error.strerror})"
    return None
