"""The kernels as calls: frames to the network's input, logits to a frame's mask, overlay and measures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from espmedsam_edge.bundle import Normalization
from espmedsam_edge.errors import UserError
from espmedsam_edge.imaging.geometry import logit
from espmedsam_edge.imaging.overlay import OverlayStyle, outline_width
from espmedsam_edge.runtime.cuda.device import CudaDevice
from espmedsam_edge.runtime.cuda.module import KernelModule
from espmedsam_edge.runtime.cuda.stream import Stream
from espmedsam_edge.runtime.kernels import parameters
from espmedsam_edge.runtime.kernels.cu_sources import KERNELS, kernel_source
from espmedsam_edge.runtime.kernels.frame_view import FrameView

FP32_BYTES = 4


@dataclass(frozen=True)
class Canvas:
    """What is made of one frame, all as addresses on the GPU; 0 leaves an output out.

    Attributes:
        view: the frame: its size, and its pixels for the overlay.
        logits: (h, w) float32, C order.
        mask: (H, W) uint8, 0 or 255.
        mask_pitch: bytes from row to row; a multiple of 16 not under W.
        overlay: (H, W, 3) uint8 BGR; may not be the frame itself.
        overlay_pitch: bytes from row to row; a multiple of 48 not under 3·W.
        measures: a ``parameters.Measures``.
        totals: scratch for the measures: a ``parameters.Totals``, zero before the first launch.
    """

    view: FrameView
    logits: int
    mask: int = 0
    mask_pitch: int = 0
    overlay: int = 0
    overlay_pitch: int = 0
    measures: int = 0
    totals: int = 0


class FrameKernels:
    """Preprocess and postprocess. Enqueues only; safe inside a graph's capture."""

    def __init__(self, preprocess: KernelModule, postprocess: KernelModule) -> None:
        self._preprocess = preprocess
        self._postprocess = postprocess

    @classmethod
    def load(cls, device: CudaDevice, cache: str | Path | None = None) -> FrameKernels:
        """Load the kernels on a device, compiling them where the cache has none; the device's ``close`` frees them.

        Args:
            device: where.
            cache: the cache folder; None: $ESPMEDSAM_CACHE, else the user's.

        Raises:
            UserError: no NVRTC, or the driver refuses what it made.
        """
        return cls(*(KernelModule.load(device, kernel_source(name), cache) for name in KERNELS))

    def preprocess(
        self,
        stream: Stream,
        frames: Sequence[FrameView],
        out: int,
        image_size: int,
        normalization: Normalization,
    ) -> None:
        """Frames of any formats and sizes to the network's input; ``imaging.geometry.preprocess`` is the reference.

        Args:
            stream: where.
            frames: one for each row of the batch from the first; further rows are left alone.
            out: address of (B, 3, S, S) float32: RGB planes.
            image_size: S.
            normalization: RGB mean and std for 0..1 values.
        """
        across, down = parameters.tiles((image_size, image_size), parameters.PREPROCESS_TILE)
        values = parameters.Preprocess(size=image_size)
        for channel, (mean, std) in enumerate(zip(normalization.mean, normalization.std, strict=True)):
            values.scale[channel] = np.float32(1 / (255 * std))
            values.shift[channel] = -np.float32(mean / std)
        row = 3 * image_size * image_size * FP32_BYTES
        remaining = iter(frames)
        while group := list(islice(remaining, parameters.MAX_FRAMES)):
            values.out, values.count = out, len(group)
            for index, view in enumerate(group):
                values.frames[index] = view.parameters()
            self._preprocess.launch(
                stream, "preprocess", (across, down, len(group)), parameters.PREPROCESS_BLOCK, values
            )
            out += row * len(group)

    def postprocess(
        self,
        stream: Stream,
        canvases: Sequence[Canvas],
        logits_size: tuple[int, int],
        threshold: float,
        style: OverlayStyle,
    ) -> None:
        """Logits to what each canvas has room for, at the frames' sizes, in one pass.

        The references are ``imaging.geometry.mask_from_logits``, ``imaging.overlay.draw_overlay``
        without its notice, and ``Segmentation``'s measures.

        Args:
            stream: where.
            canvases: one a frame.
            logits_size: (h, w).
            threshold: the probability, between 0 and 1, from which a pixel is foreground.
            style: of the overlay.

        Raises:
            UserError: a frame too large for its outline to be drawn.
        """
        height, width = logits_size
        values = parameters.Postprocess(
            logits_height=height, logits_width=width, level=np.float32(logit(threshold)), opacity=style.opacity
        )
        for channel, level in enumerate(style.color):
            values.color[channel] = level
        remaining = iter(canvases)
        while group := list(islice(remaining, parameters.MAX_FRAMES)):
            values.count = len(group)
            across = down = 0
            for index, canvas in enumerate(group):
                values.canvases[index] = _parameters(canvas, style)
                tiles = parameters.tiles((canvas.view.width, canvas.view.height), parameters.POSTPROCESS_TILE)
                across, down = max(across, tiles[0]), max(down, tiles[1])
            grid = (across, down, len(group))
            self._postprocess.launch(stream, "postprocess", grid, parameters.POSTPROCESS_BLOCK, values)


def _parameters(canvas: Canvas, style: OverlayStyle) -> parameters.Canvas:
    outline = outline_width(canvas.view.size) if style.outline and canvas.overlay else 0
    if outline > parameters.MAX_OUTLINE:
        raise UserError(
            f"a frame of {canvas.view.width}x{canvas.view.height} pixels is too large to draw an outline on the GPU.",
            "Shrink it, or draw the overlay without an outline.",
        )
    return parameters.Canvas(
        frame=canvas.view.parameters(),
        logits=canvas.logits,
        mask=canvas.mask,
        overlay=canvas.overlay,
        measures=canvas.measures,
        totals=canvas.totals,
        mask_pitch=canvas.mask_pitch,
        overlay_pitch=canvas.overlay_pitch,
        outline=outline,
    )
