"""Networks compiled by torch's Inductor: found in the cache, or built in a child process. Imports no torch.

What it compiles is native code, so it is kept in the cache alone, as the user's own (``compiled_networks``), and never
in a bundle: that has the graph, from which the network is made anew on each machine.
"""

from __future__ import annotations

import os
import shutil
import sysconfig
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from pydantic import BaseModel

from espmedsam_edge.bundle import Bundle, Graph, Normalization
from espmedsam_edge.errors import UserError
from espmedsam_edge.files import temporary_folder
from espmedsam_edge.machine.cores import usable_cores
from espmedsam_edge.machine.environment import cpu
from espmedsam_edge.machine.installation import why_missing
from espmedsam_edge.runtime.cuda.gpu import find_gpu
from espmedsam_edge.runtime.engines.agreement import DOUBTFUL_DICE, Agreement
from espmedsam_edge.runtime.engines.building_lock import building_lock
from espmedsam_edge.runtime.engines.cache import log, require_space
from espmedsam_edge.runtime.engines.child import OnProgress, Work, ask, no_progress
from espmedsam_edge.runtime.engines.compiled_networks import CompiledNetworks, Compiler

Device = Literal["cpu", "cuda"]
Arithmetic = Literal["fp32", "bf16", "fp16", "graph"]

_OLDEST = (2, 8)
_RECIPE = "1"  # counts up when the same graph is compiled in another way
_LIMIT_S = 3600.0
_BF16 = frozenset({"avx512_bf16", "amx_bf16", "bf16"})


def torch_version() -> str:
    """The version of the installed torch; empty without one. Imports nothing."""
    try:
        return version("torch")
    except PackageNotFoundError:
        return ""


COMPILER = Compiler("inductor", "torch", "Inductor of torch", ".pt2", "arithmetic", torch_version, ("torch", "machine"))
"""Whose networks are kept in the cache."""


class InductorRequest(BaseModel, extra="forbid", frozen=True):
    """What the child is to compile, and where to: ``package``."""

    graph: Graph
    graph_path: Path
    normalization: Normalization
    threshold: float
    device: Device
    arithmetic: Arithmetic
    threads: int
    package: Path


class InductorResult(BaseModel, extra="forbid", frozen=True):
    """What the child did: ``seconds`` of compiling, the most bytes of memory it held, how the masks agree."""

    seconds: float
    peak_memory_bytes: int | None
    agreement: Agreement


@dataclass(frozen=True)
class Built:
    """A compiled network: its bytes, checked, and whether they were compiled just now.

    ``facts`` are what was noted of it; ``file`` is where it is kept.
    """

    content: bytes
    facts: dict[str, str]
    file: Path
    built_now: bool = False


def why_no_torch() -> str | None:
    """Why there is no torch here that compiles, with what to do, as a sentence; None where there is."""
    missing = why_missing("torch", "inductor")
    if missing is not None:
        return missing
    if not hasattr(os, "memfd_create"):
        return "backend inductor runs on Linux alone."
    parts = tuple(int(part) for part in torch_version().split(".")[:2] if part.isdigit())
    if parts < _OLDEST:
        return f"torch {torch_version()} is too old: backend inductor wants {'.'.join(map(str, _OLDEST))} or later."
    return None


def why_no_cuda() -> str | None:
    """Why torch cannot use a GPU here, as a sentence; None where it may."""
    if find_gpu() is None:
        return "there is no NVIDIA GPU with a driver here."
    spec = find_spec("torch")
    if spec is None or spec.origin is None or not list(Path(spec.origin).parent.glob("lib/*torch_cuda*")):
        return f"torch {torch_version()} is built without CUDA. Install one that is (pytorch.org says how)."
    return None


def why_no_compiler(device: Device) -> str | None:
    """What a compilation would lack, with the package that has it, as a sentence; None where nothing is missing."""
    asked = os.environ.get("CXX")
    if asked and shutil.which(asked) is None:
        return f"the C++ compiler that $CXX names, {asked}, is not there. Correct it, or leave it out."
    if not asked and shutil.which("g++") is None:
        return "Inductor needs a C++ compiler, and there is no g++. Install it: sudo apt-get install g++"
    if device == "cuda" and not Path(sysconfig.get_path("include"), "Python.h").is_file():
        return "Inductor needs Python's headers for a GPU. Install them: sudo apt-get install python3-dev"
    return None


def why_not_here(graph: Graph, device: Device, arithmetic: Arithmetic) -> str | None:
    """Why a graph cannot be computed so on a device of this machine, as a sentence; None where it can."""
    if graph.precision == "int8":
        return "backend inductor computes no int8 graphs. Choose fp32 or fp16 with --precision."
    if device == "cuda":
        return None
    if graph.precision == "fp16" or arithmetic == "fp16":
        return "on a processor backend inductor computes no FP16. Use the fp32 graph, or inductor:bf16."
    if arithmetic == "bf16" and not _BF16 & set(cpu().simd):
        return "this processor has no bfloat16 (AVX-512 BF16, AMX). Leave the arithmetic out."
    return None


def compiled_networks(
    graph: Graph, device: Device, arithmetic: Arithmetic, cache: str | Path | None = None
) -> CompiledNetworks:
    """Where a graph's compiled network is kept for this machine, and the torch that is installed."""
    if device == "cuda":
        machine = str(find_gpu())
    else:  # compiled for what this very processor has
        processor = cpu()
        machine = f"{processor.model}: {' '.join(processor.simd)}"
    made_of = {
        "graph": graph.sha256,
        "torch": torch_version(),
        "device": device,
        "machine": machine,
        "arithmetic": arithmetic,
        "recipe": _RECIPE,
    }
    return CompiledNetworks(COMPILER, f"{graph.modality} {graph.precision}", made_of, cache)


def find_or_build(
    bundle: Bundle,
    graph: Graph,
    device: Device,
    arithmetic: Arithmetic,
    *,
    cache: str | Path | None = None,
    force: bool = False,
    on_progress: OnProgress = no_progress,
) -> Built:
    """A graph's network, compiled: from the cache where it fits and is whole, else compiled in a child process.

    Of several processes that want the same one compiles; the others wait, then use it.

    Raises:
        UserError: no compiler, an arithmetic or a graph that is not for this device, a failed compilation, a mask that
            is wrong, a cache that cannot be written.
    """
    reason = why_not_here(graph, device, arithmetic)
    if reason is not None:
        raise UserError(reason, exit_code=1)
    graph_bytes = len(bundle.read_graph(graph))
    kept = compiled_networks(graph, device, arithmetic, cache)
    found = None if force else kept.find()
    if found is not None:
        return Built(found, kept.facts(), kept.file_of(found))
    reason = why_no_compiler(device)
    if reason is not None:
        raise UserError(reason, exit_code=1)
    require_space(kept.folder, 2 * graph_bytes)
    with building_lock(kept.folder, kept.stem) as waited:
        found = kept.find() if waited else None
        if found is not None:
            return Built(found, kept.facts(), kept.file_of(found))
        return _build(bundle, graph, device, arithmetic, kept, on_progress)


def _build(
    bundle: Bundle, graph: Graph, device: Device, arithmetic: Arithmetic, kept: CompiledNetworks, tell: OnProgress
) -> Built:
    name = f"{graph.modality} {graph.precision}"
    work = Work(
        "espmedsam_edge.runtime.inductor.worker",
        f"Inductor's build of {graph.file}",
        "Update torch or the compiler, or use another backend.",
        kept.folder / f"{kept.stem}.log",
        _LIMIT_S,
    )
    with temporary_folder() as folder:
        request = InductorRequest(
            graph=graph,
            graph_path=bundle.graph_path(graph).resolve(),
            normalization=bundle.manifest.input.normalization,
            threshold=bundle.manifest.threshold,
            device=device,
            arithmetic=arithmetic,
            threads=usable_cores(),
            package=folder / "network.pt2",
        )
        result = InductorResult.model_validate(ask(work, request, tell))
        content = request.package.read_bytes()
    agreement = result.agreement
    if agreement.fault is not None:
        raise UserError(
            f"the network that Inductor made of {graph.file} is wrong: {agreement.fault}.",
            "It is not kept. Use another arithmetic, or another torch.",
            exit_code=1,
        )
    if agreement.dice < DOUBTFUL_DICE:
        log.warning("%s: %s, which is little: see espmedsam-edge evaluate.", name, agreement)
    gpu = find_gpu() if device == "cuda" else None
    noted = {
        "bundle": str(bundle.path.resolve()),
        "driver": f"CUDA {gpu.cuda}" if gpu else "",
        "seconds": f"{result.seconds:.1f}",
        "agreement": str(agreement),
    }
    if result.peak_memory_bytes:
        noted["memory"] = f"{result.peak_memory_bytes >> 20} MiB"
    kept.keep(content, noted)
    return Built(content, {**kept.facts(), **noted}, kept.file_of(content), built_now=True)


def is_built(graph: Graph, device: Device, arithmetic: Arithmetic) -> bool:
    """Whether there is a compiled network of a graph for this machine in the cache; its bytes are not looked at."""
    kept = compiled_networks(graph, device, arithmetic)
    return any(kept.folder.glob(f"{kept.stem}-*{COMPILER.suffix}"))
