"""What is written to and never replaced by a file: FIFOs, sockets, terminals, /dev/null, /dev/stdout."""

from __future__ import annotations

import os
import re
import socket
import stat
from pathlib import Path
from typing import BinaryIO, cast

STANDARD_OUTPUT = Path("/dev/stdout")
_STANDARD = {"/dev/stdout": 1, "/dev/stderr": 2}
_DESCRIPTOR = re.compile(r"/(?:dev|proc/(?:self|thread-self|\d+))/fd/(\d+)")


def is_pipe(path: Path) -> bool:
    """Whether what stands at a path takes bytes and keeps none, so that it must be written to as it is.

    Names of this process's own open files (/dev/stdout, /dev/fd/3) count, whatever they were opened on.
    """
    if _descriptor(path) is not None:
        return True
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError):
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode) or stat.S_ISCHR(mode)


def is_standard_output(path: str | Path | None) -> bool:
    """Whether a place is standard output, by whatever name; the program's own lines go to standard error then."""
    return path is not None and (str(path) == "-" or _descriptor(Path(path)) == 1)


def open_pipe(path: Path) -> BinaryIO:
    """Open it for writing; a FIFO waits for its reader.

    Raises:
        OSError: nobody listens, or it may not be written to.
    """
    descriptor = _descriptor(path)
    if descriptor is not None:
        return open(os.dup(descriptor), "wb")
    if stat.S_ISSOCK(path.stat().st_mode):
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(str(path))
            return cast(BinaryIO, connection.makefile("wb"))
    return open(os.open(path, os.O_WRONLY | os.O_CLOEXEC | os.O_NOCTTY), "wb")


def _descriptor(path: Path) -> int | None:
    """The number of this process's open file that a path names."""
    name = os.path.abspath(path)
    if name in _STANDARD:
        return _STANDARD[name]
    match = _DESCRIPTOR.fullmatch(name)
    own = not name.startswith("/proc/") or name.split("/")[2] in ("self", "thread-self", str(os.getpid()))
    return int(match[1]) if match and own else None
