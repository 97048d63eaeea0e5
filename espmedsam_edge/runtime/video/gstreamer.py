"""GStreamer for Python (PyGObject), where it is installed."""

from __future__ import annotations

import ctypes
from contextlib import suppress
from importlib.util import find_spec
from typing import Any

from espmedsam_edge.errors import UserError

_PACKAGES = (
    "sudo apt-get install python3-gi gir1.2-gstreamer-1.0 gir1.2-gst-plugins-base-1.0 gstreamer1.0-plugins-base "
    "gstreamer1.0-plugins-good gstreamer1.0-plugins-bad"
)


def has_gstreamer() -> bool:
    """Whether PyGObject is installed; GStreamer itself shows when it is loaded."""
    return find_spec("gi") is not None


def has_element(name: str) -> bool:
    """Whether GStreamer works here and has an element, such as the Jetson's ``nvv4l2decoder``."""
    if not has_gstreamer():
        return False
    try:
        return load_gstreamer().ElementFactory.find(name) is not None
    except UserError:
        return False


def load_gstreamer() -> Any:
    """GStreamer's module, initialised.

    Raises:
        UserError: PyGObject or GStreamer's description for it is not installed.
    """
    # GStreamer links Debian's libunwind, which has functions of libgcc's names: whatever loads later (matplotlib, say)
    # and throws a C++ exception through them would crash. The first one loaded wins.
    with suppress(OSError):
        ctypes.CDLL("libgcc_s.so.1", ctypes.RTLD_GLOBAL)
    try:
        import gi

        gi.require_version("Gst", "1.0")
        gi.require_version("GstApp", "1.0")
        from gi.repository import Gst, GstApp  # noqa: F401 (GstApp gives appsink its methods)
    except (ImportError, ValueError) as error:
        raise UserError("GStreamer for Python is not installed.", f"Install it: {_PACKAGES}", exit_code=1) from error
    if not Gst.is_initialized():
        Gst.init(None)
    return Gst


def error_class() -> type[Exception]:
    """The class of GLib's errors."""
    from gi.repository import GLib

    found: type[Exception] = GLib.Error
    return found


def without_addresses(text: str) -> str:
    """GStreamer's message in a line, without what may hold a password."""
    words = [word for word in text.split() if "://" not in word and "@" not in word]
    return " ".join(words).rstrip(".") or "GStreamer failed"
