"""The child's side of ``child``: events to standard output, one JSON object a line; all else goes to standard error."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from pydantic import BaseModel

from espmedsam_edge.errors import UserError

Report = Callable[[str, float], bool]
"""Tells a phase and the part that is done, 0..1; False: nobody wants the work any more."""


def answer(work: Callable[[bytes, Report], BaseModel]) -> int:
    """Do the work that the request on standard input asks for; 0 when an answer (a result or an error) was written."""
    os.umask(0o077)  # all that it writes goes to the cache, which is the user's alone
    request = sys.stdin.buffer.read()
    with _events() as emit:
        try:
            result = work(request, lambda phase, fraction: emit("progress", phase=phase, fraction=fraction))
        except UserError as error:
            emit("error", message=error.message, hint=error.hint, exit_code=error.exit_code)
            return 0
        emit("result", **result.model_dump(mode="json"))
    return 0


@contextmanager
def _events() -> Iterator[Callable[..., bool]]:
    """A function that writes one event; standard output itself is turned to standard error for native code."""
    stream = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def emit(event: str, **values: Any) -> bool:
        try:
            stream.write(json.dumps({"event": event, **values}) + "\n")
            stream.flush()
        except (BrokenPipeError, ValueError):  # the parent is gone: nobody wants this build any more
            return False
        return True

    yield emit
