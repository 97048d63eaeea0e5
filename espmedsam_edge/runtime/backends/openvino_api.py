"""OpenVINO's package, imported so that it reports its use to nobody, and its one core of this process."""

from __future__ import annotations

import os
import sys
import threading
from importlib import import_module
from typing import Any, cast

_TOOLS = "openvino.tools"

_cores: dict[int, Any] = {}
"""The core of each process, by its number: of a process that was split off, its parent's, too."""
_lock = threading.Lock()


def load_openvino() -> Any:
    """The package ``openvino``.

    Its import also brings tools that convert models of others, which takes half of its time. With the package
    ``openvino_telemetry``, installed beside it, they look up a host of its maker's analytics and keep an identifier in
    the user's home. Nothing here converts models; so for the import the tools are not there, unless the program that
    calls this one has imported them. ``openvino.convert_model`` brings them when it is asked for.
    """
    if "openvino" in sys.modules:
        import openvino

        return openvino
    cast(dict[str, Any], sys.modules)[_TOOLS] = None  # an import of it fails
    try:
        import openvino
    finally:
        del sys.modules[_TOOLS]
    vars(openvino)["__getattr__"] = _bring_tools
    return openvino


def _bring_tools(name: str) -> Any:
    if name != "convert_model":
        raise AttributeError(f"module 'openvino' has no attribute '{name}'")
    return import_module("openvino.tools.ovc").convert_model


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
