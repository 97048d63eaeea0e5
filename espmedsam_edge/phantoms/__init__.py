"""Synthetic images with exact masks, a scene a modality, drawn from a seed: for tests, demos and smoke runs.

They imitate what makes each modality hard (hairs on skin, ribs over lungs, speckle, specular light) but are no
substitute for patients' images: a score on phantoms says that a program works, not that a model does.

The same modality, seed, frame and size give the same bytes in every run with the same NumPy and OpenCV. The scene
itself depends on the seed alone: another size shows the same scene at another resolution.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from espmedsam_edge.errors import UserError
from espmedsam_edge.phantoms.camera import colonoscopy, dermoscopy, fundus
from espmedsam_edge.phantoms.instruments import histopathology, microscopy, other, ultrasound, xray
from espmedsam_edge.phantoms.stage import Stage

__all__ = ["SMALLEST", "phantom", "phantom_clip"]

SMALLEST = 32  # pixels; fewer cannot show a scene

_Scene = Callable[[Stage], tuple[NDArray[np.float32], NDArray[np.bool_]]]
_SCENES: dict[str, _Scene] = {
    "dermoscopy": dermoscopy,
    "xray": xray,
    "fundus": fundus,
    "colonoscopy": colonoscopy,
    "ultrasound": ultrasound,
    "microscopy": microscopy,
    "histopathology": histopathology,
}


def phantom(
    modality: str, seed: int, size: tuple[int, int] = (512, 512), frame: int = 0
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """One image of a modality and its mask.

    Args:
        modality: one of the paper's six or histopathology; any other name gets a textured target in colours of its own.
        seed: which scene, 0 or more.
        size: (height, width) in pixels, at least 32 each.
        frame: which frame of the scene's clip, 0 or more; the target moves a little from one to the next.

    Returns:
        image (H, W, 3) uint8 BGR, and mask (H, W) uint8, 0 or 255, never empty and never full.

    Raises:
        UserError: a negative seed or frame, or too small a size.
    """
    if min(size) < SMALLEST:
        raise UserError(f"a phantom of {size[0]}x{size[1]} pixels is too small.", f"Use at least {SMALLEST}.")
    if seed < 0 or frame < 0:
        raise UserError(f"a phantom's seed and frame cannot be negative: {seed}, {frame}.", "Use 0 or more.")
    image, mask = _SCENES.get(modality, other)(Stage(modality, seed, size, frame))
    return (
        np.clip(np.rint(image), 0, 255).astype(np.uint8),
        mask.astype(np.uint8) * np.uint8(255),
    )


def phantom_clip(
    modality: str, seed: int, frames: int, size: tuple[int, int] = (512, 512)
) -> Iterator[tuple[NDArray[np.uint8], NDArray[np.uint8]]]:
    """The first ``frames`` frames of a scene whose target moves smoothly, drawn one at a time.

    The first is ``phantom(modality, seed, size)``. Arguments and results as there.
    """
    for frame in range(frames):
        yield phantom(modality, seed, size, frame)
