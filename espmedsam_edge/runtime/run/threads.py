"""The threads of a run, started and waited for as one, so that Ctrl-C finds either none or all of them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

from espmedsam_edge.errors import UserError

_LEAVING_SECONDS = 5.0
_ALONE_SECONDS = 2.0


class ThreadGroup:
    """Threads named ``espmedsam-NAME``, one a stage; stages keep their errors to themselves.

    The main thread does not join them: in Python before 3.13 a join that Ctrl-C interrupts takes a running thread for
    one that has ended.
    """

    def __init__(self, stages: Sequence[tuple[str, Callable[[], None]]]) -> None:
        self._threads = [
            threading.Thread(target=stage, name=f"espmedsam-{name}", daemon=True) for name, stage in stages
        ]
        self._leader = threading.Thread(target=self._lead, name="espmedsam-run", daemon=True)
        self._go = threading.Event()
        self._ended = threading.Event()
        self._error: RuntimeError | None = None

    def start(self) -> None:
        """Start them all.

        Raises:
            UserError: not even the first could be started.
        """
        try:
            self._leader.start()
        except RuntimeError as error:
            self._ended.set()
            raise _no_more() from error
        self._go.set()

    def wait(self, stop: threading.Event | None = None, leave: str | None = None) -> None:
        """Come back when all have ended. Ctrl-C comes through; then it can be called again.

        Args:
            stop: see below.
            leave: a stage that is not waited for any longer once it alone has gone on for two seconds: a decoder may
                be in a single call for minutes. It ends by itself after that call, or with the process.

        Raises:
            KeyboardInterrupt: Ctrl-C, or ``stop`` was set.
            UserError: not all could be started; then it can be called again.
        """
        self._go.set()
        alone: float | None = None
        while not self._ended.wait(0.2):  # a wait without an end would not always let Ctrl-C through
            self._check()
            if stop is not None and stop.is_set():
                raise KeyboardInterrupt
            going = {thread.name for thread in self._threads if thread.is_alive()}
            if leave is None or going != {f"espmedsam-{leave}"}:
                alone = None
            elif alone is None:
                alone = time.monotonic()
            elif time.monotonic() - alone > _ALONE_SECONDS:
                return
        if self._leader.ident is not None:
            self._leader.join(_LEAVING_SECONDS)
        self._check()

    def _check(self) -> None:
        error, self._error = self._error, None
        if error is not None:
            raise _no_more() from error

    def _lead(self) -> None:
        self._go.wait()
        try:
            started = []
            try:
                for thread in self._threads:
                    thread.start()
                    started.append(thread)
            except RuntimeError as error:  # the machine's limit of threads or memory; the others would wait for it
                self._error = error
            for thread in started:
                thread.join()
        finally:
            self._ended.set()


def _no_more() -> UserError:
    return UserError(
        "no more threads can be started here.",
        "Raise the limits of memory and of processes: ulimit -v, ulimit -u",
        exit_code=1,
    )
