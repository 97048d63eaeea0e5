"""What may be handed over as a frame."""

from __future__ import annotations

import numpy as np

from espmedsam_edge.errors import UserError
from espmedsam_edge.runtime.kernels.frame_view import FrameView


def from_elsewhere(frame: object) -> bool:
    """Whether another library holds a frame, maybe on a GPU."""
    return (
        isinstance(frame, FrameView)
        or hasattr(frame, "__dlpack_device__")
        or hasattr(frame, "__cuda_array_interface__")
    )


def check_host_frame(frame: object) -> None:
    """Refuse what is no frame in the host's memory.

    Raises:
        UserError: not a (H, W, 3) uint8 array, or an empty one.
    """
    if not isinstance(frame, np.ndarray) or frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3:
        found = f"{frame.dtype} {frame.shape}" if isinstance(frame, np.ndarray) else type(frame).__name__
        raise UserError(
            f"a frame must be a uint8 array of shape (height, width, 3), BGR; got {found}.",
            "This backend takes frames in the host's memory alone."
            if from_elsewhere(frame) and not isinstance(frame, np.ndarray)
            else "Read files with espmedsam_edge.imaging.decode.read_image, which converts them.",
        )
    if 0 in frame.shape:
        raise UserError(f"the frame is empty: {frame.shape}.", "Give a frame of at least one pixel.")
