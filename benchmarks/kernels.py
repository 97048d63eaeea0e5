"""What part of the GPU's copy rate the two kernels reach, for the bytes that they must move.

    python benchmarks/kernels.py [--json FILE]

Needs a GPU, no TensorRT. Many launches of a kernel, captured as one graph as on a frame's way, run between two events.
Each has buffers of its own, together more than any cache holds, so that what a launch reads was not left there by the
one before. Bytes are those of docs/kernels.md, the copy rate is measured in the same run. Best of several runs, as that
of the copies is.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from espmedsam_edge.bench.rates import copy_rate
from espmedsam_edge.bundle import Normalization
from espmedsam_edge.files import atomic_write
from espmedsam_edge.imaging.overlay import OverlayStyle, color_of
from espmedsam_edge.machine.environment import collect_environment
from espmedsam_edge.runtime.backends.frame_buffers import FrameInput, FrameOutputs
from espmedsam_edge.runtime.cuda.device import CudaDevice
from espmedsam_edge.runtime.cuda.driver import unavailable
from espmedsam_edge.runtime.cuda.memory import DeviceBuffer, PinnedBuffer
from espmedsam_edge.runtime.cuda.stream import CudaGraph, Event, Stream
from espmedsam_edge.runtime.kernels.frame_view import PixelFormat
from espmedsam_edge.runtime.kernels.launch import FP32_BYTES, FrameKernels

TARGETS = {"preprocess": 0.5, "postprocess": 0.35}
"""Of the copy rate: the second moves too little for a large GPU to reach more."""
FRAME = (1920, 1080)
IMAGE_SIZE = 1024
WORKING_SET = 256 << 20  # bytes: more than any cache on a GPU
_RUNS = 10
_STYLE = OverlayStyle(color_of("fundus"))


@dataclass(frozen=True)
class Case:
    """A kernel on frames of one format and size.

    Attributes:
        pixels: the frames' format.
        frame: (width, height).
        image_size: S, the side of the network's input; its logits have a quarter of it.
    """

    pixels: PixelFormat
    frame: tuple[int, int] = FRAME
    image_size: int = IMAGE_SIZE

    @property
    def frame_bytes(self) -> int:
        """Of one frame."""
        return math.prod(self.pixels.shape(*self.frame)) * np.dtype(self.pixels.dtype).itemsize

    @property
    def logits_side(self) -> int:
        """h = w."""
        return self.image_size // 4


@dataclass(frozen=True)
class Preprocess(Case):
    """Frame to the network's input."""

    @property
    def name(self) -> str:
        """For people."""
        return f"preprocess {self.pixels.name}"

    @property
    def bytes(self) -> int:
        """That a launch must move: the frame is read, the input written."""
        return self.frame_bytes + self._input_bytes

    @property
    def _input_bytes(self) -> int:
        return 3 * self.image_size**2 * FP32_BYTES

    def prepare(self, stream: Stream, kernels: FrameKernels, opened: ExitStack) -> Callable[[], None]:
        """Buffers of their own for a launch, which what is returned enqueues."""
        frame = _frame(self, stream, opened)
        out = opened.enter_context(DeviceBuffer(stream.device, self._input_bytes)).address
        return lambda: kernels.preprocess(stream, [frame.view], out, self.image_size, Normalization())


@dataclass(frozen=True)
class Postprocess(Case):
    """Logits to mask and measures, and to the overlay."""

    overlay: bool = True

    @property
    def name(self) -> str:
        """For people."""
        return f"postprocess, mask and overlay on {self.pixels.name}" if self.overlay else "postprocess, mask"

    @property
    def bytes(self) -> int:
        """That a launch must move: logits read, mask written; for the overlay the frame read and it written."""
        area = math.prod(self.frame)
        return area + FP32_BYTES * self.logits_side**2 + (self.frame_bytes + 3 * area if self.overlay else 0)

    def prepare(self, stream: Stream, kernels: FrameKernels, opened: ExitStack) -> Callable[[], None]:
        """As that of ``Preprocess``."""
        side = self.logits_side
        frame = _frame(self, stream, opened)
        results = FrameOutputs(stream, *self.frame, overlay=self.overlay)
        opened.callback(results.close)
        canvas = results.canvas(frame.view, _logits(side, stream, opened).address)
        return lambda: kernels.postprocess(stream, [canvas], (side, side), 0.5, _STYLE)


CASES: tuple[Preprocess | Postprocess, ...] = (
    *(Preprocess(pixels) for pixels in PixelFormat),
    Postprocess(PixelFormat.BGR8, overlay=False),
    *(Postprocess(pixels) for pixels in PixelFormat),
)


def _frame(case: Case, stream: Stream, opened: ExitStack) -> FrameInput:
    frame = FrameInput(stream.device, case.pixels, *case.frame)
    opened.callback(frame.close)
    frame.write(_noise(case.pixels, case.frame))
    frame.upload(stream)
    stream.synchronize()
    return frame


@cache
def _noise(pixels: PixelFormat, size: tuple[int, int]) -> NDArray[Any]:
    kind = np.dtype(pixels.dtype)
    return np.random.default_rng(0).integers(0, np.iinfo(kind).max, pixels.shape(*size), kind)


def _logits(side: int, stream: Stream, opened: ExitStack) -> DeviceBuffer:
    """A few round parts in the foreground, so that there are edges to draw."""
    wave = np.cos(np.linspace(0, 4 * math.pi, side, dtype=np.float32))
    made = opened.enter_context(DeviceBuffer(stream.device, FP32_BYTES * side * side))
    with PinnedBuffer(stream.device, made.size) as host:
        host.array((side, side), np.float32)[:] = 8 * np.outer(wave, wave)
        stream.copy_to_device(made.address, host.address, made.size)
        stream.synchronize()
    return made


def seconds_a_launch(stream: Stream, kernels: FrameKernels, case: Preprocess | Postprocess) -> float:
    """GPU seconds of one launch among many, each with other buffers; the best of several runs.

    Raises:
        UserError: the GPU's memory is full.
    """
    count = max(2, math.ceil(WORKING_SET / case.bytes))
    with ExitStack() as opened:
        launches = [case.prepare(stream, kernels, opened) for _ in range(count)]

        def enqueue() -> None:
            for launch in launches:
                launch()

        enqueue()  # a kernel's first launch loads it, which cannot be captured
        stream.synchronize()
        graph = opened.enter_context(CudaGraph.capture(stream, enqueue))
        begin, end = (opened.enter_context(Event(stream.device, timing=True)) for _ in range(2))
        taken = []
        for _ in range(1 + _RUNS):
            begin.record(stream)
            graph.launch(stream)
            end.record(stream)
            end.synchronize()
            taken.append(end.seconds_since(begin))
    return min(taken[1:]) / count


def measure(cases: tuple[Preprocess | Postprocess, ...] = CASES) -> dict[str, Any]:
    """Every case against the copy rate: rates in GB/s, and the part of it.

    Raises:
        UserError: no usable GPU, or its memory is full.
    """
    copies = copy_rate()
    rows = []
    with CudaDevice.open() as device, Stream(device) as stream:
        kernels = FrameKernels.load(device)
        for case in cases:
            seconds = seconds_a_launch(stream, kernels, case)
            rate = case.bytes / seconds
            rows.append(
                {
                    "name": case.name,
                    "bytes": case.bytes,
                    "microseconds": round(1e6 * seconds, 3),
                    "gb_per_s": round(rate / 1e9, 1),
                    "of_copy": round(rate / copies, 4),
                }
            )
    return {
        "frame": {"width": FRAME[0], "height": FRAME[1]},
        "image_size": IMAGE_SIZE,
        "copy_gb_per_s": round(copies / 1e9, 1),
        "targets": TARGETS,
        "rows": rows,
    }


def table(measured: dict[str, Any]) -> str:
    """For a terminal."""
    wanted = " and ".join(f"{part:.0%} ({kernel})" for kernel, part in measured["targets"].items())
    lines = [f"copies: {measured['copy_gb_per_s']:.1f} GB/s; the kernels are to reach {wanted} of it"]
    for row in measured["rows"]:
        target = next(part for kernel, part in measured["targets"].items() if row["name"].startswith(kernel))
        verdict = "reached" if row["of_copy"] >= target else "MISSED"
        lines.append(
            f"  {row['name']:<42} {row['bytes'] / 1e6:6.1f} MB {row['microseconds']:8.1f} us "
            f"{row['gb_per_s']:8.1f} GB/s {row['of_copy']:6.1%}  {verdict}"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure, print and, with ``--json``, keep."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    reason = unavailable()
    if reason is not None:
        raise SystemExit(reason)
    environment = collect_environment()
    measured = measure()
    print(table(measured))
    if arguments.json:
        result = {"schema": 2, "kind": "kernels", "environment": environment, **measured}
        atomic_write(arguments.json, json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
