"""Image files to frames: every depth, colour model and rotation to (H, W, 3) uint8 BGR, or one clear error."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from espmedsam_edge.errors import UserError
from espmedsam_edge.files import read_regular
from espmedsam_edge.imaging.geometry import Frame
from espmedsam_edge.imaging.header_errors import CUT_OFF, HeaderError, NotReadError
from espmedsam_edge.imaging.headers import ImageHeader, bare_png, image_format, read_header
from espmedsam_edge.imaging.opencv_log import quiet_opencv
from espmedsam_edge.imaging.tiff_header import TiffPages, compression_name, plain_tiff

log = logging.getLogger(__name__)

MIN_SIDE = 8
"""Pixels: nothing that a modality looks for fits in less."""

DEFAULT_MAX_PIXELS = 100_000_000
"""10,000 x 10,000: 300 MB as a frame, 400 MB more while its mask is made."""

_MAX_PIXELS_VARIABLE = "ESPMEDSAM_MAX_PIXELS"
_COLOUR = cv2.IMREAD_COLOR | cv2.IMREAD_ANYDEPTH | cv2.IMREAD_IGNORE_ORIENTATION


def read_image(path: str | Path, largest: int | None = None) -> Frame:
    """Read a JPEG, PNG, TIFF, BMP, WebP, GIF, AVIF or HEIC file, of which the first picture counts (a warning says so).

    HEIC needs the package pillow-heif (extra ``heic``).

    Grey becomes three equal channels, CMYK becomes BGR, transparency is dropped, Exif's rotation is applied.

    Samples of 16 bits are scaled to 8 by the range that they use: 0 to 2^b - 1, where b is the smallest of 8, 10, 12,
    14 and 16 that holds the largest value in the picture. So a 12-bit camera's files keep their contrast, and no
    picture is stretched by its own minimum and maximum. AVIF and packed TIFF say how many bits their samples have.

    Args:
        path: the file.
        largest: a sample of 16 bits to reckon with besides, so that pictures that belong together share a scale.

    Returns:
        (H, W, 3) uint8 BGR.

    Raises:
        UserError: no such file, not such an image, cut off or damaged, a side under 8 pixels, or more pixels than
            100 million (environment variable ``ESPMEDSAM_MAX_PIXELS``), which is checked before decoding.
    """
    path = Path(path)
    frame, header = _decode(_read(path), str(path), largest=largest or 0)
    if header.pictures > 1:
        log.warning("%s holds %d pictures; the first is read.", path, header.pictures)
    return frame


def decode_image(data: bytes, name: str = "the image", largest: int | None = None) -> Frame:
    """Decode an image file's bytes; ``name`` stands for it in errors. Everything else as ``read_image``."""
    return _decode(data, name, largest=largest or 0)[0]


def _decode(data: bytes, name: str, flags: int = _COLOUR, largest: int = 0) -> tuple[Frame, ImageHeader]:
    try:
        header = read_header(data)
    except HeaderError as error:
        raise UserError(f"cannot read {name}: {error}.", _remedy(error), exit_code=1) from error
    _check_size(header, name)
    if not header.ended:
        from espmedsam_edge.imaging.decoder_process import JPEG_END, lacks_only_its_end

        if not lacks_only_its_end(data):
            raise UserError(f"cannot read {name}: {CUT_OFF}.", _REMEDY, exit_code=1)
        data += JPEG_END
    if header.depth > 16 and flags == _COLOUR:
        fault = f"its samples have {header.depth} bits, not 8 or 16"
        raise UserError(f"cannot read {name}: {fault}.", "Convert it to 8 or 16 bits.", exit_code=1)
    if header.format == "HEIC":
        return _decode_heic(data, name), header
    quiet_opencv()
    if header.format == "TIFF":  # OpenCV turns TIFFs whatever the flag says, and before 5.0 some a tile at a time
        data = plain_tiff(data)
    elif header.format == "PNG":
        data = bare_png(data)
    try:
        pixels: Any = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    except cv2.error as error:
        raise UserError(f"cannot read {name}: {_first_line(error)}.", _REMEDY, exit_code=1) from error
    if pixels is None:
        packed = compression_name(data) if header.format == "TIFF" else None
        what = f"compression by {packed} is not read" if packed else f"its {header.format} data cannot be decoded"
        raise UserError(f"cannot read {name}: {what}.", _CONVERT if packed else _REMEDY, exit_code=1)
    if header.format == "TIFF" and _stated_scale(header):
        pixels = pixels >> 16 - header.depth  # OpenCV moves packed samples up to 16 bits
    if flags == _COLOUR:
        pixels = _to_8_bits(pixels, header, name, largest)
    return _upright(pixels, header), header


def _decode_heic(data: bytes, name: str) -> Frame:
    """By libheif, which turns the picture as the file says."""
    try:
        import pillow_heif
    except ModuleNotFoundError as error:
        raise UserError(
            f"cannot read {name}: HEIC needs the package pillow-heif.",
            "Install it (pip install pillow-heif), or convert the picture to PNG.",
            exit_code=1,
        ) from error
    try:
        picture = pillow_heif.open_heif(data, convert_hdr_to_8bit=True)
        pixels = np.asarray(picture)
    except Exception as error:
        raise UserError(f"cannot read {name}: its HEIC data cannot be decoded.", _REMEDY, exit_code=1) from error
    if pixels.ndim == 2:
        return np.asarray(cv2.cvtColor(pixels, cv2.COLOR_GRAY2BGR), np.uint8)
    return np.ascontiguousarray(pixels[..., 2::-1])


def read_samples(path: str | Path) -> NDArray[Any]:
    """Read a file's samples as they are stored, for masks and labels: no scaling, no colour model.

    Of a TIFF of 8 bits that counts down from white (MinIsWhite) as they look, which is what Pillow and most programs
    give; but as stored where ImageJ or tifffile wrote it, which mean the higher number by what they show in black. Of
    several pictures the first, and a warning says so.

    Returns:
        (H, W) or (H, W, C), upright, as stored: uint8, uint16, of a TIFF other types, too; of a palette, its colours.

    Raises:
        UserError: as ``read_image``.
    """
    path = Path(path)
    data = _read(path)
    frame, header = _decode(data, str(path), cv2.IMREAD_UNCHANGED | cv2.IMREAD_IGNORE_ORIENTATION)
    if header.pictures > 1:
        log.warning("%s holds %d pictures; the first is read.", path, header.pictures)
    looks = header.white_is_zero and frame.dtype == np.uint8  # OpenCV shows them as they look
    return 255 - frame if looks and TiffPages(bytearray(data)).means_numbers else frame


def _read_stored(path: Path) -> tuple[NDArray[Any], ImageHeader]:
    return _decode(_read(path), str(path), cv2.IMREAD_UNCHANGED | cv2.IMREAD_IGNORE_ORIENTATION)


def largest_sample(path: str | Path) -> int | None:
    """The largest sample of a PNG or TIFF whose 16-bit samples may have fewer bits; None for others, mostly told by
    their start.

    Raises:
        UserError: as ``read_image``.
    """
    path = Path(path)
    try:
        with path.open("rb") as stream:
            start = stream.read(25)
    except OSError:
        return None
    if start[24:] == b"\x10" if image_format(start) == "PNG" else image_format(start) == "TIFF":
        samples, header = _read_stored(path)
        return int(samples.max()) if samples.dtype == np.uint16 and not _stated_scale(header) else None
    return None


def file_header(path: str | Path) -> ImageHeader:
    """A picture file's header.

    Raises:
        UserError: as ``read_image``.
    """
    try:
        return read_header(_read(Path(path)))
    except HeaderError as error:
        raise UserError(f"cannot read {path}: {error}.", _remedy(error), exit_code=1) from error


def max_pixels() -> int:
    """The most pixels an image may have: ``ESPMEDSAM_MAX_PIXELS``, else 100 million.

    Raises:
        UserError: the variable is not a whole number above 0.
    """
    text = os.environ.get(_MAX_PIXELS_VARIABLE, "").strip()
    if not text:
        return DEFAULT_MAX_PIXELS
    if not text.isdecimal() or int(text) == 0:
        raise UserError(
            f"{_MAX_PIXELS_VARIABLE}={text} is not a number of pixels.", "Give a whole number, or unset it."
        )
    return int(text)


_CONVERT = "Convert it to PNG."
_REMEDY = "Copy it again, or convert it to PNG."


def _remedy(error: HeaderError) -> str:
    return _CONVERT if isinstance(error, NotReadError) else _REMEDY


def _read(path: Path) -> bytes:
    try:
        if path.exists() and not path.is_file():
            raise UserError(f"{path} is not a file.", "Name an image file.", exit_code=1)
        size = path.stat().st_size
        limit = 8 * max_pixels() + (64 << 20)  # 16-bit RGBA, and room for metadata
        if size > limit:
            raise UserError(
                f"{path} is {size / 1e9:.1f} GB, more than an image of {max_pixels()} pixels takes.",
                f"Shrink it, or raise {_MAX_PIXELS_VARIABLE}.",
                exit_code=1,
            )
        return read_regular(path)
    except FileNotFoundError as error:
        raise UserError(f"no file {path}.", "Check the name.", exit_code=1) from error
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(f"cannot read {path}: {reason}.", "Check the file and its permissions.", exit_code=1) from error


def _check_size(header: ImageHeader, name: str) -> None:
    width, height = header.width, header.height
    if min(width, height) < MIN_SIDE:
        raise UserError(
            f"{name} is {width}x{height} pixels, too small to segment.",
            f"Give an image of at least {MIN_SIDE}x{MIN_SIDE}.",
            exit_code=1,
        )
    if width * height > max_pixels():
        raise UserError(
            f"{name} is {width}x{height} pixels, over the limit of {max_pixels()}.",
            f"Shrink or cut it, or raise {_MAX_PIXELS_VARIABLE} if memory allows."
            + (" A whole slide: espmedsam-edge slide FILE" if header.format == "TIFF" else ""),
            exit_code=1,
        )


def _to_8_bits(pixels: NDArray[Any], header: ImageHeader, name: str, largest: int) -> Frame:
    if pixels.dtype == np.uint8:
        return pixels
    if pixels.dtype != np.uint16:
        raise UserError(
            f"cannot read {name}: its samples are {pixels.dtype}.", "Convert it to 8 or 16 bits a sample.", exit_code=1
        )
    scale = _stated_scale(header) or full_scale(max(largest, int(pixels.max())))
    scaled: Any = cv2.convertScaleAbs(pixels, alpha=255 / scale)
    return np.asarray(255 - scaled if header.white_is_zero else scaled, np.uint8)


def _stated_scale(header: ImageHeader) -> int | None:
    """The largest sample that the file's own number of bits can hold; None where that says nothing: 16 hold fewer."""
    return (1 << header.depth) - 1 if 8 < header.depth < 16 else None


def full_scale(largest: float) -> float:
    """The upper end of the range that samples up to ``largest`` use, from 0: 2^b - 1 with the smallest b of 8, 10, 12,
    14 and 16 that holds it; over 16 bits ``largest`` itself."""
    return next((float((1 << bits) - 1) for bits in (8, 10, 12, 14, 16) if largest < 1 << bits), largest)


def _upright(frame: Frame, header: ImageHeader) -> Frame:
    if header.orientation >= 5:
        frame = np.swapaxes(frame, 0, 1)
    if header.orientation in (2, 3, 6, 7):
        frame = frame[:, ::-1]
    if header.orientation in (3, 4, 7, 8):
        frame = frame[::-1]
    return np.ascontiguousarray(frame)


def _first_line(error: cv2.error) -> str:
    return str(error).strip().splitlines()[0][:200].rstrip(".")
