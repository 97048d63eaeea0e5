"""The kernels' parameter structures as ctypes, field for field those of the ``.cu`` sources."""

from __future__ import annotations

import ctypes
from ctypes import c_float, c_int32, c_uint32, c_uint64, c_void_p

MAX_FRAMES = 8
"""Frames of one launch."""
MAX_SIDE = 32000
"""Pixels: the kernels place taps in 32-bit whole numbers."""
MAX_OUTLINE = 16
"""Pixels: half a word on either side of a tile."""

PREPROCESS_BLOCK = (64, 4, 1)
PREPROCESS_TILE = (64, 16)
"""Columns and rows of the network's input that a block makes."""
POSTPROCESS_BLOCK = (256, 1, 1)
POSTPROCESS_TILE = (128, 32)
"""Columns and rows of the frame that a block makes."""
RUN = 16
"""Pixels that a thread of the postprocess kernel writes at once: rows of its outputs are padded to whole runs."""


class Frame(ctypes.Structure):
    """``Frame`` of frames.cuh."""

    _fields_ = (
        ("pixels", c_void_p),
        ("chroma", c_void_p),
        ("pitch", c_int32),
        ("chroma_pitch", c_int32),
        ("width", c_int32),
        ("height", c_int32),
        ("format", c_int32),
        ("gain", c_float),
        ("bias", c_float),
        ("luma_offset", c_int32),
        ("luma_gain", c_int32),
        ("red_v", c_int32),
        ("green_u", c_int32),
        ("green_v", c_int32),
        ("blue_u", c_int32),
    )


class Preprocess(ctypes.Structure):
    """``Preprocess`` of preprocess.cu."""

    _fields_ = (
        ("out", c_void_p),
        ("count", c_int32),
        ("size", c_int32),
        ("scale", c_float * 3),
        ("shift", c_float * 3),
        ("frames", Frame * MAX_FRAMES),
    )


class Measures(ctypes.Structure):
    """``Measures`` of measures.cuh."""

    _fields_ = (
        ("area", c_uint64),
        ("sum_x", c_uint64),
        ("sum_y", c_uint64),
        ("left", c_int32),
        ("top", c_int32),
        ("right", c_int32),
        ("bottom", c_int32),
    )


class Totals(ctypes.Structure):
    """``Totals`` of measures.cuh: what the blocks of a frame have added so far; zero before a launch and after it."""

    _fields_ = (
        ("sums", c_uint64 * 3),
        ("greatest", c_uint32 * 4),
        ("finished", c_uint32),
    )


class Canvas(ctypes.Structure):
    """``Canvas`` of postprocess.cu."""

    _fields_ = (
        ("frame", Frame),
        ("logits", c_void_p),
        ("mask", c_void_p),
        ("overlay", c_void_p),
        ("measures", c_void_p),
        ("totals", c_void_p),
        ("mask_pitch", c_int32),
        ("overlay_pitch", c_int32),
        ("outline", c_int32),
    )


class Postprocess(ctypes.Structure):
    """``Postprocess`` of postprocess.cu."""

    _fields_ = (
        ("count", c_int32),
        ("logits_height", c_int32),
        ("logits_width", c_int32),
        ("level", c_float),
        ("opacity", c_float),
        ("color", c_float * 3),
        ("canvases", Canvas * MAX_FRAMES),
    )


def tiles(size: tuple[int, int], tile: tuple[int, int]) -> tuple[int, int]:
    """Blocks across and down for ``size`` = (width, height)."""
    return -(-size[0] // tile[0]), -(-size[1] // tile[1])
