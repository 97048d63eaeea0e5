"""ESP-MedSAM Edge: promptless medical segmentation, from a checkpoint to frames on a device.

The names a device program needs load on first use, so importing the package stays cheap and touches no GPU.
"""

from __future__ import annotations

import logging
import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

from espmedsam_edge.version import __version__

logging.getLogger(__name__).addHandler(logging.NullHandler())  # who uses the package decides what is shown, and where

# ONNX Runtime's wheels report their use to their maker, and keep an identifier below the home folder, unless this is
# set before they are imported, here and in every child process.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

_LAZY = {
    "Bundle": "espmedsam_edge.bundle",
    "Inference": "espmedsam_edge.runtime.inference",
    "InferenceReport": "espmedsam_edge.runtime.request",
    "InferenceRequest": "espmedsam_edge.runtime.request",
    "ModelOptions": "espmedsam_edge.runtime.request",
    "ObjectOptions": "espmedsam_edge.objects.options",
    "Outputs": "espmedsam_edge.runtime.request",
    "ReadingOptions": "espmedsam_edge.runtime.request",
    "Segmentation": "espmedsam_edge.runtime.segmentation",
    "Segmenter": "espmedsam_edge.runtime.segmenter",
    "ServeOptions": "espmedsam_edge.runtime.serve.options",
    "UserError": "espmedsam_edge.errors",
    "infer": "espmedsam_edge.runtime.inference",
    "infer_frames": "espmedsam_edge.runtime.inference",
}
__all__ = [
    "Bundle",
    "Inference",
    "InferenceReport",
    "InferenceRequest",
    "ModelOptions",
    "ObjectOptions",
    "Outputs",
    "ReadingOptions",
    "Segmentation",
    "Segmenter",
    "ServeOptions",
    "UserError",
    "__version__",
    "infer",
    "infer_frames",
]

if TYPE_CHECKING:
    from espmedsam_edge.bundle import Bundle
    from espmedsam_edge.errors import UserError
    from espmedsam_edge.objects.options import ObjectOptions
    from espmedsam_edge.runtime.inference import Inference, infer, infer_frames
    from espmedsam_edge.runtime.request import (
        InferenceReport,
        InferenceRequest,
        ModelOptions,
        Outputs,
        ReadingOptions,
    )
    from espmedsam_edge.runtime.segmentation import Segmentation
    from espmedsam_edge.runtime.segmenter import Segmenter
    from espmedsam_edge.runtime.serve.options import ServeOptions


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)
