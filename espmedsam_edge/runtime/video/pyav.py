"""PyAV, where it is installed: FFmpeg for Python."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any


def has_pyav() -> bool:
    """Whether PyAV (extra ``video``) is installed."""
    return find_spec("av") is not None


def load_pyav() -> Any:
    """PyAV's module, told to keep FFmpeg's own lines off stderr."""
    import av

    av.logging.set_level(None)
    return av
