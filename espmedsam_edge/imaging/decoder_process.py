"""Strangers' pictures, decoded in a child process with limits of time and memory."""

from __future__ import annotations

import os
import sys
from typing import Any

import cv2
import numpy as np

from espmedsam_edge.errors import UserError
from espmedsam_edge.imaging.child import Child, limit_memory, no_core_dumps, receive, send
from espmedsam_edge.imaging.decode import decode_image
from espmedsam_edge.imaging.geometry import Frame

SECONDS = 5.0
"""That a picture may take."""

_MEMORY = 2 << 30
_CHEAP = ("JPEG", "PNG", "BMP")  # the decoders of which cost no more than their pixels and bytes
_CHEAP_PIXELS, _CHEAP_BYTES = 1 << 20, 1 << 20


def is_cheap(form: str, pixels: int, size: int) -> bool:
    """Whether a picture cannot take long: small, and of a format whose headers bound what decoding costs."""
    return form in _CHEAP and pixels <= _CHEAP_PIXELS and size <= _CHEAP_BYTES


JPEG_END = b"\xff\xd9"
_MORE = (bytes(range(1, 251, 3)), bytes(range(250, 0, -3)), bytes(64), b"\xfe" * 64)  # as if the picture went on
_looker = Child(__name__)
_is_child = False


def lacks_only_its_end(data: bytes) -> bool:
    """Whether a JPEG of one scan without its end mark holds all of its picture, as viewers then show it.

    Decoders put grey where a picture ends too soon. So it is decoded with its end and with more before that: where it
    is whole, what comes after it changes nothing.
    """
    if _is_child:
        shown = _shown(data + JPEG_END)
        return shown is not None and all(np.array_equal(shown, _shown(data + more + JPEG_END)) for more in _MORE)
    try:  # libjpeg says on standard error what it thinks of it
        answer, _ = _looker.ask({"look": True}, data, 2 * SECONDS)
    except (OSError, EOFError):
        return False
    return bool(answer.get("whole"))


def _shown(data: bytes) -> Any:
    return cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)


class PictureDecoder:
    """Decodes one picture at a time, as ``decode_image`` does, in its child."""

    def __init__(self) -> None:
        self._child, self._closed = Child(__name__), False

    def decode(self, data: bytes) -> Frame:
        """(H, W, 3) uint8 BGR.

        Raises:
            UserError: as ``decode_image``; or it took too long, or too much memory, or the decoder crashed.
        """
        if self._closed:
            raise UserError("the server is stopping.", "Try again later.", exit_code=1)
        try:
            answer, pixels = self._child.ask({}, data, SECONDS)
        except (OSError, EOFError):
            raise UserError(
                f"cannot read the image: decoding it took more than {SECONDS:g} seconds, or ended the decoder.",
                "Send it as PNG.",
                exit_code=1,
            ) from None
        if "error" in answer:
            raise UserError(answer["error"], answer["hint"], exit_code=1)
        frame: Frame = np.frombuffer(pixels, np.uint8).reshape(answer["shape"])
        return frame

    def start(self) -> None:
        """Start the child now."""
        self._child.start()

    def close(self) -> None:
        """End the child for good; a picture that is being decoded is refused."""
        self._closed = True
        self._child.close()


def main() -> None:
    """The child: a file in, its frame or the reason against it out, until the parent is gone."""
    global _is_child
    _is_child = True
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # for native code that prints
    no_core_dumps()
    cv2.setNumThreads(1)
    limit_memory(_MEMORY)
    send(answers, {"ready": True})
    while True:
        try:
            question, data = receive(sys.stdin.buffer)
        except EOFError:
            return
        try:
            if question.get("look"):
                send(answers, {"whole": lacks_only_its_end(data)})
                continue
            frame = np.ascontiguousarray(decode_image(data))
        except UserError as error:
            send(answers, {"error": error.message, "hint": error.hint})
        except MemoryError:
            send(answers, {"error": "cannot read the image: it takes too much memory.", "hint": "Shrink it."})
        else:
            send(answers, {"shape": frame.shape}, frame.tobytes())
