"""Pictures and masks to files: PNG or JPEG, complete or absent."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from espmedsam_edge.errors import UserError
from espmedsam_edge.files import atomic_write
from espmedsam_edge.marks import marked

WRITABLE_SUFFIXES: tuple[str, ...] = (".png", ".jpg", ".jpeg")

# OpenCV's own choice for PNG is its fastest (level 1, one filter, runs alone). With a level that is named, 1 too, every
# filter is tried on every row, which takes overlays 1.7 times as long.
_PARAMETERS: dict[str, list[int]] = {
    ".png": [],
    ".jpg": [cv2.IMWRITE_JPEG_QUALITY, 92],
    ".jpeg": [cv2.IMWRITE_JPEG_QUALITY, 92],
}


def encode_image(image: NDArray[np.uint8], suffix: str) -> bytes:
    """The bytes of a file.

    Args:
        image: (H, W) grey or (H, W, 3) BGR, uint8.
        suffix: one of ``WRITABLE_SUFFIXES``.

    Raises:
        UserError: another suffix, or a picture that the format cannot hold.
    """
    if suffix.lower() not in WRITABLE_SUFFIXES:
        raise UserError(f"cannot write '{suffix}' images.", f"Use one of {', '.join(WRITABLE_SUFFIXES)}.")
    try:
        done, data = cv2.imencode(suffix.lower(), image, _PARAMETERS[suffix.lower()])
    except cv2.error:
        done = False
    if not done:
        height, width = image.shape[:2]
        raise UserError(f"cannot write a {width}x{height} image as {suffix}.", "Use .png.", exit_code=1)
    return data.tobytes()


def write_image(path: Path, image: NDArray[np.uint8]) -> None:
    """Write a picture in the format that the path's suffix names (without one, PNG); complete or absent, with our mark.

    Raises:
        UserError: as ``encode_image``, or the disk's trouble.
    """
    atomic_write(path, marked(encode_image(image, path.suffix or ".png")))
