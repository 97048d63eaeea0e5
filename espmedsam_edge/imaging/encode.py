"""Pictures and masks to files: PNG or JPEG, complete or absent."""

from __future__ import annotations

import io
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from espmedsam_edge.errors import UserError
from espmedsam_edge.files import atomic_write
from espmedsam_edge.marks import MARK, marked

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


def write_labels(path: Path, labels: NDArray[np.uint16] | NDArray[np.uint32]) -> None:
    """Write numbers of objects, (H, W): uint16 as PNG, uint32 as TIFF; complete or absent, with our mark.

    Raises:
        UserError: the disk's trouble.
    """
    if labels.dtype == np.uint16:
        _, data = cv2.imencode(".png", labels)
        atomic_write(path, marked(data.tobytes()))
        return
    import tifffile  # which comes with scikit-image

    file = io.BytesIO()
    tifffile.imwrite(file, labels, software=MARK, photometric="minisblack", compression="zlib", metadata=None)
    atomic_write(path, file.getvalue())


def write_image(path: Path, image: NDArray[np.uint8]) -> None:
    """Write a picture in the format that the path's suffix names (without one, PNG); complete or absent, with our mark.

    Raises:
        UserError: as ``encode_image``, or the disk's trouble.
    """
    atomic_write(path, marked(encode_image(image, path.suffix or ".png")))
