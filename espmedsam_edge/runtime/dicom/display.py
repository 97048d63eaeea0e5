"""A DICOM frame's stored values to what a viewer shows first: palette, rescale, window, inversion, 8 bits."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from espmedsam_edge.imaging.decode import full_scale
from espmedsam_edge.imaging.geometry import Frame


def displayed(pixels: NDArray[Any], dataset: Any, frame: int = 0) -> Frame:
    """(H, W) or (H, W, 3) stored values, RGB where coloured, to (H, W, 3) uint8 BGR.

    Args:
        pixels: one frame as ``pydicom.pixels.iter_pixels`` gives it.
        dataset: the file's header.
        frame: its number in the file, from 0.

    Raises:
        ValueError: samples that are neither grey nor RGB.
    """
    interpretation = str(dataset.get("PhotometricInterpretation", "MONOCHROME2"))
    if interpretation == "PALETTE COLOR":
        from pydicom.pixels import apply_color_lut

        pixels = apply_color_lut(pixels, dataset)
    if pixels.ndim == 3 and pixels.shape[2] == 3:
        return np.ascontiguousarray(_eight_bits(pixels)[..., ::-1])
    if pixels.ndim != 2:
        raise ValueError(f"samples of shape {pixels.shape}")
    grey = _windowed(
        pixels,
        transform=_holder(dataset, frame, "PixelValueTransformationSequence"),
        window=_holder(dataset, frame, "FrameVOILUTSequence"),
    )
    inverted = interpretation == "MONOCHROME1"
    if inverted or str(dataset.get("PresentationLUTShape", "")) == "INVERSE":
        grey = np.asarray(255 - grey, np.uint8)
    return np.repeat(grey[..., None], 3, axis=2)


def _holder(dataset: Any, frame: int, macro: str) -> Any:
    """What holds a frame's values: its own functional group, that of all frames, or the header (PS3.3 C.7.6.16)."""
    frames = dataset.get("PerFrameFunctionalGroupsSequence") or ()
    own = (frames[frame],) if frame < len(frames) else ()
    for group in (*own, *(dataset.get("SharedFunctionalGroupsSequence") or ())):
        for item in group.get(macro) or ():
            return item
    return dataset


def _windowed(stored: NDArray[Any], transform: Any, window: Any) -> NDArray[np.uint8]:
    """Modality transform, then the first table or window (PS3.3 C.11.2), to 0..255."""
    values = stored
    if transform.get("ModalityLUTSequence") or "RescaleSlope" in transform:
        from pydicom.pixels import apply_modality_lut

        values = apply_modality_lut(stored, transform)
    tables = window.get("VOILUTSequence")
    if tables:
        from pydicom.pixels import apply_voi

        bits = int(tables[0].LUTDescriptor[2])
        shown = np.asarray(apply_voi(_whole(values), window), np.float64)
        return _scaled(shown, 0.0, float((1 << bits) - 1))
    center, width = _first(window.get("WindowCenter")), _first(window.get("WindowWidth"))
    if center is not None and width is not None and width > 0:
        return through_window(values, center, width, str(window.get("VOILUTFunction", "LINEAR")))
    return _eight_bits(values)


def through_window(values: NDArray[Any], center: float, width: float, function: str = "LINEAR") -> NDArray[np.uint8]:
    """PS3.3 C.11.2.1.2 and C.11.2.1.3: values to 0..255 by a window.

    Args:
        values: any shape, after the modality transform.
        center, width: in the values' units; width over 0, LINEAR takes one under 1 for 1.
        function: LINEAR, LINEAR_EXACT or SIGMOID.
    """
    x = np.asarray(values, np.float64)
    if function == "SIGMOID":
        with np.errstate(over="ignore"):
            return np.rint(255 / (1 + np.exp(-4 * (x - center) / width))).astype(np.uint8)
    if function == "LINEAR_EXACT":
        return _scaled(x, center - width / 2, center + width / 2)
    width = max(width, 1.0)
    if width == 1:  # a step
        return np.asarray(255 * (x > center - 0.5), np.uint8)
    return _scaled(x, center - 0.5 - (width - 1) / 2, center - 0.5 + (width - 1) / 2)


def _eight_bits(values: NDArray[Any]) -> NDArray[np.uint8]:
    """8 bits as they are; more by the smallest of 8, 10, 12, 14, 16 bits that holds the largest; signed by extremes."""
    if values.dtype == np.uint8:
        return values
    low, high = float(values.min()), float(values.max())
    if low < 0 or values.dtype.kind == "f":
        return _scaled(values, low, high)
    return _scaled(values, 0.0, full_scale(high))


def _scaled(values: NDArray[Any], low: float, high: float) -> NDArray[np.uint8]:
    x = np.asarray(values, np.float64)
    return np.rint(np.clip((x - low) / max(high - low, 1e-12), 0, 1) * 255).astype(np.uint8)


def _whole(values: NDArray[Any]) -> NDArray[Any]:
    """A table is indexed by whole numbers."""
    return values if values.dtype.kind in "iu" else np.rint(values).astype(np.int64)


def _first(value: Any) -> float | None:
    if value is None or value == "":
        return None
    if not isinstance(value, str | float | int):
        value = value[0] if len(value) else None
    number = None if value is None else float(value)
    return number if number is not None and np.isfinite(number) else None
