"""Keeps OpenCV's and its FFmpeg's own lines off stderr: what they say reaches the user as an error of this package."""

from __future__ import annotations

import os
from functools import cache

import cv2


@cache
def quiet_opencv() -> None:
    """Call before the first decoding or encoding. With the environment variable ESPMEDSAM_DEBUG the lines stay."""
    if not os.environ.get("ESPMEDSAM_DEBUG"):
        cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
        os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
