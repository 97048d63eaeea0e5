"""A frame where it lies in memory: pixel format, size, rows and what its numbers mean."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from enum import IntEnum

from espmedsam_edge.errors import UserError
from espmedsam_edge.imaging.crop import Crop
from espmedsam_edge.runtime.kernels.parameters import MAX_SIDE
from espmedsam_edge.runtime.kernels.parameters import Frame as FrameParameters
from espmedsam_edge.runtime.segmentation import DoesNotFit


class PixelFormat(IntEnum):
    """How a frame's pixels are stored; the numbers are those of frames.cuh."""

    BGR8 = 0
    RGB8 = 1
    GRAY8 = 2
    GRAY16 = 3
    NV12 = 4

    @property
    def bytes_per_pixel(self) -> int:
        """Of a row; in NV12, of a row of luma."""
        return {"BGR8": 3, "RGB8": 3, "GRAY16": 2}.get(self.name, 1)

    def shape(self, width: int, height: int) -> tuple[int, ...]:
        """The shape of an array that holds such a frame; NV12's chroma rows follow its luma rows."""
        if self is PixelFormat.NV12:
            return (height * 3 // 2, width)
        return (height, width, 3) if self.bytes_per_pixel == 3 else (height, width)

    @property
    def dtype(self) -> str:
        """Of that array's elements."""
        return "uint16" if self is PixelFormat.GRAY16 else "uint8"


_ONE = 1 << 20


@dataclass(frozen=True)
class YuvMatrix:
    """How Y, U and V become R, G and B, in units of 2^-20; chroma counts from 128.

    R = (Y - luma_offset)·luma_gain + V·red_v, and so on, cut to 0..255.
    """

    luma_offset: int
    luma_gain: int
    red_v: int
    green_u: int
    green_v: int
    blue_u: int

    @classmethod
    def of(cls, red: float, blue: float, *, full_range: bool) -> YuvMatrix:
        """From the luma weights of red and blue that a standard gives.

        Args:
            red: Kr, 0.2126 in BT.709.
            blue: Kb, 0.0722 in BT.709.
            full_range: Y from 0 to 255 and chroma ±127.5 (JPEG) rather than 16 to 235 and ±112 (video).
        """
        luma, chroma = (1.0, 1.0) if full_range else (255 / 219, 255 / 224)
        green = 1 - red - blue
        values = (
            luma,
            2 * (1 - red) * chroma,
            -2 * (1 - blue) * chroma * blue / green,
            -2 * (1 - red) * chroma * red / green,
            2 * (1 - blue) * chroma,
        )
        return cls(0 if full_range else 16, *(round(value * _ONE) for value in values))


# OpenCV's own numbers for COLOR_YUV2BGR_NV12, BT.601 in video range to three decimals: the same pixels, bit for bit.
BT601 = YuvMatrix(16, 1220542, 1673527, -409993, -852492, 2116026)
BT601_FULL = YuvMatrix.of(0.299, 0.114, full_range=True)
BT709 = YuvMatrix.of(0.2126, 0.0722, full_range=False)
BT709_FULL = YuvMatrix.of(0.2126, 0.0722, full_range=True)


@dataclass(frozen=True)
class FrameView:
    """A frame in memory that the GPU reaches.

    Attributes:
        format: how pixels are stored.
        width: in pixels.
        height: in pixels.
        pixels: address of the first row; in NV12, of luma.
        pitch: bytes from row to row.
        chroma: NV12: address of the U, V pairs, one for two columns and two rows.
        chroma_pitch: NV12: bytes from one row of pairs to the next.
        window: GRAY16: the samples shown as black and as white; those outside are cut.
        matrix: NV12: how it becomes RGB.
        owner: what keeps the memory alive.

    Raises:
        UserError: not a frame that the kernels can read.
    """

    format: PixelFormat
    width: int
    height: int
    pixels: int
    pitch: int
    chroma: int = 0
    chroma_pitch: int = 0
    window: tuple[float, float] = (0.0, 65535.0)
    matrix: YuvMatrix = BT601
    owner: object = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_size(self.format, self.width, self.height)
        row = self.width * self.format.bytes_per_pixel
        if self.pitch < row or (self.format is PixelFormat.NV12 and self.chroma_pitch < self.width):
            shortest = min(self.pitch, self.chroma_pitch) if self.format is PixelFormat.NV12 else self.pitch
            raise UserError(
                f"a {self.format.name} frame of {self.width} columns has rows of {row} bytes, not {shortest}.",
                "Give the pitch in bytes from one row to the next.",
            )
        if self.format is PixelFormat.GRAY16:
            if self.pixels % 2 or self.pitch % 2:
                raise UserError("a GRAY16 frame starts at an odd address or has an odd pitch.", "Copy it once.")
            if not self.window[0] < self.window[1]:
                raise UserError(f"window {self.window} of a GRAY16 frame is empty.", "Give black, then white.")

    @property
    def size(self) -> tuple[int, int]:
        """(H, W) in pixels."""
        return self.height, self.width

    def cropped(self, crop: Crop) -> FrameView:
        """A part of it, read in place: the same rows from further on.

        Raises:
            UserError: not inside the frame, or of odd places or sides in NV12.
        """
        crop.check(self.size)
        if self.format is PixelFormat.NV12 and any(side % 2 for side in crop):
            raise UserError(
                f"crop {crop} of an NV12 frame: it has one colour for two columns and two rows.", "Give even numbers."
            )
        return replace(
            self,
            width=crop.width,
            height=crop.height,
            pixels=self.pixels + crop.y * self.pitch + crop.x * self.format.bytes_per_pixel,
            chroma=self.chroma and self.chroma + crop.y // 2 * self.chroma_pitch + crop.x,
        )

    def parameters(self) -> FrameParameters:
        """As the kernels take it."""
        gain = 255 / (self.window[1] - self.window[0])
        return FrameParameters(
            pixels=self.pixels,
            chroma=self.chroma,
            pitch=self.pitch,
            chroma_pitch=self.chroma_pitch,
            width=self.width,
            height=self.height,
            format=int(self.format),
            gain=gain,
            bias=-self.window[0] * gain,
            **asdict(self.matrix),
        )


def check_size(pixels: PixelFormat, width: int, height: int) -> None:
    """Refuse a size that frames of a format cannot have.

    Raises:
        DoesNotFit: too large.
        UserError: empty, or odd in NV12.
    """
    if width < 1 or height < 1:
        raise UserError(f"a frame of {width}x{height} pixels is empty.", "Give a frame of at least one pixel.")
    if max(width, height) > MAX_SIDE:
        raise DoesNotFit(
            f"a frame of {width}x{height} pixels is too large for the GPU.",
            f"There sides are 1 to {MAX_SIDE} pixels; --backend onnxruntime takes larger ones.",
            exit_code=1,
        )
    if pixels is PixelFormat.NV12 and (width % 2 or height % 2):
        raise UserError(
            f"an NV12 frame of {width}x{height} pixels: it has one colour for two columns and two rows.",
            "Crop or pad it to an even width and height, or let the decoder give BGR.",
        )


def view_of_array(
    pixels: PixelFormat | None,
    address: int,
    shape: tuple[int, ...],
    strides: tuple[int, ...] | None,
    dtype: str,
    owner: object = None,
) -> FrameView:
    """The frame that an array holds.

    Args:
        pixels: its format; None: BGR8 for (H, W, 3), GRAY8 or GRAY16 for (H, W) by its dtype.
        address: of the first element.
        shape: (H, W, 3), (H, W), or (3·H/2, W) in NV12.
        strides: in bytes; None: C order. Rows may be any distance apart, pixels must be neighbours.
        dtype: ``uint8`` or ``uint16``.
        owner: what keeps the memory alive.

    Raises:
        UserError: not such an array.
    """
    if pixels is None:
        pixels = PixelFormat.BGR8 if len(shape) == 3 else PixelFormat.GRAY16 if dtype == "uint16" else PixelFormat.GRAY8
    item = 2 if dtype == "uint16" else 1
    expected = (
        pixels.shape(shape[1], shape[0] * 2 // 3 if pixels is PixelFormat.NV12 else shape[0]) if shape[1:] else ()
    )
    if tuple(shape) != expected or dtype != pixels.dtype:
        wanted = {3: "(height, width, 3)", 2: "(height, width)", 1: "(height, width)"}[pixels.bytes_per_pixel]
        if pixels is PixelFormat.NV12:
            wanted = "(height * 3 / 2, width)"
        raise UserError(
            f"a {pixels.name} frame is a {pixels.dtype} array of shape {wanted}; got {dtype} {tuple(shape)}.",
            "Name its pixel format, or convert it.",
        )
    if strides is None:
        strides = (shape[1] * pixels.bytes_per_pixel, pixels.bytes_per_pixel, item)[: len(shape)]
    neighbours = zip(shape[1:], strides[1:], (pixels.bytes_per_pixel, item), strict=False)
    if strides[0] < 0 or any(side > 1 and stride != wanted for side, stride, wanted in neighbours):
        raise UserError(
            f"a {pixels.name} frame with strides {tuple(strides)}: its pixels are not neighbours.",
            "Give rows from left to right, top to bottom; copy a flipped or transposed array first.",
        )
    pitch = strides[0] if shape[0] > 1 else shape[1] * pixels.bytes_per_pixel
    if pixels is not PixelFormat.NV12:
        return FrameView(pixels, shape[1], shape[0], address, pitch, owner=owner)
    height = shape[0] * 2 // 3
    return FrameView(pixels, shape[1], height, address, pitch, address + height * pitch, pitch, owner=owner)
