"""espmedsam-edge engines list, verify, clean."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from espmedsam_edge.terminal import tell

if TYPE_CHECKING:
    from espmedsam_edge.runtime.engines.compiled_networks import Compiler, KeptNetwork
    from espmedsam_edge.runtime.engines.inventory import Entry

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)

Cache = Annotated[Path | None, typer.Option(help="The folder given to build --cache.")]


@app.command("list")
def list_engines(
    cache: Cache = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the sidecars as JSON.")] = False,
) -> None:
    """Show the engines in the cache: of what, by what, for which GPU, and whether they are still wanted.

    After them come the networks that torch's Inductor and OpenVINO compiled.
    """
    from espmedsam_edge.runtime.engines.cache import cache_folder
    from espmedsam_edge.runtime.engines.compiled_networks import kept_networks
    from espmedsam_edge.runtime.engines.inventory import entries

    folder = cache_folder(cache)
    found = entries(folder)
    if as_json:
        tell(json.dumps([entry.sidecar.model_dump(mode="json") for entry in found if entry.sidecar], indent=2))
        return
    networks = {compiler: kept_networks(compiler, cache) for compiler in _compilers()}
    if not found and not any(networks.values()):
        tell(f"No engines in {folder}.")
        return
    for entry in found:
        tell(_line(entry))
    if found:
        total = sum(entry.sidecar.plan_bytes for entry in found if entry.sidecar)
        tell(f"{len(found)} engine{'s' if len(found) > 1 else ''}, {total / (1 << 20):.1f} MiB in {folder}")
    for compiler, kept in networks.items():
        for network in kept:
            tell(_network_line(network))
        if kept:
            total, count = sum(network.size for network in kept), len(kept)
            where = f"{total / (1 << 20):.1f} MiB in {compiler.place(cache)}"
            tell(f"{count} network{'s' if count > 1 else ''} that {compiler.title} compiled, {where}")


@app.command()
def verify(cache: Cache = None) -> None:
    """Check every engine's bytes against its sidecar; leaves with 1 where one is damaged."""
    from espmedsam_edge.runtime.engines.cache import cache_folder
    from espmedsam_edge.runtime.engines.compiled_networks import kept_networks
    from espmedsam_edge.runtime.engines.inventory import entries

    folder = cache_folder(cache)
    found = entries(folder, verify=True)
    damaged = [entry for entry in found if entry.damaged]
    for entry in found:
        tell(f"{'damaged' if entry.damaged else 'ok'}: {_line(entry)}")
    tell(f"{len(found) - len(damaged)} of {len(found)} engines in {folder} are whole.")
    networks = [network for compiler in _compilers() for network in kept_networks(compiler, cache, verify=True)]
    spoilt = [network for network in networks if network.damaged]
    for network in networks:
        tell(f"{'damaged' if network.damaged else 'ok'}: {_network_line(network)}")
    if damaged or spoilt:
        tell("A damaged engine is rebuilt when it is wanted; espmedsam-edge engines clean removes it now.")
        raise typer.Exit(1)


@app.command()
def clean(
    cache: Cache = None,
    everything: Annotated[bool, typer.Option("--all", help="Remove all engines and kernel timings.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be removed, remove nothing.")] = False,
) -> None:
    """Remove engines that are damaged, or whose bundle is gone or has changed; with --all every engine.

    Of the networks that torch's Inductor and OpenVINO compiled, those that are damaged or of another version go, too.
    """
    from espmedsam_edge.machine.cache import cache_place
    from espmedsam_edge.runtime.engines.cache import cache_folder
    from espmedsam_edge.runtime.engines.compiled_networks import kept_networks, remove_leftovers, remove_network
    from espmedsam_edge.runtime.engines.inventory import Removal
    from espmedsam_edge.runtime.engines.inventory import clean as remove

    folder = cache_folder(cache)
    removed = remove(folder, everything=everything, dry_run=dry_run)
    verify = not everything
    for network in (one for compiler in _compilers() for one in kept_networks(compiler, cache, verify=verify)):
        why = "asked for" if everything else network.unwanted
        if why is not None:
            removed.append(Removal(network.line, why, network.size))
            if not dry_run:
                remove_network(network)
    for compiler in () if dry_run else _compilers():
        remove_leftovers(compiler, cache)
    word = "would remove" if dry_run else "removed"
    for removal in removed:
        tell(f"{word} {removal.name}: {removal.why}")
    freed = sum(removal.freed for removal in removed) / (1 << 20)
    tell(f"{word} {len(removed)} thing{'' if len(removed) == 1 else 's'}, {freed:.1f} MiB, from {cache_place(cache)}")


def _compilers() -> tuple[Compiler, ...]:
    from espmedsam_edge.runtime.backends.openvino_backend import COMPILER as OPENVINO
    from espmedsam_edge.runtime.inductor.building import COMPILER as INDUCTOR

    return INDUCTOR, OPENVINO


def _network_line(network: KeptNetwork) -> str:
    note = f" ({network.unwanted})" if network.unwanted else ""
    return f"{network.line}, {network.size / (1 << 20):.1f} MiB{note}"


def _line(entry: Entry) -> str:
    sidecar = entry.sidecar
    if sidecar is None:
        return f"{entry.file.stem}: {entry.damaged}"
    from espmedsam_edge.runtime.engines.tensorrt_api import TITLES

    note = entry.damaged or entry.outdated
    return (
        f"{sidecar.graph.modality} {sidecar.graph.precision} {sidecar.graph.image_size}x{sidecar.graph.image_size} "
        f"batch {sidecar.graph.batch}, {TITLES[sidecar.flavour]} {sidecar.version} for {sidecar.place}, "
        f"{sidecar.plan_bytes / (1 << 20):.1f} MiB, {sidecar.built[:10]}, of {sidecar.bundle}"
        + (f", {sidecar.agreement}" if sidecar.agreement else "")
        + (f" ({note})" if note else "")
    )
