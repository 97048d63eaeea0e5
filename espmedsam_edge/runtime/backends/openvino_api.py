"""OpenVINO's package, imported so that it reports its use to nobody, and its one core of this process."""

from __future__ import annotations

import os
import sys
import threading
from typing import Any, cast

_TELEMETRY = "openvino_telemetry"

_cores: dict[int, Any] = {}
"""The core of each process, by its number: of a process that was split off, its parent's, too."""
_lock = threading.Lock()


def load_openvino() -> Any:
    """The package ``openvino``.

    With the package ``openvino_telemetry``, which it installs beside itself, its import looks up a host of its maker's
    analytics and keeps an identifier in the user's home. Without that package it does neither; so for the import
    that package is not there, unless the program that calls this one has imported it.
    """
    hidden = _TELEMETRY not in sys.modules
    if hidden:
        cast(dict[str, Any], sys.modules)[_TELEMETRY] = None  # an import of it fails
    try:
        import openvino
    finally:
        if hidden:
            del sys.modules[_TELEMETRY]
    return openvino


def core() -> Any:
    """OpenVINO's core, one for the process and kept to its end.

    Its plug-in of the processor gives the thread that loads it a stack for signals, frees it with itself and puts back
    the one before. With several cores, or one that another thread frees, the thread is left a stack that is gone, and
    the next Ctrl-C, which Python takes on it, would end in a segmentation fault.
    """
    with _lock:
        if os.getpid() not in _cores:
            _cores[os.getpid()] = load_openvino().Core()
        return _cores[os.getpid()]
