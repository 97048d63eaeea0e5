"""The engine cache: raw plans, each with a sidecar that says what it was built from, by what and for which GPU.

An engine is used only where its sidecar fits the graph, the TensorRT and the GPU at hand and its bytes are those that
were written; anything else is rebuilt, with one line saying why.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

from espmedsam_edge.bundle import Bundle, Graph
from espmedsam_edge.errors import UserError
from espmedsam_edge.files import atomic_path, atomic_write, write_errors
from espmedsam_edge.machine.cache import CACHE_VARIABLE, PRIVATE_FILE, cache_place, distrusted
from espmedsam_edge.runtime.cuda.gpu import find_gpu
from espmedsam_edge.runtime.engines import child
from espmedsam_edge.runtime.engines.agreement import DOUBTFUL_DICE, Agreement
from espmedsam_edge.runtime.engines.building_lock import building_lock
from espmedsam_edge.runtime.engines.request import EngineRequest, EngineResult
from espmedsam_edge.runtime.engines.sidecar import EngineGpu, Sidecar, Wanted, damage, read_sidecar
from espmedsam_edge.runtime.engines.tensorrt_api import load, resolve_targets
from espmedsam_edge.runtime.engines.worker import read_wanted
from espmedsam_edge.version import __version__

log = logging.getLogger(__name__)

# What TensorRT-RTX's portable engines cover by its documentation. Turing (sm75) would slow the others down, and has no
# FP32 matrix products there.
USUAL_TARGETS = ("sm86", "sm89", "sm120")

ELSEWHERE = (
    "Use --backend tensorrt, inductor or onnxruntime-cuda on this GPU; for others name their generations (--target)."
)


@dataclass(frozen=True)
class EnginePlan:
    """A plan on disk with its sidecar. ``built_now`` is False when it came from the cache."""

    path: Path
    sidecar: Sidecar
    built_now: bool = False

    def read(self) -> bytes:
        """The plan, read once and only if it is the one that its sidecar describes: run these bytes.

        Raises:
            UserError: it was changed since it was found or built, or cannot be read.
        """
        return read_wanted(self.path, self.sidecar.plan_sha256)


def cache_folder(cache: str | Path | None = None) -> Path:
    """Where engines are kept: ``cache``, else $ESPMEDSAM_CACHE, else the user's cache folder."""
    return cache_place(cache) / "engines"


def want(
    bundle: Bundle,
    graph: Graph,
    *,
    flavour: str | None = None,
    targets: Sequence[str] = (),
    tf32: bool = False,
) -> Wanted:
    """What an engine for this graph must be on this machine.

    Without ``targets`` TensorRT-RTX builds for the GPU here, or without one for ``USUAL_TARGETS``.

    Raises:
        UserError: no TensorRT, no GPU for a TensorRT that needs one, one that it does not run on, or a target that it
            cannot build for.
    """
    api = load(flavour)
    gpu = find_gpu()
    chosen = resolve_targets(api, targets)
    if not chosen and api.builds_without_gpu:
        known = api.target_names()
        if gpu is None:
            chosen = [target for target in USUAL_TARGETS if target in known] or known
            log.info("No GPU here: building for %s. Choose with --target.", ", ".join(chosen))
        elif gpu.sm in known:
            chosen = [gpu.sm]
        elif (reason := api.not_for(gpu.sm)) is not None:
            raise UserError(f"{api.title} is not for {gpu.name}: {reason}.", ELSEWHERE, exit_code=1)
    if gpu is None and not chosen:
        raise UserError(
            f"{api.title} builds an engine on the GPU it will run on, and there is none here.",
            "Copy the bundle to the device and build there, or use --backend tensorrt-rtx.",
            exit_code=1,
        )
    return Wanted(
        graph=graph,
        bundle=str(bundle.path.resolve()),
        flavour=api.flavour,
        version=api.version,
        gpu=None if chosen or gpu is None else EngineGpu.of(gpu),
        targets=tuple(chosen),
        tf32=tf32,
    )


def find_or_build(
    bundle: Bundle,
    graph: Graph,
    *,
    flavour: str | None = None,
    targets: Sequence[str] = (),
    tf32: bool = False,
    cache: str | Path | None = None,
    force: bool = False,
    on_progress: child.OnProgress = lambda phase, fraction: None,
) -> EnginePlan:
    """The engine of a bundle's graph for this machine: from the cache where it fits and is whole, else built.

    Of several processes that want the same engine one builds; the others wait, then use it. A fitting engine is used
    from a cache that may not be written to.

    Args:
        flavour: ``tensorrt`` or ``tensorrt-rtx``; None: what is installed.
        targets: GPU generations (``sm86``) for TensorRT-RTX; empty: the GPU here, without one ``USUAL_TARGETS``.
        tf32: let TensorRT compute FP32 layers in TF32.
        cache: the folder to keep engines under (None: ``cache_folder``'s choice).
        force: build even where a fitting engine is there.
        on_progress: gets TensorRT's phase and the part done, 0..1, while it builds.

    Raises:
        UserError: no TensorRT or no GPU, a graph that is refused, a failed build, a cache that cannot be written.
    """
    folder = cache_folder(cache)
    graph_bytes = len(bundle.read_graph(graph))
    wanted = want(bundle, graph, flavour=flavour, targets=targets, tf32=tf32)
    if not force:
        plan, _ = find(folder, wanted)
        if plan is not None:
            return plan
    require_space(folder, 2 * graph_bytes)
    with building_lock(folder, wanted.stem) as waited:
        reason = None
        if not force or waited:
            plan, reason = find(folder, wanted)
            if plan is not None:
                return plan
        if reason:
            log.info(
                "%s %s: the engine in the cache is not used, %s; building anew.",
                graph.modality,
                graph.precision,
                reason,
            )
        request = EngineRequest(
            command="build",
            graph=graph,
            graph_path=bundle.graph_path(graph).resolve(),
            macs=bundle.manifest.macs(graph),
            normalization=bundle.manifest.input.normalization,
            threshold=bundle.manifest.threshold,
            flavour=wanted.flavour,
            targets=wanted.targets,
            tf32=tf32,
        )
        return _build(folder, wanted, request, on_progress)


def find(folder: Path, wanted: Wanted) -> tuple[EnginePlan | None, str | None]:
    """The newest fitting engine, its bytes checked; or None and why the one there is cannot be used (None: none is)."""
    untrusted = distrusted(folder, folder.parent)
    if untrusted is not None:
        return None, untrusted if any(folder.glob("*.plan")) else None
    reasons: list[str] = []
    names = f"{wanted.graph.modality}-{wanted.graph.precision}-*-{wanted.flavour}-*.json"
    for file in sorted(folder.glob(names), key=_age, reverse=True):
        own = file.stem == wanted.stem
        sidecar = read_sidecar(file)
        if sidecar is None:
            if own:
                reasons.append(distrusted(file, folder.parent) or "its sidecar cannot be read")
            continue
        misfit = wanted.misfit(sidecar)
        if misfit is None:
            misfit = damage(folder, sidecar)
            if misfit is None:
                log.debug("%s fits: %s", wanted.stem, folder / sidecar.plan)
                return EnginePlan(folder / sidecar.plan, sidecar), None
        elif not own and (sidecar.bundle, sidecar.flavour) != (wanted.bundle, wanted.flavour):
            continue  # another bundle's engine explains nothing
        log.debug("%s does not fit: %s", file, misfit)
        reasons.append(misfit)
    if not reasons and (folder / f"{wanted.stem}.plan").exists():
        reasons.append("it has no sidecar")
    return None, reasons[0] if reasons else None


def _age(file: Path) -> float:
    try:
        return file.stat().st_mtime
    except OSError:  # removed meanwhile
        return 0.0


def require_space(folder: Path, plan_bytes: int) -> None:
    """Fail before minutes of building rather than after, when the engine would not fit on the disk.

    Raises:
        UserError: names the folder, what is free and how to choose another.
    """
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    needed = plan_bytes + (64 << 20)
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise UserError(
            f"the engine cache {folder} has {free >> 20} MiB free; this build needs {needed >> 20} MiB.",
            f"Remove engines (espmedsam-edge engines clean), or choose another folder with ${CACHE_VARIABLE}.",
            exit_code=1,
        )


def _build(folder: Path, wanted: Wanted, request: EngineRequest, on_progress: child.OnProgress) -> EnginePlan:
    plan_path = folder / f"{wanted.stem}.plan"
    sidecar_path = plan_path.with_suffix(".json")
    gpu = find_gpu()
    timing = folder / f"timing-{wanted.version}-{gpu.sm}-{gpu.sm_count}.cache" if gpu and not wanted.targets else None
    with atomic_path(plan_path, PRIVATE_FILE) as temporary:
        places = {"plan_path": temporary, "timing_cache": timing, "log_path": plan_path.with_suffix(".log")}
        request = request.model_copy(update=places)
        result = child.run(request, on_progress)
        assert result.arithmetic is not None
        assert result.plan_sha256 is not None
        request = request.model_copy(update={"plan_sha256": result.plan_sha256})
        loaded = result.engine_loaded
        tried = {"median_ms": _time(request) if loaded else None, "agreement": _compare(request) if loaded else None}
        result = result.model_copy(update=tried)
        sidecar = Sidecar(
            **{name: getattr(result, name) for name in Sidecar.model_fields if name in EngineResult.model_fields},
            plan=plan_path.name,
            graph=wanted.graph,
            bundle=wanted.bundle,
            flavour=wanted.flavour,
            cuda=gpu.cuda if gpu else None,
            gpu=EngineGpu.of(gpu) if gpu else None,
            targets=wanted.targets,
            tf32=wanted.tf32,
            built=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            built_by=f"espmedsam-edge {__version__}",
        )
        sidecar_path.unlink(missing_ok=True)  # between the two files there is none, never one of another plan
    atomic_write(sidecar_path, sidecar.model_dump_json(indent=2) + "\n", PRIVATE_FILE)
    _remove_superseded(folder, wanted)
    return EnginePlan(plan_path, sidecar, built_now=True)


def _time(request: EngineRequest) -> float | None:
    """GPU time of one run in milliseconds; None where it cannot be measured, which is no reason to drop the engine."""
    try:
        return child.run(request.model_copy(update={"command": "time", "log_path": None})).median_ms
    except UserError:
        return None


def _compare(request: EngineRequest) -> Agreement | None:
    """How the new engine agrees with ONNX Runtime; None where it cannot be found out, which is said.

    Raises:
        UserError: it computes what no engine may.
    """
    graph = request.graph
    name = f"{graph.modality} {graph.precision}"
    try:
        agreement = child.run(request.model_copy(update={"command": "compare", "log_path": None})).agreement
    except UserError as error:
        log.warning("%s: the engine was not compared with ONNX Runtime: %s", name, error.message)
        return None
    assert agreement is not None
    if agreement.fault is not None:
        raise UserError(
            f"the engine of {graph.file} is wrong: {agreement.fault}.",
            "It is not kept. Use another precision on this GPU, or update TensorRT and the driver.",
            exit_code=1,
        )
    if agreement.dice < DOUBTFUL_DICE:
        log.warning("%s: %s, which is little: see espmedsam-edge evaluate.", name, agreement)
    return agreement


def int8_not_faster(bundle: Bundle, plans: Sequence[EnginePlan]) -> list[str]:
    """A line for each INT8 engine of a bundle that was timed no faster than the FP16 one, of now or in the cache."""
    lines = []
    for plan in plans:
        if plan.sidecar.graph.precision != "int8":
            continue
        int8_ms, fp16_ms = plan.sidecar.median_ms, _fp16_milliseconds(bundle, plan)
        if int8_ms and fp16_ms and int8_ms >= fp16_ms:
            lines.append(
                f"{plan.sidecar.graph.modality}: int8 takes {int8_ms:.2f} ms and fp16 {fp16_ms:.2f} ms on "
                f"{plan.sidecar.gpu}: int8 gains nothing here, use fp16."
            )
    return lines


def _fp16_milliseconds(bundle: Bundle, int8: EnginePlan) -> float | None:
    """The newest time of the FP16 engine beside an INT8 one, by the same TensorRT on the same GPU."""

    def place(sidecar: Sidecar) -> tuple[object, ...]:
        return sidecar.flavour, sidecar.version, sidecar.gpu, sidecar.tf32

    modality = int8.sidecar.graph.modality
    hashes = [g.sha256 for g in bundle.manifest.graphs if (g.modality, g.precision) == (modality, "fp16")]
    for file in sorted(int8.path.parent.glob(f"{modality}-fp16-*.json"), key=_age, reverse=True):
        fp16 = read_sidecar(file)
        if fp16 and fp16.median_ms and fp16.graph.sha256 in hashes and place(fp16) == place(int8.sidecar):
            return fp16.median_ms
    return None


def _remove_superseded(folder: Path, wanted: Wanted) -> None:
    """Remove the engines of older versions of the same graph of the same bundle, for the same place."""
    for file in folder.glob(f"{wanted.graph.modality}-{wanted.graph.precision}-*.json"):
        sidecar = read_sidecar(file)
        if (
            sidecar is not None
            and sidecar.graph.sha256 != wanted.graph.sha256
            and (sidecar.bundle, sidecar.flavour, sidecar.version, sidecar.targets, sidecar.tf32)
            == (wanted.bundle, wanted.flavour, wanted.version, wanted.targets, wanted.tf32)
            and (wanted.gpu is None or sidecar.gpu == wanted.gpu)
        ):
            remove_engine(file)


def remove_engine(sidecar: Path) -> int:
    """Remove a plan with its sidecar and log; returns the bytes freed. A lock stays: a process may wait for it.

    Raises:
        UserError: the folder cannot be written to.
    """
    return sum(remove_file(file) for file in engine_files(sidecar))


def engine_files(sidecar: Path) -> list[Path]:
    """What is kept of an engine, there or not: its sidecar, its plan, its log and its compiled kernels."""
    return [sidecar.with_suffix(suffix) for suffix in (".json", ".plan", ".log", ".runtime")]


def remove_file(file: Path) -> int:
    """Remove a file, if it is there; returns its size.

    Raises:
        UserError: the folder cannot be written to.
    """
    with write_errors(file):
        try:
            size = file.stat().st_size
            file.unlink()
        except FileNotFoundError:
            return 0
    return size
