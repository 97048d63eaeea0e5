"""GDCM and CharLS in a child process: what damaged data do to them ends that process, and not this one.

GDCM throws C++ exceptions through Python, which ends the process at once, and reads beyond its tables; pyjpegls 1.5
(CharLS 2.4) counts 2^31 zero bits at the end of data that are cut off. One child decodes all frames, one at a time; it
starts with the first and again after one that killed it or took too long. Pillow and pydicom need none.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from espmedsam_edge.imaging.child import Child, no_core_dumps, receive, send

APART = frozenset({"gdcm", "pyjpegls"})
"""The plugins of pydicom that are used in the child only."""

_SECONDS, _SECONDS_A_MEGAPIXEL = 5.0, 1.0  # that a frame may take; GDCM needs 0.1 s a megapixel on a busy server


def decode(codestream: bytes, syntax: str, plugin: str, options: Mapping[str, Any]) -> NDArray[Any]:
    """One frame by one of pydicom's decoders, in this process.

    Args:
        codestream: the frame, compressed.
        syntax: its transfer syntax.
        plugin: which of pydicom's decoders.
        options: as ``pydicom.pixels.as_pixel_options`` gives them for a single frame.
    """
    from pydicom.encaps import encapsulate
    from pydicom.pixels import get_decoder

    pixels, _ = next(get_decoder(syntax).iter_array(encapsulate([codestream]), decoding_plugin=plugin, **options))
    return np.asarray(pixels)


class DecoderProcess:
    """The child; it ends with this process."""

    def __init__(self) -> None:
        self._child = Child(__name__)

    def decode(self, codestream: bytes, syntax: str, plugin: str, options: Mapping[str, Any]) -> NDArray[Any]:
        """As the function ``decode``, in the child.

        Raises:
            ValueError: the decoder refused the data.
            OSError, EOFError: it ended over them, or did not end and was ended.
        """
        question = {"syntax": syntax, "plugin": plugin, "options": dict(options)}
        seconds = _SECONDS + _SECONDS_A_MEGAPIXEL * options["rows"] * options["columns"] / 1e6
        answer, pixels = self._child.ask(question, codestream, seconds)
        if "error" in answer:
            raise ValueError(answer["error"])
        frame: NDArray[Any] = np.frombuffer(pixels, answer["dtype"]).reshape(answer["shape"])
        return frame

    def close(self) -> None:
        """End the child, if there is one."""
        self._child.close()


def main() -> None:
    """The child: a frame in, its pixels or the reason against it out, until the parent is gone."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # for native code that prints
    no_core_dumps()
    from pydicom import pixels as _loaded  # noqa: F401

    send(answers, {"ready": True})
    while True:
        try:
            question, codestream = receive(sys.stdin.buffer)
        except EOFError:
            return
        try:
            pixels = np.ascontiguousarray(decode(codestream, **question))
        except Exception as error:  # noqa: BLE001 (the parent raises it again)
            send(answers, {"error": str(error)})
        else:
            send(answers, {"dtype": pixels.dtype.str, "shape": pixels.shape}, pixels.tobytes())
