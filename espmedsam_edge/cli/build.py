"""espmedsam-edge build."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from espmedsam_edge.cli.messages import once, shows_progress
from espmedsam_edge.errors import UserError
from espmedsam_edge.terminal import progress_bars, tell

if TYPE_CHECKING:
    from collections.abc import Callable

    from espmedsam_edge.bundle import Bundle, Graph
    from espmedsam_edge.runtime.engines.cache import EnginePlan
    from espmedsam_edge.runtime.engines.request import EngineResult
    from espmedsam_edge.runtime.inductor.building import Built


def command(
    bundle: Annotated[Path, typer.Argument(help="The bundle that export or calibrate wrote.")],
    modality: Annotated[list[str] | None, typer.Option(help="Which modality; may be repeated. Default: all.")] = None,
    precision: Annotated[
        list[str] | None,
        typer.Option(
            help="fp32, fp16 or int8; may be repeated. Default: all that the bundle has. Inductor: fp32 (its default), "
            "fp16, or bf16, which is the fp32 graph computed so."
        ),
    ] = None,
    backend: Annotated[
        str | None,
        typer.Option(
            help="tensorrt, tensorrt-rtx, or inductor (GPU or processor). Default: TensorRT where it is installed."
        ),
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(
            help="TensorRT-RTX: GPU generations, such as sm86,sm89,sm120. Default: the GPU here, else sm86,sm89,sm120."
        ),
    ] = None,
    check: Annotated[bool, typer.Option("--check", help="Only tell which nodes the installed parser refuses.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Build even where the cache has a fitting engine.")] = False,
    tf32: Annotated[
        bool, typer.Option("--tf32", help="Compute FP32 layers in TF32: faster, 10 bits of mantissa.")
    ] = False,
    cache: Annotated[Path | None, typer.Option(help="Keep engines under this folder.")] = None,
) -> None:
    """Compile a bundle's graphs for this GPU with TensorRT, or with torch's Inductor; keep the engines in the cache."""
    if backend is None or backend.partition(":")[0] != "inductor":
        _with_tensorrt(
            bundle, modality, precision, backend, target or "", check=check, force=force, tf32=tf32, cache=cache
        )
    elif target or tf32 or check:
        raise UserError("--target, --tf32 and --check are for TensorRT.", "Leave them out for --backend inductor.")
    else:
        _with_inductor(bundle, modality, precision, backend, force=force, cache=cache)


def _with_tensorrt(
    bundle: Path,
    modality: list[str] | None,
    precision: list[str] | None,
    backend: str | None,
    target: str,
    *,
    check: bool,
    force: bool,
    tf32: bool,
    cache: Path | None,
) -> None:
    from espmedsam_edge.bundle import Bundle
    from espmedsam_edge.runtime.engines import cache as engine_cache
    from espmedsam_edge.runtime.engines import child
    from espmedsam_edge.runtime.engines.tensorrt_api import load, resolve_targets

    opened = Bundle.open(bundle)
    graphs = _choose(opened, modality, precision)
    api = load(backend)
    targets = resolve_targets(api, [part for part in target.split(",") if part.strip()])
    tell(f"{api.title}, {len(graphs)} graph{'s' if len(graphs) > 1 else ''} of {bundle}")
    failed = 0
    plans: list[EnginePlan] = []
    with once():
        for graph in graphs:
            try:
                if check:
                    result = child.check(graph, opened.graph_path(graph), api.flavour)
                    failed += _report_check(graph, api.title, result, opened.manifest.macs(graph))
                    continue
                with _bar(f"{graph.modality} {graph.precision}") as on_progress:
                    plan = engine_cache.find_or_build(
                        opened,
                        graph,
                        flavour=api.flavour,
                        targets=targets,
                        tf32=tf32,
                        cache=cache,
                        force=force,
                        on_progress=on_progress,
                    )
                plans.append(plan)
                _report(graph, plan)
            except UserError as error:
                failed += 1
                tell(f"error: {graph.modality} {graph.precision}: {error}", err=True)
    for line in engine_cache.int8_not_faster(opened, plans):
        tell(line)
    if failed:
        raise typer.Exit(1)


def _with_inductor(
    path: Path,
    modalities: list[str] | None,
    precisions: list[str] | None,
    backend: str,
    *,
    force: bool,
    cache: Path | None,
) -> None:
    from espmedsam_edge.bundle import Bundle
    from espmedsam_edge.runtime.backends.backend_spec import BackendSpec
    from espmedsam_edge.runtime.backends.inductor_backend import arithmetic_of, device_of, unavailable
    from espmedsam_edge.runtime.inductor.building import find_or_build

    asked = BackendSpec.parse(backend)
    reason = unavailable(backend)
    if reason is not None:
        raise UserError(f"backend {backend} cannot run here: {reason}", exit_code=1)
    bundle, device = Bundle.open(path), device_of(asked)
    failed = 0
    with once():
        for precision in precisions or ["fp32"]:
            # Of the types that a network may be computed in, no graph is ever written in this one.
            spec, of = (replace(asked, arithmetic="bf16"), "fp32") if precision == "bf16" else (asked, precision)
            for graph in _choose(bundle, modalities, [of]):
                arithmetic = arithmetic_of(spec, graph)
                title = f"{graph.modality} {graph.precision}, {spec}"
                try:
                    with _bar(title) as on_progress:
                        built = find_or_build(
                            bundle, graph, device, arithmetic, cache=cache, force=force, on_progress=on_progress
                        )
                    _report_network(title, built)
                except UserError as error:
                    failed += 1
                    tell(f"error: {title}: {error}", err=True)
    if failed:
        raise typer.Exit(1)
    tell(f"--backend auto takes what it finds faster here: espmedsam-edge bench {path} --choose")


def _choose(bundle: Bundle, modalities: list[str] | None, precisions: list[str] | None) -> list[Graph]:
    """The graphs that are named.

    Raises:
        UserError: one that the bundle does not have.
    """
    names = modalities or bundle.manifest.modalities
    if precisions:
        return [bundle.graph(name, precision) for name in names for precision in precisions]
    for name in names:
        bundle.graph(name)  # complains about a name that is not there
    return [graph for graph in bundle.manifest.graphs if graph.modality in names]


@contextmanager
def _bar(title: str) -> Iterator[Callable[[str, float], None]]:
    """A progress bar on the terminal, if there is one; it goes when the build is done."""
    from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with progress_bars(*columns, disable=not shows_progress()) as progress:
        task = progress.add_task(title, total=1.0)

        def on_progress(phase: str, fraction: float) -> None:
            progress.update(task, completed=fraction, description=f"{title}: {phase}")

        yield on_progress


def _report(graph: Graph, plan: EnginePlan) -> None:
    sidecar = plan.sidecar
    name = f"{graph.modality} {graph.precision}"
    if plan.built_now:
        memory = f", {sidecar.peak_memory_bytes >> 20} MiB of memory" if sidecar.peak_memory_bytes else ""
        tell(f"{name}: built for {sidecar.place} in {sidecar.build_seconds:.1f} s{memory}")
    else:
        tell(f"{name}: in the cache, built for {sidecar.place} on {sidecar.built[:10]}")
    tell(f"  {sidecar.arithmetic.summary()}{_engine_words(plan)}")
    if sidecar.agreement is not None:
        tell(f"  {sidecar.agreement}")
    if sidecar.dla is not None:
        tell(f"  DLA: {sidecar.dla.layers} of {sidecar.dla.of} layers could run on it; none is placed there")
    speed = f"{sidecar.median_ms:.2f} ms a run on {sidecar.gpu}, " if sidecar.median_ms else ""
    tell(f"  {speed}{sidecar.plan_bytes / (1 << 20):.1f} MiB, {plan.path}")


def _report_network(title: str, built: Built) -> None:
    facts = built.facts
    machine = facts.get("machine", "this machine")
    if built.built_now:
        memory = f", {facts['memory']} of memory" if "memory" in facts else ""
        tell(f"{title}: compiled for {machine} in {facts['seconds']} s{memory}")
    else:
        tell(f"{title}: in the cache, compiled for {machine}")
    if "agreement" in facts:
        tell(f"  {facts['agreement']}")
    tell(f"  {len(built.content) / (1 << 20):.1f} MiB, {built.file}")


def _engine_words(plan: EnginePlan) -> str:
    if not plan.sidecar.engine_loaded:
        return " (read from the network; no GPU here has loaded the engine)"
    layers = plan.sidecar.engine_layers
    if not layers:
        return " (read from the network; the engine loads and its tensors agree)"
    counted = ", ".join(f"{count} in {dtype}" for dtype, count in sorted(layers.items()))
    return f" (the engine's layers: {counted})"


def _report_check(graph: Graph, title: str, result: EngineResult, macs: dict[str, float]) -> int:
    """Print what the parser makes of a graph; 1 if it refuses it or it is not what the manifest says, else 0."""
    from espmedsam_edge.runtime.engines.precision import check_arithmetic

    name = f"{graph.modality} {graph.precision}"
    if result.refusals:
        tell(f"{name}: {title} refuses {graph.file} (opset {result.opset}):")
        for refusal in result.refusals:
            tell(f"  {refusal}")
        if any(refusal.unknown_operator for refusal in result.refusals):
            tell("  The graph is newer than this parser: update TensorRT, or export it again for an older one.")
        return 1
    assert result.arithmetic is not None
    check_arithmetic(result.arithmetic, graph, macs)
    tell(f"{name}: {title} takes every node of {graph.file} (opset {result.opset})")
    tell(f"  {result.arithmetic.summary()}")
    if result.dla is not None:
        tell(f"  DLA: {result.dla.layers} of {result.dla.of} layers could run on it; none would be placed there")
    return 0
