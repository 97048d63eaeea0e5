"""Child processes that run a module of this package: started alike, ended whole, and how they died in words."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import IO

from espmedsam_edge.errors import UserError

OWN_PATH = "import sys; sys.path[0] = sys.argv[1]; "
"""How the code of every child begins, whose first argument is ``PACKAGE_ROOT``.

-c puts the folder that the command is run in first on the path, where a json.py or tensorrt.py of whoever packed the
pictures may lie: the package's own folder takes its place before anything is imported but sys, which is built in.
"""
PACKAGE_ROOT = Path(__file__).resolve().parents[2]

_START = OWN_PATH + "from importlib import import_module; sys.exit(import_module(sys.argv[2]).main())"
_SAID = 300  # characters of a child's last line


def start_child(module: str, what: str, stderr: int | IO[bytes]) -> subprocess.Popen[bytes]:
    """Start a child that calls a module's ``main``; its standard input and output are pipes.

    Ctrl-C reaches this process alone, which then ends the child.

    Args:
        module: its full name.
        what: what error messages call the child.
        stderr: where its standard error goes, as for ``subprocess.Popen``.

    Raises:
        UserError: it could not be started.
    """
    try:
        return subprocess.Popen(
            [sys.executable, "-c", _START, str(PACKAGE_ROOT), module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            start_new_session=True,
        )
    except OSError as error:
        raise UserError(
            f"{what} could not be started: {error.strerror}.",
            "Free memory and processes on this machine, then try again.",
            exit_code=1,
        ) from error


def end_child(child: subprocess.Popen[bytes]) -> None:
    """End a child, and what it started: all of that is of its session. Once it was waited for, nothing."""
    if child.returncode is None:
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)


def close_pipes(child: subprocess.Popen[bytes]) -> None:
    """Close this side's ends of a child's pipes; what was not read or written any more is lost."""
    for stream in (child.stdin, child.stdout):
        if stream is not None:
            with suppress(OSError):
                stream.close()


def how_it_died(code: int, stderr: str) -> str:
    """A child's exit code and its last line of standard error, as a clause: ``crashed (SIGSEGV): bad address``."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    how = f"crashed ({signal.Signals(-code).name})" if code < 0 else f"ended with code {code} and no answer"
    return f"{how}: {lines[-1][:_SAID].rstrip('.')}" if lines else how
