"""Networks that OpenVINO has compiled, kept in the cache: a file each, named for what it is of and by its own SHA-256.

A file is read once and used only if it is the user's alone and its bytes are those that were written; what is not is
compiled anew, with one line saying why. Files appear whole, under names that hold their content's hash: any number of
processes may keep the same network at once.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from espmedsam_edge.errors import UserError
from espmedsam_edge.files import atomic_write, read_json, read_regular, sha256_file, write_errors
from espmedsam_edge.machine.cache import PRIVATE_FILE, cache_place, make_private, read_kept
from espmedsam_edge.machine.installation import why_missing
from espmedsam_edge.runtime.backends.openvino_api import load_openvino

log = logging.getLogger(__name__)

_FORMAT = 1
_MOST_FACTS = 1 << 16
_ARITHMETIC = "INFERENCE_PRECISION_HINT"
_SUFFIX, _FACTS = ".blob", ".json"
_DIGITS = 32  # of the hash of what a network was compiled for: no one makes two that share them
_OURS = re.compile(rf"[0-9a-f]{{{_DIGITS}}}(-[0-9a-f]{{64}}\{_SUFFIX}|\{_FACTS})")
"""Names of what is kept here: nothing else is ever removed."""


def network_folder(cache: str | Path | None = None) -> Path:
    """Where compiled networks are kept: in ``cache``, else the usual place."""
    return cache_place(cache) / "openvino"


class CompiledNetworks:
    """The compiled networks in the cache that fit one graph, device, OpenVINO and settings.

    Args:
        title: what lines call the network: ``fundus fp32``.
        made_of: everything that the compiled network depends on.
    """

    def __init__(self, title: str, made_of: Mapping[str, str]) -> None:
        self._title = title
        self._root = cache_place()
        self._folder = network_folder()
        self._made_of = dict(made_of)
        text = json.dumps({"format": str(_FORMAT), **made_of}, sort_keys=True)
        self._stem = hashlib.sha256(text.encode()).hexdigest()[:_DIGITS]

    def find(self) -> bytes | None:
        """The compiled network, whole; None where there is none that may be used."""
        for file in sorted(self._folder.glob(f"{self._stem}-*{_SUFFIX}")):
            try:
                content = read_kept(file, self._root)
            except FileNotFoundError:  # another process removed it
                continue
            except OSError as error:
                self.refused(error.strerror or str(error))
                continue
            if file.name == self._name(content):
                return content
            self.refused("it is damaged")
        return None

    def refused(self, reason: str) -> None:
        """Log that a compiled network in the cache is not used."""
        log.info("%s: OpenVINO's network in the cache is not used, %s; compiling anew.", self._title, reason)

    def keep(self, content: bytes) -> None:
        """Keep a compiled network in place of those before it; where that cannot be, one line says so."""
        file = self._folder / self._name(content)
        try:
            make_private(self._folder, self._root)
            facts = {"title": self._title, **self._made_of}  # for people; what is used hangs on the names alone
            atomic_write(self._folder / f"{self._stem}{_FACTS}", json.dumps(facts, indent=1) + "\n", PRIVATE_FILE)
            atomic_write(file, content, PRIVATE_FILE)
            for other in self._folder.glob(f"{self._stem}-*{_SUFFIX}"):
                if other != file:
                    other.unlink(missing_ok=True)
        except UserError as error:
            log.info("%s: the compiled network is not kept: %s", self._title, error)
        except OSError as error:
            log.info("%s: the compiled network is not kept in %s: %s", self._title, self._folder, error.strerror)

    def _name(self, content: bytes) -> str:
        return f"{self._stem}-{hashlib.sha256(content).hexdigest()}{_SUFFIX}"


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


def kept_networks(cache: str | Path | None = None, *, verify: bool = False) -> list[KeptNetwork]:
    """The compiled networks in the cache, by name; ``verify`` reads them to see that they are whole."""
    files = [file for file in sorted(network_folder(cache).glob(f"*{_SUFFIX}")) if _OURS.fullmatch(file.name)]
    installed = _installed() if files else ""
    found = []
    for file in files:
        facts = _facts(file.with_name(file.name[:_DIGITS] + _FACTS))
        damage = unwanted = _damage(file) if verify else None
        version = facts.get("openvino", "")
        if unwanted is None and not version:
            unwanted = "nothing says what it is of"
        elif unwanted is None and version != installed:
            unwanted = f"OpenVINO is {installed or 'not installed'} now"
        line = file.stem[:_DIGITS]
        if version:
            line = f"{facts.get('title')}, OpenVINO {version} for {facts.get('device')}, {facts.get(_ARITHMETIC)}"
        found.append(KeptNetwork(file, line, file.stat().st_size, damage is not None, unwanted))
    return found


def remove_network(network: KeptNetwork) -> None:
    """Remove a network, and what is said of it.

    Raises:
        UserError: it cannot be removed.
    """
    with write_errors(network.file):
        network.file.unlink(missing_ok=True)
        network.file.with_name(network.file.name[:_DIGITS] + _FACTS).unlink(missing_ok=True)


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


def _installed() -> str:
    """The version of OpenVINO that is installed, as its networks name it; empty without one."""
    if why_missing("openvino", "openvino") is not None:
        return ""
    try:
        return str(load_openvino().get_version())
    except (ImportError, OSError):
        return ""
