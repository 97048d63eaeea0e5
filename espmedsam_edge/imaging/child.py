"""A child process that decodes: asked through pipes, ended when an answer takes too long, started again when needed.

Decoders are written in C and read what strangers made. A child that hangs or dies over a file takes nothing with it.
"""

from __future__ import annotations

import atexit
import json
import math
import signal
import struct
import subprocess
import threading
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from espmedsam_edge.errors import UserError
from espmedsam_edge.machine.children import start_child

_LENGTHS = struct.Struct("<IQI")  # of the message's text and bytes; and seconds after which the answer is late
_LATE = 10  # seconds more, after which a child ends itself: whoever would have ended it is gone
_armed = False


class Child:
    """The child; it ends with this process, or when it is closed.

    Args:
        module: of this package; its ``main`` sends ``{"ready": true}``, then an answer to each question.
    """

    def __init__(self, module: str) -> None:
        self._module = module
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.RLock()
        atexit.register(self.close)

    def ask(self, question: Mapping[str, Any], data: bytes, seconds: float) -> tuple[dict[str, Any], bytes]:
        """An answer, as JSON and bytes; one question at a time.

        Raises:
            OSError, EOFError: the child ended over it, or did not answer in time and was ended.
            UserError: it could not be started.
        """
        with self._lock:
            process = self._running()
            timer = threading.Timer(seconds, process.kill)
            timer.start()
            answered = False
            try:
                send(process.stdin, question, data, math.ceil(seconds) + _LATE)
                answer = receive(process.stdout)
                answered = True
            finally:
                timer.cancel()
                if not answered:
                    self.close()
        return answer

    def start(self) -> None:
        """Start it now, so that the first question need not wait for that."""
        with self._lock, suppress(UserError, OSError, EOFError):  # the first question tells
            self._running()

    def close(self) -> None:
        """End the child, if there is one; a question that waits for its answer ends with EOFError."""
        process = self._process
        if process is not None:
            process.kill()  # before the lock: whoever waits for an answer holds it
        with self._lock:
            process, self._process = self._process, None
            if process is not None:
                process.kill()
                with suppress(BrokenPipeError), process:  # closes the pipes and waits
                    pass

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            # Decoders write to standard error what they think of the data.
            process = start_child(self._module, "the decoder's process", subprocess.DEVNULL)
            receive(process.stdout)  # ready: starting does not count
            self._process = process
        return self._process


def send(stream: IO[bytes] | None, message: Mapping[str, Any], data: bytes = b"", seconds: int = 0) -> None:
    """Write a message: JSON, and bytes; ``seconds``: of a question, after which the child shall end over it."""
    assert stream is not None
    if _armed:
        signal.alarm(0)
    text = json.dumps(message).encode()
    stream.write(_LENGTHS.pack(len(text), len(data), seconds))
    stream.write(text)
    stream.write(data)
    stream.flush()


def receive(stream: IO[bytes] | None) -> tuple[dict[str, Any], bytes]:
    """Read a message; a question's time begins to run.

    Raises:
        EOFError: the other side has ended.
    """
    global _armed
    assert stream is not None
    size, length, seconds = _LENGTHS.unpack(_exactly(stream, _LENGTHS.size))
    message = json.loads(_exactly(stream, size)), _exactly(stream, length)
    if seconds and hasattr(signal, "alarm"):
        _armed = True
        signal.alarm(seconds)  # ends the process, whatever its decoder is at
    return message


def _exactly(stream: IO[bytes], size: int) -> bytes:
    data = stream.read(size)
    if len(data) != size:
        raise EOFError("the decoder's process ended")
    return data


def no_core_dumps() -> None:
    """In the child: what is left when it crashes would hold the picture."""
    with suppress(ImportError):
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def limit_memory(more: int) -> None:
    """In the child: so many bytes of address space beyond those of now; nothing where that cannot be had."""
    with suppress(ImportError, OSError, ValueError):
        import resource

        now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now + more, now + more))
