"""ESP-MedSAM Edge: promptless medical segmentation, from a checkpoint to frames on a device.

The names a device program needs load on first use, so importing the package stays cheap and touches no GPU.
"""

from __future__ import annotations

import logging
from importlib import import_module
from typing import TYPE_CHECKING, Any

from espmedsam_edge.version import __version__

logging.getLogger(__name__).addHandler(logging.NullHandler())  # who uses the package decides what is shown, and where

_LAZY = {
    "Bundle": "espmedsam_edge.bundle",
    "Segmentation": "espmedsam_edge.runtime.segmentation",
    "Segmenter": "espmedsam_edge.runtime.segmenter",
    "UserError": "espmedsam_edge.errors",
}
__all__ = ["Bundle", "Segmentation", "Segmenter", "UserError", "__version__"]

if TYPE_CHECKING:
    from espmedsam_edge.bundle import Bundle
    from espmedsam_edge.errors import UserError
    from espmedsam_edge.runtime.segmentation import Segmentation
    from espmedsam_edge.runtime.segmenter import Segmenter


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)
