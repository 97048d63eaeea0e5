"""OpenVINO's package, imported so that it reports its use to nobody."""

from __future__ import annotations

import sys
from typing import Any, cast

_TELEMETRY = "openvino_telemetry"


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
