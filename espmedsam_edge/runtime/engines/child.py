"""Builds and checks in a child process, so that a crash or a lack of memory there is one clear line here."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from espmedsam_edge.bundle import Graph
from espmedsam_edge.errors import UserError
from espmedsam_edge.files import atomic_write, temporary_file
from espmedsam_edge.machine.cache import PRIVATE_FILE
from espmedsam_edge.machine.children import close_pipes, end_child, how_it_died, start_child
from espmedsam_edge.machine.environment import memory
from espmedsam_edge.runtime.engines.request import EngineRequest, EngineResult
from espmedsam_edge.runtime.engines.tensorrt_api import TITLES, Flavour

OnProgress = Callable[[str, float], None]
"""Called with the name of the builder's phase and the part of the build that is done, 0..1."""


def no_progress(phase: str, fraction: float) -> None:
    """Progress that nobody watches."""


@dataclass(frozen=True)
class Work:
    """What a child is to do.

    Attributes:
        module: its ``main`` reads the request from standard input and answers with ``child_side.answer``.
        title: for messages: ``TensorRT's build of fp16.onnx``.
        advice: what to do when it crashes.
        log_path: where what it says as it dies is kept.
        limit_s: after so many seconds it is ended; None: never.
    """

    module: str
    title: str
    advice: str
    log_path: Path | None = None
    limit_s: float | None = None


def run(request: EngineRequest, on_progress: OnProgress = no_progress) -> EngineResult:
    """Do what a request for TensorRT asks in a child process and return what it found; raises as ``ask`` does."""
    work = Work(
        "espmedsam_edge.runtime.engines.worker",
        f"{TITLES[request.flavour]}'s {request.command} of {request.graph_path.name}",
        "Update TensorRT or the GPU driver, or report it.",
        request.log_path,
    )
    return EngineResult.model_validate(ask(work, request, on_progress))


def check(graph: Graph, graph_path: Path, flavour: Flavour) -> EngineResult:
    """What the installed parser makes of a graph: the nodes it refuses, else what it would compute in. Needs no GPU."""
    return run(EngineRequest(command="check", graph=graph, graph_path=graph_path.resolve(), flavour=flavour))


def ask(work: Work, request: BaseModel, on_progress: OnProgress = no_progress) -> dict[str, Any]:
    """Have a child do something and return its answer.

    Ctrl-C ends the child, and what it has started, before it goes on to the caller.

    Raises:
        UserError: what the child refused; or that it crashed, was killed, took too long or could not be started.
    """
    before = memory().available
    with temporary_file() as stderr:
        child = start_child(work.module, "the build process", stderr)
        with _ended_on_error(child), _limited(child, work.limit_s) as late:
            answer = _converse(child, request, on_progress)
            code = child.wait()
        if answer is None:
            stderr.seek(0)
            raise _died(work, code, stderr.read().decode("utf-8", "replace"), before, late.is_set())
    if answer.pop("event") == "error":
        log = f" Log: {work.log_path}" if work.log_path is not None and work.log_path.is_file() else ""
        raise UserError(answer["message"], f"{answer['hint']}{log}", exit_code=answer["exit_code"])
    return answer


@contextlib.contextmanager
def _ended_on_error(child: subprocess.Popen[bytes]) -> Iterator[None]:
    try:
        yield
    except BaseException:
        end_child(child)  # TensorRT does not look at signals while it builds
        child.wait()
        raise
    finally:
        close_pipes(child)


@contextlib.contextmanager
def _limited(child: subprocess.Popen[bytes], seconds: float | None) -> Iterator[threading.Event]:
    """End the child after so many seconds; yields what is set when that was done."""
    late = threading.Event()

    def end() -> None:
        late.set()
        end_child(child)

    timer = threading.Timer(seconds or 0, end)
    timer.daemon = True
    if seconds is not None:
        timer.start()
    try:
        yield late
    finally:
        timer.cancel()


def _converse(child: subprocess.Popen[bytes], request: BaseModel, on_progress: OnProgress) -> dict[str, Any] | None:
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


def _died(work: Work, code: int, stderr: str, available: int | None, late: bool) -> UserError:
    log = _keep_log(work, stderr)
    if late:
        return UserError(
            f"{work.title} was not done after {work.limit_s:.0f} s and was ended.", f"{work.advice}{log}", exit_code=1
        )
    if code == -signal.SIGKILL:
        had = f"; {available >> 20} MiB were available when it began" if available is not None else ""
        return UserError(
            f"{work.title} was killed, which systems do when memory runs out{had}.",
            "Stop other programs (on a Jetson the desktop, too), or add swap, and try again.",
            exit_code=1,
        )
    return UserError(f"{work.title} {how_it_died(code, stderr)}.", f"{work.advice}{log}", exit_code=1)


def _keep_log(work: Work, stderr: str) -> str:
    if work.log_path is None or not stderr.strip():
        return ""
    try:
        atomic_write(work.log_path, stderr, PRIVATE_FILE)
    except (OSError, UserError):
        return ""
    return f" Log: {os.fspath(work.log_path)}"
