"""Runs of the command that can be killed at any moment, forked from one process that has imported everything."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

_FORK = """
import json, os, sys, threading, time, traceback
from importlib import import_module
from espmedsam_edge.cli import main
for name in sys.argv[1:]:
    import_module(name)

def set_back():
    now, now_ns = time.time, time.time_ns
    time.time, time.time_ns = lambda: now() - 3600, lambda: now_ns() - 3600 * 10**9

print("ready", flush=True)
for line in sys.stdin:
    folder, said, arguments, back = json.loads(line)
    child = os.fork()
    if child == 0:
        code = 70
        try:
            os.chdir(folder)
            for number, name in enumerate((os.devnull, f"{said}/out", f"{said}/err")):
                os.dup2(os.open(name, os.O_RDWR | os.O_CREAT | os.O_TRUNC), number)
            if back is not None:
                timer = threading.Timer(back, set_back)
                timer.daemon = True
                timer.start()
            main(arguments)
        except SystemExit as ended:
            code = ended.code or 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(code)
    print(child, flush=True)
    status = os.waitpid(child, 0)[1]
    print(-os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status), flush=True)
"""
WARM = (
    "onnxruntime",
    "espmedsam_edge.cli.infer",
    "espmedsam_edge.cli.slide",
    "espmedsam_edge.cli.push",
    "espmedsam_edge.runtime.inference",
    "espmedsam_edge.runtime.backends.onnxruntime_backend",
    "espmedsam_edge.runtime.sinks.recording",
)


@dataclass(frozen=True)
class Ended:
    """How a run ended: its code, or less than 0 its signal; what it said; after how many seconds."""

    code: int
    out: str
    err: str
    seconds: float


class ForkedRuns:
    """Used by one thread; a run at a time.

    Args:
        prefix: words before the command of the process, such as ``unshare``.
        modules: imported before.
    """

    def __init__(self, prefix: Sequence[str] = (), modules: Sequence[str] = WARM) -> None:
        self._said = tempfile.TemporaryDirectory()
        self._process = subprocess.Popen(
            [*prefix, sys.executable, "-c", _FORK, *modules],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout is not None
        self._process.stdout.readline()  # ready

    def __enter__(self) -> ForkedRuns:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()
        self._said.cleanup()

    @property
    def root(self) -> Path:
        """The file system as the runs see it."""
        return Path(f"/proc/{self._process.pid}/root")

    def run(
        self,
        folder: Path,
        arguments: Sequence[str],
        *,
        kill_after: float | None = None,
        clock_back_after: float | None = None,
    ) -> Ended:
        """One run.

        Args:
            folder: it works in.
            arguments: of the command.
            kill_after: seconds; SIGKILL unless it has ended.
            clock_back_after: seconds; what Python reads as the time of day goes back by an hour.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        line = json.dumps([str(folder), self._said.name, list(arguments), clock_back_after])
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()
        child, begin = int(self._process.stdout.readline()), time.monotonic()
        if kill_after is not None:
            descriptor = os.pidfd_open(child)
            try:
                time.sleep(kill_after)
                signal.pidfd_send_signal(descriptor, signal.SIGKILL)
            except ProcessLookupError:
                pass
            finally:
                os.close(descriptor)
        code = int(self._process.stdout.readline())
        seconds = time.monotonic() - begin
        said = [Path(self._said.name, name).read_text(errors="replace") for name in ("out", "err")]
        return Ended(code, said[0], said[1], seconds)
