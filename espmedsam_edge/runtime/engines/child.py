"""Builds and checks in a child process, so that a crash or a lack of memory there is one clear line here."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from espmedsam_edge.bundle import Graph
from espmedsam_edge.errors import UserError
from espmedsam_edge.files import atomic_write
from espmedsam_edge.machine.cache import PRIVATE_FILE
from espmedsam_edge.machine.environment import memory
from espmedsam_edge.runtime.engines.request import EngineRequest, EngineResult
from espmedsam_edge.runtime.engines.tensorrt_api import TITLES, Flavour

OnProgress = Callable[[str, float], None]
"""Called with the name of TensorRT's phase and the part of the build that is done, 0..1."""


# The package's own folder takes the place of the working directory, where a stray tensorrt.py may lie.
_START = (
    "import sys; sys.path[0] = sys.argv[1]; from espmedsam_edge.runtime.engines.worker import main; sys.exit(main())"
)
_PACKAGE_ROOT = Path(__file__).resolve().parents[3]


def _no_progress(phase: str, fraction: float) -> None:
    """Progress that nobody watches."""


def run(request: EngineRequest, on_progress: OnProgress = _no_progress) -> EngineResult:
    """Do what the request asks in a child process and return what it found.

    Ctrl-C ends the child before it goes on to the caller.

    Raises:
        UserError: what the child refused; or that it crashed, was killed or could not be started.
    """
    before = memory().available
    with tempfile.TemporaryFile() as stderr:
        try:
            child = subprocess.Popen(
                [sys.executable, "-c", _START, str(_PACKAGE_ROOT)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                start_new_session=True,  # Ctrl-C reaches this process alone, which then ends the child
            )
        except OSError as error:
            raise UserError(
                f"the build process could not be started: {error.strerror}.",
                "Free memory and processes on this machine, then try again.",
                exit_code=1,
            ) from error
        with _ended_on_error(child):
            answer = _converse(child, request, on_progress)
            code = child.wait()
        if answer is None:
            stderr.seek(0)
            raise _died(request, code, stderr.read().decode("utf-8", "replace"), before)
    if answer.pop("event") == "error":
        log = f" Log: {request.log_path}" if request.log_path is not None and request.log_path.is_file() else ""
        raise UserError(answer["message"], f"{answer['hint']}{log}", exit_code=answer["exit_code"])
    return EngineResult.model_validate(answer)


def check(graph: Graph, graph_path: Path, flavour: Flavour) -> EngineResult:
    """What the installed parser makes of a graph: the nodes it refuses, else what it would compute in. Needs no GPU."""
    return run(EngineRequest(command="check", graph=graph, graph_path=graph_path.resolve(), flavour=flavour))


@contextlib.contextmanager
def _ended_on_error(child: subprocess.Popen[bytes]) -> Iterator[None]:
    try:
        yield
    except BaseException:
        child.kill()  # TensorRT does not look at signals while it builds
        child.wait()
        raise
    finally:
        for stream in (child.stdin, child.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()


def _converse(child: subprocess.Popen[bytes], request: EngineRequest, on_progress: OnProgress) -> dict[str, Any] | None:
    assert child.stdin is not None
    assert child.stdout is not None
    try:
        child.stdin.write(request.model_dump_json().encode())
        child.stdin.close()
    except BrokenPipeError:
        return None  # it died before it read; its exit code says how
    answer: dict[str, Any] | None = None
    for line in child.stdout:
        try:
            event = json.loads(line)
        except ValueError:
            return None  # cut short by its death
        if event["event"] == "progress":
            on_progress(event["phase"], event["fraction"])
        else:
            answer = event
    return answer


def _died(request: EngineRequest, code: int, stderr: str, available: int | None) -> UserError:
    what = f"{TITLES[request.flavour]}'s {request.command} of {request.graph_path.name}"
    log = _keep_log(request, stderr)
    if code == -signal.SIGKILL:
        had = f"; {available >> 20} MiB were available when it began" if available is not None else ""
        return UserError(
            f"{what} was killed, which systems do when memory runs out{had}.",
            "Stop other programs (on a Jetson the desktop, too), or add swap, and try again.",
            exit_code=1,
        )
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    how = f"crashed ({signal.Signals(-code).name})" if code < 0 else f"ended with code {code} and no answer"
    said = f": {lines[-1][:300].rstrip('.')}" if lines else ""
    return UserError(f"{what} {how}{said}.", f"Update TensorRT or the GPU driver, or report it.{log}", exit_code=1)


def _keep_log(request: EngineRequest, stderr: str) -> str:
    if request.log_path is None or not stderr.strip():
        return ""
    try:
        atomic_write(request.log_path, stderr, PRIVATE_FILE)
    except (OSError, UserError):
        return ""
    return f" Log: {os.fspath(request.log_path)}"
