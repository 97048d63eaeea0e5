"""Lists, verifies and clears the engine cache."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from espmedsam_edge.bundle import Bundle
from espmedsam_edge.errors import UserError
from espmedsam_edge.runtime.engines.cache import engine_files, remove_engine, remove_file
from espmedsam_edge.runtime.engines.sidecar import Sidecar, damage, read_sidecar

_GRAPH = r"[a-z][a-z0-9_]{0,39}-(fp32|fp16|int8)-\d"
_OURS = re.compile(
    rf"{_GRAPH}+x\d+-tensorrt(-rtx)?-.{{1,48}}-[0-9a-f]{{12}}\.(json|plan|log|lock|runtime)"  # ``Wanted.stem``
    r"|timing-[^-]+-[^-]+-\d+\.(cache|lock)"
    rf"|\.({_GRAPH}|timing-).{{0,60}}\.[0-9a-f]{{12}}\.(json|plan|log|runtime|cache)"  # ``atomic_path``
)
"""Names of what is kept in the cache, and of what a build writes meanwhile: nothing else is ever removed. Others who
build engines may call theirs ``resnet50-fp16.plan``."""
_ABANDONED_S = 24 * 3600
"""A build's temporary file that is older belongs to no build any more."""


@dataclass(frozen=True)
class Entry:
    """One engine in the cache: its sidecar's file, the sidecar (None: unreadable), and what is wrong with it.

    ``damaged`` engines are rebuilt when they are wanted; ``outdated`` ones will not be wanted again.
    """

    file: Path
    sidecar: Sidecar | None
    damaged: str | None = None
    outdated: str | None = None


@dataclass(frozen=True)
class Removal:
    """One thing ``clean`` removed, or with ``dry_run`` would: its name, why, and its bytes."""

    name: str
    why: str
    freed: int


def entries(folder: Path, *, verify: bool = False) -> list[Entry]:
    """The engines in a cache folder by name; ``verify`` checks every plan's bytes, else only that it exists."""
    found = []
    for file in sorted(folder.glob("*.json")):
        sidecar = read_sidecar(file)
        if sidecar is None and not _OURS.fullmatch(file.name):
            continue
        if sidecar is None:
            found.append(Entry(file, None, damaged="its sidecar cannot be read"))
            continue
        if verify:
            damaged = damage(folder, sidecar)
        else:
            damaged = None if (folder / sidecar.plan).is_file() else "its plan is gone"
        found.append(Entry(file, sidecar, damaged, _outdated(sidecar)))
    return found


def outdated(bundle: str, graph_sha256: str, what: str) -> str | None:
    """Why what was built from a graph of a bundle will not be wanted again, as a clause; None where it may be.

    ``what`` is what the clause calls the graph: ``fp16 graph of fundus``.
    """
    if not Path(bundle).exists():
        return f"its bundle {bundle} is gone"
    try:
        graphs = Bundle.open(bundle).manifest.graphs
    except UserError:
        return f"its bundle {bundle} cannot be read"
    if graph_sha256 not in {graph.sha256 for graph in graphs}:
        return f"{bundle} has another {what} now"
    return None


def _outdated(sidecar: Sidecar) -> str | None:
    graph = sidecar.graph
    return outdated(sidecar.bundle, graph.sha256, f"{graph.precision} graph of {graph.modality}")


def clean(folder: Path, *, everything: bool = False, dry_run: bool = False) -> list[Removal]:
    """Remove engines that are damaged or outdated and what broken-off builds left; with ``everything`` all engines.

    What a running build holds is left alone.

    Raises:
        UserError: the folder cannot be written to.
    """
    removed: list[Removal] = []
    if not folder.is_dir():
        return removed
    for entry in entries(folder, verify=not everything):
        why = "asked for" if everything else entry.damaged or entry.outdated
        if why is None:
            continue
        with unlocked(folder, entry.file.stem) as free:
            if not free:
                continue
            sizes = [path.stat().st_size for path in engine_files(entry.file) if path.exists()]
            removed.append(Removal(entry.file.stem, why, sum(sizes)))
            if not dry_run:
                remove_engine(entry.file)
                remove_file(entry.file.with_suffix(".lock"))  # while it is held: a process that waits makes a new one
    gone = {removal.name for removal in removed}
    for file in sorted(path for path in folder.iterdir() if path.is_file()):
        why = _leftover(file, everything)
        if why is None or file.stem in gone or not file.exists():
            continue
        with unlocked(folder, file.stem) as free:
            if free:
                if file.suffix != ".lock":  # not worth a line: they are empty
                    removed.append(Removal(file.name, why, file.stat().st_size))
                if not dry_run:
                    remove_file(file)
    return removed


def _leftover(file: Path, everything: bool) -> str | None:
    if not _OURS.fullmatch(file.name):
        return None
    if file.name.startswith("."):
        old = everything or time.time() - file.stat().st_mtime > _ABANDONED_S
        return "left by a build that broke off" if old else None
    if file.suffix == ".cache":
        return "asked for" if everything else None
    if file.suffix in (".plan", ".log", ".lock", ".runtime") and not file.with_suffix(".json").exists():
        return "it belongs to no engine"
    return None


@contextlib.contextmanager
def unlocked(folder: Path, stem: str) -> Iterator[bool]:
    """Hold an engine's lock if nobody else does; yields whether it is held. Makes no lock file."""
    try:
        descriptor = os.open(folder / f"{stem}.lock", os.O_RDWR | os.O_CLOEXEC)
    except OSError:  # never built here, or read-only: nobody builds it
        yield True
        return
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        except OSError:  # a file system without locks
            yield True
        else:
            yield True
    finally:
        os.close(descriptor)
