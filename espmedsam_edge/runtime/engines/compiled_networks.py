"""Networks that a runtime has compiled, kept in the cache: a file each, named for what it is of and by its own SHA-256.

A file is read once and used only if it is the user's alone and its bytes are those that were written; what is not is
compiled anew, with one line saying why. Files appear whole, under names that hold their content's hash: any number of
processes may keep the same network at once.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from espmedsam_edge.errors import UserError
from espmedsam_edge.files import atomic_write, read_json, read_regular, sha256_file, write_errors
from espmedsam_edge.machine.cache import PRIVATE_FILE, cache_place, make_private, open_kept

log = logging.getLogger(__name__)

_FORMAT = 1
_MOST_FACTS = 1 << 16
_FACTS = ".json"
_PIECE = 4 << 20  # bytes
_DIGITS = 32  # of the hash of what a network was compiled for: no one makes two that share them
_LEFT = re.compile(rf"[0-9a-f]{{{_DIGITS}}}\.(json|log|lock)")


def read_hashed(stream: FileIO, memory: memoryview) -> str:
    """Read a file into memory of its size, hashing it at the same time; what is hashed is what lies in the memory.

    Returns:
        The SHA-256 of what was read, which is less than the memory takes if the file became shorter: 64 digits.
    """
    digest, pieces = hashlib.sha256(), SimpleQueue[memoryview | None]()

    def hash_pieces() -> None:
        while (piece := pieces.get()) is not None:
            digest.update(piece)

    hashing = threading.Thread(target=hash_pieces, name="espmedsam-hash")
    hashing.start()
    start = 0
    try:
        while count := stream.readinto(memory[start : start + _PIECE]):
            pieces.put(memory[start : start + count])
            start += count
    finally:
        pieces.put(None)
        hashing.join()
    return digest.hexdigest()


def _read_whole(stream: FileIO) -> tuple[bytes, str]:
    content = stream.readall()
    return content, hashlib.sha256(content).hexdigest()


@dataclass(frozen=True)
class Compiler:
    """A runtime that compiles networks.

    Attributes:
        folder: of the cache, where they are kept.
        package: under whose name its version stands among the facts.
        title: for people.
        suffix: of a network's file.
        arithmetic: the name among the facts of what is computed in.
        installed: its version here, as facts have it; empty without one.
        outlived: names among the facts of what may change under a network: one line tells of those left behind.
    """

    folder: str
    package: str
    title: str
    suffix: str
    arithmetic: str
    installed: Callable[[], str]
    outlived: tuple[str, ...] = ()

    def place(self, cache: str | Path | None = None) -> Path:
        """Where its networks are kept: in ``cache``, else the usual place."""
        return cache_place(cache) / self.folder


class CompiledNetworks:
    """The compiled networks in the cache that fit one graph, device, version of the runtime and settings.

    Args:
        compiler: of what runtime.
        title: what lines call the network: ``fundus fp32``.
        made_of: everything that the compiled network depends on.
        cache: the folder to keep them under; None: the usual place.
    """

    def __init__(
        self, compiler: Compiler, title: str, made_of: Mapping[str, str], cache: str | Path | None = None
    ) -> None:
        self._compiler, self._title = compiler, title
        self._root = cache_place(cache)
        self.folder = compiler.place(cache)
        self._made_of = dict(made_of)
        text = json.dumps({"format": str(_FORMAT), **made_of}, sort_keys=True)
        self.stem = hashlib.sha256(text.encode()).hexdigest()[:_DIGITS]

    def find(self, read: Callable[[FileIO], tuple[Any, str]] = _read_whole) -> Any:
        """The compiled network, whole; None where there is none that may be used.

        Args:
            read: gives what an open file holds, and the SHA-256 of just that; as bytes, unless it is needed otherwise.
        """
        file = None
        for file in sorted(self.folder.glob(f"{self.stem}-*{self._compiler.suffix}")):
            try:
                with open_kept(file, self._root) as stream:
                    content, sha256 = read(stream)
            except FileNotFoundError:  # another process removed it
                continue
            except OSError as error:
                self.refused(error.strerror or str(error))
                continue
            if file.name == self._file(sha256).name:
                return content
            self.refused("it is damaged")
        if file is None and (reason := self._left_behind()) is not None:
            self.refused(reason)
        return None

    def facts(self) -> dict[str, str]:
        """What was noted of the network; empty where nothing readable was."""
        return _facts(self.folder / f"{self.stem}{_FACTS}")

    def refused(self, reason: str) -> None:
        """Log that a compiled network in the cache is not used."""
        title = self._compiler.title
        log.info("%s: %s's network in the cache is not used, %s; compiling anew.", self._title, title, reason)

    def keep(self, content: bytes, noted: Mapping[str, str] | None = None) -> None:
        """Keep a compiled network in place of those before it; where that cannot be, one line says so.

        Args:
            content: the network.
            noted: more facts of it, which it does not depend on.
        """
        file = self.file_of(content)
        try:
            make_private(self.folder, self._root)
            # For people: what is used hangs on the names alone.
            facts = {"title": self._title, **self._made_of, **(noted or {})}
            text = json.dumps(facts, indent=1) + "\n"
            # What a power cut damages its name tells, and waiting for the disk would hold the first result up.
            atomic_write(self.folder / f"{self.stem}{_FACTS}", text, PRIVATE_FILE, synced=False)
            atomic_write(file, content, PRIVATE_FILE, synced=False)
            for other in self.folder.glob(f"{self.stem}-*{self._compiler.suffix}"):
                if other != file:
                    other.unlink(missing_ok=True)
        except UserError as error:
            log.info("%s: the compiled network is not kept: %s", self._title, error)
        except OSError as error:
            log.info("%s: the compiled network is not kept in %s: %s", self._title, self.folder, error.strerror)

    def file_of(self, content: bytes) -> Path:
        """Where a compiled network is kept."""
        return self._file(hashlib.sha256(content).hexdigest())

    def _file(self, sha256: str) -> Path:
        return self.folder / f"{self.stem}-{sha256}{self._compiler.suffix}"

    def _left_behind(self) -> str | None:
        """Why a network of the same graph does not fit any more, as a clause: it differs in what is outlived alone."""
        for file in sorted(self.folder.glob(f"*{_FACTS}")):
            facts = _facts(file)
            differing = [name for name, value in self._made_of.items() if facts.get(name) != value]
            if differing and set(differing) <= set(self._compiler.outlived) & set(facts):
                name = differing[0]
                return f"it is of {name} {facts[name]} and this is {self._made_of[name]}"
        return None


@dataclass(frozen=True)
class KeptNetwork:
    """A compiled network in the cache.

    Attributes:
        file: of the network.
        line: for people: of what, for what, by which version.
        size: in bytes.
        damaged: whether its bytes are not those that were written, where that was looked at.
        unwanted: why it will not be used, as a clause; None where it may be.
    """

    file: Path
    line: str
    size: int
    damaged: bool
    unwanted: str | None


def kept_networks(compiler: Compiler, cache: str | Path | None = None, *, verify: bool = False) -> list[KeptNetwork]:
    """A runtime's networks in the cache, by name; ``verify`` reads them to see that they are whole."""
    from espmedsam_edge.runtime.engines.inventory import outdated  # with all of TensorRT's side, which no run needs

    # Nothing else than what has such a name is ever removed.
    ours = re.compile(rf"[0-9a-f]{{{_DIGITS}}}-[0-9a-f]{{64}}\{compiler.suffix}")
    files = [file for file in sorted(compiler.place(cache).glob(f"*{compiler.suffix}")) if ours.fullmatch(file.name)]
    installed = compiler.installed() if files else ""
    found = []
    for file in files:
        facts = _facts(_facts_file(file))
        damage = unwanted = _damage(file) if verify else None
        version = facts.get(compiler.package, "")
        if unwanted is None and not version:
            unwanted = "nothing says what it is of"
        elif unwanted is None and version != installed:
            unwanted = f"{compiler.title} is {installed or 'not installed'} now"
        elif unwanted is None and "bundle" in facts:
            unwanted = outdated(facts["bundle"], facts.get("graph", ""), f"graph of {facts.get('title')}")
        line = file.stem[:_DIGITS]
        if version:
            line = f"{facts.get('title')}, {compiler.title} {version} for {facts.get('device')}"
            line = f"{line}, {facts.get(compiler.arithmetic)}"
        found.append(KeptNetwork(file, line, file.stat().st_size, damage is not None, unwanted))
    return found


def remove_network(network: KeptNetwork) -> None:
    """Remove a network, and what is said of it.

    Raises:
        UserError: it cannot be removed.
    """
    with write_errors(network.file):
        network.file.unlink(missing_ok=True)
        facts = _facts_file(network.file)
        for file in (facts, facts.with_suffix(".log"), facts.with_suffix(".lock")):
            file.unlink(missing_ok=True)


def remove_leftovers(compiler: Compiler, cache: str | Path | None = None) -> None:
    """Remove what is said of networks that are not there, and the locks of builds that broke off.

    Raises:
        UserError: they cannot be removed.
    """
    from espmedsam_edge.runtime.engines.inventory import unlocked

    folder = compiler.place(cache)
    for file in sorted(folder.glob("*")):
        stem = file.stem
        if not _LEFT.fullmatch(file.name) or any(folder.glob(f"{stem}-*{compiler.suffix}")):
            continue
        with unlocked(folder, stem) as free, write_errors(file):
            if free:
                file.unlink(missing_ok=True)


def _facts_file(network: Path) -> Path:
    return network.with_name(network.name[:_DIGITS] + _FACTS)


def _facts(file: Path) -> dict[str, str]:
    try:
        values = read_json(read_regular(file, _MOST_FACTS))
    except (OSError, ValueError):
        return {}
    return {name: str(value) for name, value in values.items()} if isinstance(values, dict) else {}


def _damage(file: Path) -> str | None:
    try:
        whole = sha256_file(file) == file.stem[_DIGITS + 1 :]
    except OSError as error:
        return error.strerror or "it cannot be read"
    return None if whole else "it is damaged"
