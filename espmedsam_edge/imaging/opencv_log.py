"""Keeps OpenCV's and its FFmpeg's own lines off stderr: what they say reaches the user as an error of this package."""

from __future__ import annotations

import os
from functools import cache
from typing import Any

import cv2

_SILENT = 0


@cache
def quiet_opencv() -> None:
    """Call before the first decoding or encoding. With the environment variable ESPMEDSAM_DEBUG the lines stay."""
    if not os.environ.get("ESPMEDSAM_DEBUG"):
        logging: Any = cv2 if hasattr(cv2, "setLogLevel") else cv2.utils.logging  # moved in OpenCV 5
        logging.setLogLevel(_SILENT)
        os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
