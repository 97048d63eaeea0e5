"""PyAV, where it is installed: FFmpeg for Python."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any


def has_pyav() -> bool:
    """Whether PyAV (extra ``video``) is installed."""
    return find_spec("av") is not None


_POINTING = frozenset({
    "concat", "concatf", "hls", "applehttp", "dash", "imf", "webm_dash_manifest", "image2", "sdp", "rtsp", "rtp", "sap",
    "lavfi", "avisynth", "vapoursynth",
})  # fmt: skip
"""FFmpeg's names of what holds no pictures, but says where some are."""


def self_contained_formats() -> str:
    """FFmpeg's option ``format_whitelist`` for strangers' files: a list in disguise of a video opens no other file."""
    return ",".join(sorted(set(load_pyav().formats_available) - _POINTING))


def load_pyav() -> Any:
    """PyAV's module, told to keep FFmpeg's own lines off stderr."""
    import av

    av.logging.set_level(None)
    return av
