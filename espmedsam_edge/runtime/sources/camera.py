"""USB cameras by Video4Linux, through OpenCV: compressed frames asked for, a buffer of one."""

from __future__ import annotations

import os
from fractions import Fraction
from glob import glob
from typing import Any

import cv2
import numpy as np

from espmedsam_edge.errors import UserError
from espmedsam_edge.imaging.geometry import Frame
from espmedsam_edge.imaging.opencv_log import quiet_opencv
from espmedsam_edge.runtime.sources.live import Disconnected, LiveOptions, LiveSource
from espmedsam_edge.runtime.sources.uris import Uri

_READ_SECONDS = 3  # until a silent camera counts as dropped out


class CameraFeed:
    """``v4l2:///dev/video0?size=1280x720&fps=30&format=MJPG``; a path under /dev/v4l/by-id stays the same camera.

    MJPG unless told otherwise: uncompressed, USB 2 carries full HD at about 5 frames a second. The driver keeps one
    frame, so that none is old when it is read.

    Raises:
        UserError: an option is wrong.
    """

    def __init__(self, uri: Uri) -> None:
        uri.allow("size", "fps", "format")
        self._uri = uri
        self._size = uri.size()
        self._rate = uri.number("fps", 1, 1000)
        self._format = uri.options.get("format", "MJPG")
        if len(self._format) != 4 or not self._format.isascii():
            raise UserError(f"format={self._format} in {uri.address} is not a code of four letters.", "MJPG is usual.")
        self.fps: Fraction | None = None
        self._capture: Any = None

    def open(self) -> None:
        device = self._uri.place
        if not os.path.exists(device):
            raise UserError(f"no camera {device}.", f"{_listed()} Is it plugged in?", exit_code=1)
        if not os.access(device, os.R_OK | os.W_OK):
            raise UserError(
                f"may not use {device}.",
                "Join the group that owns it: sudo usermod -aG video $USER, then log in anew.",
                exit_code=1,
            )
        quiet_opencv()
        # Read when OpenCV first waits for a frame in this process; CAP_PROP_READ_TIMEOUT_MSEC is not for Video4Linux.
        os.environ.setdefault("OPENCV_VIDEOIO_V4L_SELECT_TIMEOUT", str(_READ_SECONDS))
        wanted = [cv2.CAP_PROP_FOURCC, cv2.VideoWriter.fourcc(*self._format), cv2.CAP_PROP_BUFFERSIZE, 1]
        if self._size is not None:
            wanted += [cv2.CAP_PROP_FRAME_HEIGHT, self._size[0], cv2.CAP_PROP_FRAME_WIDTH, self._size[1]]
        if self._rate is not None:
            wanted += [cv2.CAP_PROP_FPS, round(self._rate)]
        capture = cv2.VideoCapture(device, cv2.CAP_V4L2)
        # One at a time and unchecked: a driver may refuse any of them and give frames all the same.
        for setting, value in zip(wanted[::2], wanted[1::2], strict=True):
            capture.set(setting, value)
        if not capture.isOpened():
            capture.release()
            raise UserError(
                f"cannot open the camera {device}.", "Does another program use it? Is it a camera?", exit_code=1
            )
        self._capture = capture
        rate = capture.get(cv2.CAP_PROP_FPS)
        self.fps = Fraction(rate).limit_denominator(1001) if 0 < rate < 1000 else None

    def read(self) -> Frame | None:
        done, image = self._capture.read()
        if not done:
            raise Disconnected("it gives no frames; is it unplugged?")
        return np.asarray(image, np.uint8)

    def interrupt(self) -> None:
        """A read that waits comes back after its timeout of three seconds."""

    def close(self) -> None:
        if self._capture is not None:
            self._capture.release()
            self._capture = None


def open_camera(uri: Uri, live: LiveOptions) -> LiveSource:
    """The source of ``v4l2:///dev/video0?size=1280x720&fps=30``.

    Raises:
        UserError: an option is wrong.
    """
    return LiveSource(CameraFeed(uri), uri.address, uri.label, live.back_off)


def cameras() -> list[str]:
    """The Video4Linux devices of this machine."""
    return sorted(glob("/dev/video*"), key=lambda name: (len(name), name))


def _listed() -> str:
    found = cameras()
    return f"There are {', '.join(found)}." if found else "There is no camera at all."
