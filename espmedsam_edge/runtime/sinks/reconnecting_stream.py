"""A stream on the network that outlasts its receiver: opened again after it broke off, until somebody is there."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Protocol

from espmedsam_edge.errors import UserError
from espmedsam_edge.imaging.geometry import Frame
from espmedsam_edge.runtime.sources.live import BackOff

log = logging.getLogger(__name__)

_PROOF_SECONDS = 1.0  # that a stream must last to count as open: GStreamer tells of a refusal some frames later


class StreamWriter(Protocol):
    """An open stream; frames go out at once."""

    def write(self, frame: Frame, time: float) -> None:
        """Send a frame, (H, W, 3) uint8 BGR, with its time in seconds.

        Raises:
            OSError: the network refused.
            UserError: the receiver is gone, or the encoder failed.
        """

    def close(self) -> None:
        """End the stream."""


def broken_off(address: str, error: OSError | UserError) -> UserError:
    """The one line about a stream that failed."""
    reason = error.message if isinstance(error, UserError) else error.strerror or "no connection"
    return UserError(
        f"the stream to {address} broke off: {reason.rstrip('.')}.", "Check the receiver and the network.", exit_code=1
    )


class ReconnectingStream:
    """A ``StreamWriter`` for live sources: it never waits for the receiver to answer.

    Frames that come before the stream is open are not sent; those that come while the receiver is gone are not either,
    and are counted.

    Args:
        open_writer: opens the stream, called in a thread; an error of its first call, or of the first second, is this
            stream's own.
        address: what lines call it.
        back_off: how it is opened again; it is never given up.
    """

    def __init__(self, open_writer: Callable[[], StreamWriter], address: str, back_off: BackOff | None = None) -> None:
        self._open, self._address = open_writer, address
        self._back_off = back_off or BackOff()
        self._pause = self._back_off.first
        self._proven = False
        self._lost: tuple[float, UserError] | None = None  # since when, and why
        self._writer: StreamWriter | None = None
        self._opened_at: float | None = None
        self._attempts: _Attempts | None = _Attempts(open_writer)
        self.reconnects = 0
        self.unsent = 0

    def write(self, frame: Frame, time: float) -> None:
        """See ``StreamWriter.write``; no error once the stream has lasted a second."""
        writer = self._there()
        if writer is None:
            self.unsent += self._opened_at is not None
            return
        try:
            writer.write(frame, time)
        except (OSError, UserError) as error:
            if not self._proven:
                raise
            self._lose(writer, broken_off(self._address, error))
        else:
            self._prove()

    def _there(self) -> StreamWriter | None:
        if self._attempts is not None and (writer := self._attempts.writer()) is not None:
            self._writer, self._opened_at, self._attempts = writer, time.monotonic(), None
        return self._writer

    def _lose(self, writer: StreamWriter, why: UserError) -> None:
        self.unsent += 1
        if self._lost is None:
            self._lost, self._pause = (time.monotonic(), why), self._back_off.first
            log.warning("%s; trying again.", why.message.rstrip("."))
        else:  # it was open for less than a second
            self._pause = min(2 * self._pause, self._back_off.longest)
        self._writer = None
        self._attempts = _Attempts(self._open, writer, self._pause, self._back_off.longest)

    def _prove(self) -> None:
        opened_at = self._opened_at or 0.0
        if time.monotonic() - opened_at < _PROOF_SECONDS:
            return
        self._proven = True
        if self._lost is not None:
            self.reconnects += 1
            log.info("the stream to %s is back after %.1f s.", self._address, opened_at - self._lost[0])
            self._lost = None

    def close(self) -> None:
        """See ``StreamWriter.close``.

        Raises:
            UserError: it was not open yet, or had broken off and was not back.
        """
        if self._attempts is not None:
            self._attempts.end()
        if self._writer is not None:
            self._writer.close()
        if self.unsent:
            log.warning(
                "the stream to %s broke off %d times; %d frames were not sent.",
                self._address,
                self.reconnects + (self._lost is not None),
                self.unsent,
            )
        if self._lost is not None:
            raise self._lost[1]
        if self._opened_at is None:
            raise UserError(
                f"the stream to {self._address} was not open before the end.", "Let it run longer.", exit_code=1
            )


class _Attempts:
    """Attempts to open a stream, in a thread: a receiver that does not answer takes seconds to say so.

    Args:
        open_writer: called until it works; without ``broken`` once.
        broken: the writer that failed, to be closed first.
        pause: seconds before the first attempt; then twice as long each time, up to ``longest``.
    """

    def __init__(
        self,
        open_writer: Callable[[], StreamWriter],
        broken: StreamWriter | None = None,
        pause: float = 0.0,
        longest: float = 0.0,
    ) -> None:
        self._open, self._broken, self._pause, self._longest = open_writer, broken, pause, longest
        self._leaving = threading.Event()
        self._lock = threading.Lock()
        self._writer: StreamWriter | None = None
        self._error: BaseException | None = None
        threading.Thread(target=self._run, name="espmedsam-stream", daemon=True).start()

    def writer(self) -> StreamWriter | None:
        """What was opened; None: nothing yet.

        Raises:
            OSError, UserError: of the only attempt.
        """
        with self._lock:
            if self._error is not None:
                raise self._error
            return self._writer

    def end(self) -> None:
        """Try no more; an attempt under way ends by itself."""
        with self._lock:
            self._leaving.set()
            if self._writer is not None:
                self._writer.close()

    def _run(self) -> None:
        try:
            if self._broken is None:
                self._keep(self._open())
                return
            with suppress(OSError, UserError):
                self._broken.close()
            while not self._leaving.wait(self._pause):
                self._pause = min(2 * self._pause, self._longest)
                with suppress(OSError, UserError):
                    self._keep(self._open())
                    return
        except BaseException as error:  # noqa: BLE001 (nothing is swallowed: writer() raises it again)
            self._error = error

    def _keep(self, writer: StreamWriter) -> None:
        with self._lock:
            if self._leaving.is_set():
                writer.close()
            else:
                self._writer = writer
