"""GDCM and CharLS in a child process: what damaged data do to them ends that process, and not this one.

GDCM throws C++ exceptions through Python, which ends the process at once, and reads beyond its tables; pyjpegls 1.5
(CharLS 2.4) counts 2^31 zero bits at the end of data that are cut off. One child decodes all frames, one at a time; it
starts with the first and again after one that killed it or took too long. Pillow and pydicom need none.
"""

from __future__ import annotations

import atexit
import json
import os
import struct
import subprocess
import sys
import threading
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from espmedsam_edge.errors import UserError

APART = frozenset({"gdcm", "pyjpegls"})
"""The plugins of pydicom that are used in the child only."""

_SECONDS, _SECONDS_A_MEGAPIXEL = 5.0, 1.0  # that a frame may take; GDCM needs 0.1 s a megapixel on a busy server
# -c puts the folder that the command is run in first on the path; this package's own goes before it.
_START = "import sys; sys.path[0] = sys.argv[1]; from espmedsam_edge.runtime.dicom.decoder_process import main; main()"
_PACKAGE_ROOT = Path(__file__).resolve().parents[3]
_LENGTHS = struct.Struct("<IQ")


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
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()
        atexit.register(self.close)

    def decode(self, codestream: bytes, syntax: str, plugin: str, options: Mapping[str, Any]) -> NDArray[Any]:
        """As the function ``decode``, in the child.

        Raises:
            ValueError: the decoder refused the data.
            OSError, EOFError: it ended over them, or did not end and was ended.
        """
        question = {"syntax": syntax, "plugin": plugin, "options": dict(options)}
        seconds = _SECONDS + _SECONDS_A_MEGAPIXEL * options["rows"] * options["columns"] / 1e6
        with self._lock:
            process = self._running()
            timer = threading.Timer(seconds, process.kill)
            timer.start()
            answered = False
            try:
                _send(process.stdin, question, codestream)
                answer, pixels = _receive(process.stdout)
                answered = True
            finally:
                timer.cancel()
                if not answered:
                    self.close()
        if "error" in answer:
            raise ValueError(answer["error"])
        frame: NDArray[Any] = np.frombuffer(pixels, answer["dtype"]).reshape(answer["shape"])
        return frame

    def close(self) -> None:
        """End the child, if there is one."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            with suppress(BrokenPipeError), process:  # closes the pipes and waits
                pass

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            try:
                process = subprocess.Popen(
                    [sys.executable, "-c", _START, str(_PACKAGE_ROOT)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,  # decoders write there what they think of the data
                    start_new_session=True,  # Ctrl-C is for this process
                )
            except OSError as error:
                raise UserError(
                    f"the decoder's process could not be started: {error.strerror}.",
                    "Free memory and processes on this machine, then try again.",
                    exit_code=1,
                ) from error
            _receive(process.stdout)  # ready: starting does not count
            self._process = process
        return self._process


def _send(stream: IO[bytes] | None, message: Mapping[str, Any], data: bytes = b"") -> None:
    assert stream is not None
    text = json.dumps(message).encode()
    stream.write(_LENGTHS.pack(len(text), len(data)))
    stream.write(text)
    stream.write(data)
    stream.flush()


def _receive(stream: IO[bytes] | None) -> tuple[dict[str, Any], bytes]:
    assert stream is not None
    size, length = _LENGTHS.unpack(_exactly(stream, _LENGTHS.size))
    return json.loads(_exactly(stream, size)), _exactly(stream, length)


def _exactly(stream: IO[bytes], size: int) -> bytes:
    data = stream.read(size)
    if len(data) != size:
        raise EOFError("the decoder's process ended")
    return data


def main() -> None:
    """The child: a frame in, its pixels or the reason against it out, until the parent is gone."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # for native code that prints
    with suppress(ImportError):
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a core dump would hold the picture
    from pydicom import pixels as _loaded  # noqa: F401

    _send(answers, {"ready": True})
    while True:
        try:
            question, codestream = _receive(sys.stdin.buffer)
        except EOFError:
            return
        try:
            pixels = np.ascontiguousarray(decode(codestream, **question))
        except Exception as error:  # noqa: BLE001 (the parent raises it again)
            _send(answers, {"error": str(error)})
        else:
            _send(answers, {"dtype": pixels.dtype.str, "shape": pixels.shape}, pixels.tobytes())
