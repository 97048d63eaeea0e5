"""Compressed DICOM frames to pixels: which decoders there are, in which order they are tried, and how much a frame may
unpack to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from espmedsam_edge.errors import UserError
from espmedsam_edge.machine.installation import install_command, installed
from espmedsam_edge.runtime.dicom.codestreams import (
    FrameSize,
    bare_codestream,
    check_rle,
    is_whole,
    mixes_colours,
    size_of,
)
from espmedsam_edge.runtime.dicom.decoder_process import APART, DecoderProcess, decode
from espmedsam_edge.runtime.dicom.stored import check_colours

# The order in which decoders are tried: first those that are tested most against damaged data.
_DECODERS = ("pillow", "gdcm", "pyjpegls", "pylibjpeg", "pydicom")
_decoder_process = DecoderProcess()


class FrameDecoder:
    """Decodes the frames of one file, each once its own header was found to fit the file's.

    Args:
        path: the file, for messages.
        dataset: its header, of a compressed transfer syntax.
        size: (H, W) of a frame.
        apart: decoders that crash run in a process of their own; False: this is such a process.

    Raises:
        UserError: no decoder is here for it, or its colours are none that are read.
    """

    def __init__(self, path: Path, dataset: Any, size: tuple[int, int], *, apart: bool = True) -> None:
        from pydicom.pixels import as_pixel_options
        from pydicom.uid import RLELossless

        self._path, self._dataset, self._size, self._apart = path, dataset, size, apart
        self._order = _decoders(path, dataset)
        check_colours(path, dataset)
        self._options = as_pixel_options(dataset, number_of_frames=1)
        self._options.pop("extended_offsets", None)
        if dataset.file_meta.TransferSyntaxUID != RLELossless and int(dataset.get("SamplesPerPixel") or 1) > 1:
            # As decoders give colours, whatever the header says of the stored ones.
            self._options["planar_configuration"] = 0

    def decode(self, data: bytes) -> NDArray[Any]:
        """A frame's pixels, as they are stored.

        Raises:
            UserError: it is of another size than the header says.
            Exception: whatever decoders raise.
        """
        codestream = _fitting(self._path, data, self._dataset, self._size)
        if mixes_colours(codestream):
            self._options["photometric_interpretation"] = "RGB"
        return np.asarray(self._by_the_first_that_can(codestream))

    def _by_the_first_that_can(self, codestream: bytes) -> Any:
        """A frame by the first decoder that reads it, which then goes first.

        A decoder may refuse what is whole and only unusual, as signed JPEG-LS or RGB in JPEG without its marker. What
        is not whole is not offered to the others: some of them fill the rest with grey.
        """
        syntax, order = self._dataset.file_meta.TransferSyntaxUID, self._order
        refusal: Exception | None = None
        for plugin in list(order):
            try:
                by = _decoder_process.decode if self._apart and plugin in APART else decode
                pixels = by(codestream, syntax, plugin, self._options)
            except UserError:
                raise
            except Exception as error:  # noqa: BLE001 (of any kind; the first is raised again)
                refusal = refusal or error
                if not is_whole(codestream):
                    break
            else:
                order.remove(plugin)
                order.insert(0, plugin)
                return pixels
        assert refusal is not None
        raise refusal


def _fitting(path: Path, data: bytes, dataset: Any, size: tuple[int, int]) -> bytes:
    """A frame's codestream, if it unpacks to what the file's header says and to no more."""
    from pydicom.uid import RLELossless

    if dataset.file_meta.TransferSyntaxUID == RLELossless:
        check_rle(data, size[0] * size[1])
        return data
    codestream = bare_codestream(data)
    expected = FrameSize(size[1], size[0], int(dataset.get("SamplesPerPixel") or 1))
    found = size_of(codestream)
    if found != expected:
        raise UserError(
            f"cannot read {path}: by its header a frame is {expected}, by its compressed data {found}.",
            "Export it anew from the archive.",
            exit_code=1,
        )
    return codestream


def _decoders(path: Path, dataset: Any) -> list[str]:
    """Which of pydicom's decoders to try, in order."""
    from pydicom.pixels import get_decoder

    syntax = dataset.file_meta.TransferSyntaxUID
    bits, remedy = int(dataset.get("BitsStored") or 0), "Convert it to an uncompressed transfer syntax."
    try:
        available = get_decoder(syntax).available_plugins
        remedy = remedy if available else f"Install them: {install_command('dicom')}"
    except NotImplementedError:
        available = ()
    usable = [name for name in _DECODERS if name in available and not _refused(name, syntax, bits)]
    if usable:
        return usable
    raise UserError(
        f"cannot read {path}: there is no decoder here for {syntax_name(syntax)} of {bits} bits.", remedy, exit_code=1
    )


def _refused(plugin: str, syntax: str, bits: int | None) -> bool:
    """What a decoder has no part for: libjpeg more than 8 bits, and GDCM in pydicom JPEG-LS of 6 and 7."""
    from pydicom.uid import JPEGExtended12Bit, JPEGLSTransferSyntaxes

    if syntax == JPEGExtended12Bit:
        return plugin in ("pillow", "gdcm") and bits != 8
    return plugin == "gdcm" and syntax in JPEGLSTransferSyntaxes and bits in (6, 7)


def syntax_name(syntax: Any) -> str:
    """A transfer syntax in words; whatever else stands in its place is not quoted."""
    return "an unknown transfer syntax" if syntax.name == str(syntax) else str(syntax.name)


def decoders() -> dict[str, bool]:
    """For each kind of compression whether a decoder is installed; empty without pydicom."""
    if not installed("pydicom"):
        return {}
    from pydicom.pixels import get_decoder
    from pydicom.uid import HTJ2K, JPEG2000, JPEGBaseline8Bit, JPEGLosslessSV1, JPEGLSLossless, RLELossless

    kinds = {
        "JPEG": JPEGBaseline8Bit,
        "lossless JPEG": JPEGLosslessSV1,
        "JPEG-LS": JPEGLSLossless,
        "JPEG 2000": JPEG2000,
        "HTJ2K": HTJ2K,
        "RLE": RLELossless,
    }
    return {name: get_decoder(syntax).is_available for name, syntax in kinds.items()}
