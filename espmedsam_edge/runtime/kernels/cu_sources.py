"""The kernels' sources: one operation a ``.cu`` file, and the headers they share. See ``docs/kernels.md``."""

from __future__ import annotations

from functools import lru_cache
from importlib.resources import files

from espmedsam_edge.runtime.cuda.nvrtc import KernelSource

KERNELS: dict[str, tuple[str, ...]] = {
    "preprocess": ("preprocess",),
    "postprocess": ("postprocess",),
}
"""Source file -> the kernels in it."""

_HEADERS: dict[str, tuple[str, ...]] = {
    "preprocess": ("portable.cuh", "taps.cuh", "frames.cuh"),
    "postprocess": ("portable.cuh", "taps.cuh", "frames.cuh", "measures.cuh"),
}


@lru_cache
def kernel_source(name: str) -> KernelSource:
    """Read a key of ``KERNELS`` from the package."""
    folder = files(__package__)
    headers = {header: (folder / header).read_text("utf-8") for header in _HEADERS[name]}
    return KernelSource(name, (folder / f"{name}.cu").read_text("utf-8"), headers)
