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

# Level 1 writes a 1080p PNG five times as fast as OpenCV's usual level for a tenth more bytes. Looking for runs alone
# takes 3 to 10 % less time, and bytes, of overlays; of sonograms and X-rays 2 and 4 % more bytes.
_PARAMETERS: dict[str, list[int]] = {
    ".png": [cv2.IMWRITE_PNG_COMPRESSION, 1, cv2.IMWRITE_PNG_STRATEGY, cv2.IMWRITE_PNG_STRATEGY_RLE],
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
