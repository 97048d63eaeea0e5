"""Networks that OpenVINO has compiled, kept in the cache: a file each, named for what it is of and by its own SHA-256.

A file is read once and used only if it is the user's alone and its bytes are those that were written; what is not is
compiled anew, with one line saying why. Files appear whole, under names that hold their content's hash: any number of
processes may keep the same network at once.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping

from espmedsam_edge.errors import UserError
from espmedsam_edge.files import atomic_write
from espmedsam_edge.machine.cache import PRIVATE_FILE, cache_place, make_private, read_kept

log = logging.getLogger(__name__)

_FORMAT = 1
_SUFFIX = ".blob"
_DIGITS = 32  # of the hash of what a network was compiled for: no one makes two that share them


class CompiledNetworks:
    """The compiled networks in the cache that fit one graph, device, OpenVINO and settings.

    Args:
        title: what lines call the network: ``fundus fp32``.
        made_of: everything that the compiled network depends on.
    """

    def __init__(self, title: str, made_of: Mapping[str, str]) -> None:
        self._title = title
        self._root = cache_place()
        self._folder = self._root / "openvino"
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
