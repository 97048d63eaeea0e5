"""A live source: a thread reads it, only the newest frame is kept, and what drops out is opened again."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Literal, Protocol

from espmedsam_edge.errors import UserError
from espmedsam_edge.imaging.geometry import Frame
from espmedsam_edge.runtime.sources.source import Failure, SourceFrame

log = logging.getLogger(__name__)

_LEAVING_SECONDS = 1.0  # a read that blocks longer is left to end by itself


class Disconnected(Exception):
    """A feed that was open gives no more frames for now; the text says why."""


class Feed(Protocol):
    """What a live source reads: a camera or a stream. Used by one thread, but for ``interrupt``."""

    @property
    def fps(self) -> Fraction | None:
        """Frames a second as the device or stream announces them, once it is open; None: not said."""

    def open(self) -> None:
        """Connect; after ``close`` it may be opened again.

        Raises:
            UserError: it cannot be opened now.
        """

    def read(self) -> Frame | None:
        """Wait for the next frame, (H, W, 3) uint8 BGR; None when it has ended and no more will come.

        Raises:
            Disconnected: it dropped out.
            UserError: it cannot be used at all.
        """

    def interrupt(self) -> None:
        """Let a waiting ``read`` come back soon if that can be done; from any thread, for good."""

    def close(self) -> None:
        """Let go of the device or stream; a second call does nothing."""


@dataclass(frozen=True)
class BackOff:
    """Seconds between attempts to open a feed again: ``first``, then twice as long each time, up to ``longest``.

    ``give_up``: seconds without a frame after which the source is a failure; None: never.
    """

    first: float = 0.1
    longest: float = 5.0
    give_up: float | None = None


@dataclass(frozen=True)
class LiveOptions:
    """How cameras and streams are opened.

    Attributes:
        back_off: how they are opened again.
        decoder: "software": PyAV; "hardware": GStreamer with the Jetson's decoder; "auto": hardware where there is one.
    """

    back_off: BackOff = BackOff()
    decoder: Literal["auto", "software", "hardware"] = "auto"


class LiveSource:
    """Frames of a feed, always the newest.

    Entering opens the feed and waits until that is done. Then ``poll`` takes the newest frame without waiting, and
    iterating waits for it; frames that nobody took in time are counted in ``skipped``. A feed that drops out is opened
    again until it comes back.

    Args:
        feed: what to read.
        address: what messages and records call it.
        label: the name of its results, a file name without a suffix.
        back_off: how it is opened again.
    """

    kind: Literal["images", "video"] = "video"
    live = True

    def __init__(self, feed: Feed, address: str, label: str, back_off: BackOff | None = None) -> None:
        self.feed = feed
        self.name = address
        self.files = [Path(label)]
        self.length: int | None = None
        self.failures: list[Failure] = []
        self.skipped = 0
        self.reconnects = 0
        self._back_off = back_off or BackOff()
        self._changed = threading.Condition()
        self._leaving = threading.Event()
        self._newest: SourceFrame | None = None
        self._opened = False
        self._ended = False
        self._error: BaseException | None = None
        self._listener: Callable[[], None] = _nobody
        self._count = 0
        self._began = 0.0
        self._thread: threading.Thread | None = None

    @property
    def fps(self) -> Fraction | None:
        return self.feed.fps

    @property
    def waiting(self) -> bool:
        """Whether there is a frame that nobody took."""
        return self._newest is not None

    @property
    def finished(self) -> bool:
        """Whether no more frames will come; one may still wait."""
        return self._ended

    def listen(self, call: Callable[[], None]) -> None:
        """Have ``call`` called, from the reading thread, when a frame has come or the source has ended."""
        self._listener = call

    def __enter__(self) -> LiveSource:
        self._thread = threading.Thread(target=self._guarded, name="espmedsam-live", daemon=True)
        self._thread.start()
        with self._changed:
            while not (self._opened or self._ended):
                self._changed.wait(0.2)  # a wait without an end would not always let Ctrl-C through
        if self._error is not None:
            raise self._error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()
        if self._thread is not None:
            self._thread.join(_LEAVING_SECONDS)

    def stop(self) -> None:
        """Have no more frames come; from any thread."""
        self._leaving.set()
        self.feed.interrupt()

    def poll(self) -> SourceFrame | None:
        """The newest frame, if there is one that nobody took.

        Raises:
            UserError: the feed cannot be used.
        """
        with self._changed:
            if self._error is not None and not isinstance(self._error, UserError):
                raise self._error
            frame, self._newest = self._newest, None
            return None if frame is None else replace(frame, skipped=self.skipped)

    def __iter__(self) -> Iterator[SourceFrame]:
        if self._thread is None:
            raise RuntimeError("enter the source before iterating")
        while True:
            with self._changed:
                while not (self.waiting or self._ended):
                    self._changed.wait(0.2)
            frame = self.poll()
            if frame is None:
                return
            yield frame

    def _guarded(self) -> None:
        """The reading thread: its error, whatever it is, is kept for the thread that takes the frames."""
        try:
            self._read_on()
        except UserError as error:
            if self._opened:
                self.failures.append(Failure(self.name, str(error)))
            self._error = error
        except BaseException as error:  # noqa: BLE001 (nothing is swallowed: poll() raises it again)
            self._error = error
        finally:
            self._ended = True
            self._tell()

    def _tell(self) -> None:
        with self._changed:
            self._changed.notify_all()
        self._listener()

    def _read_on(self) -> None:
        lost_at: float | None = None
        pause = self._back_off.first
        while not self._leaving.is_set():
            try:
                self.feed.open()
                if not self._opened:
                    self._opened = True
                    self._tell()
                while not self._leaving.is_set():
                    image = self.feed.read()
                    if image is None:
                        return
                    if lost_at is not None:
                        self.reconnects += 1
                        log.info("%s is back after %.1f s.", self.name, time.monotonic() - lost_at)
                        lost_at, pause = None, self._back_off.first
                    self._deliver(image)
            except (Disconnected, UserError) as error:
                if isinstance(error, UserError) and not self._opened:
                    raise
                if lost_at is None:
                    lost_at = time.monotonic()
                    if not self._leaving.is_set():
                        log.warning("%s dropped out (%s); trying again.", self.name, _reason(error))
                self._check_patience(lost_at, error)
            finally:
                self.feed.close()
            self._leaving.wait(pause)
            pause = min(2 * pause, self._back_off.longest)

    def _check_patience(self, lost_at: float, error: Exception) -> None:
        give_up = self._back_off.give_up
        if give_up is not None and time.monotonic() - lost_at >= give_up:
            raise UserError(
                f"{self.name} did not come back in {give_up:g} s ({_reason(error)}).",
                "Check the camera, the cable and the network.",
                exit_code=1,
            ) from error

    def _deliver(self, image: Frame) -> None:
        now = time.monotonic()
        self._began = self._began or now
        frame = SourceFrame(image, self.files[0], self._count, now - self._began, now, address=self.name)
        self._count += 1
        with self._changed:
            if self._newest is not None:
                self.skipped += 1
            self._newest = frame
            self._changed.notify_all()
        self._listener()


def _reason(error: Exception) -> str:
    text = error.message if isinstance(error, UserError) else str(error)
    return text.rstrip(".")


def _nobody() -> None:
    pass


class FirstThatOpens:
    """A feed that tries others in turn until one opens, and stays with that one.

    Args:
        feeds: the best first.
        note: what it means that the last one had to be taken, the beginning of the line that is logged then;
            empty: none is.
    """

    def __init__(self, feeds: Sequence[Feed], note: str = "") -> None:
        self._feeds, self._note = list(feeds), note

    @property
    def fps(self) -> Fraction | None:
        return self._feeds[0].fps

    def open(self) -> None:
        """See ``Feed.open``; the error, if none opens, is the last one's."""
        refusal: UserError | None = None
        for feed in self._feeds:
            try:
                feed.open()
            except UserError as error:
                feed.close()
                if feed is self._feeds[-1]:
                    raise
                refusal = refusal or error
                continue
            if self._note and refusal is not None and feed is self._feeds[-1]:
                log.warning("%s (%s).", self._note, refusal.message.rstrip("."))
            self._feeds = [feed]
            return

    def read(self) -> Frame | None:
        return self._feeds[0].read()

    def interrupt(self) -> None:
        for feed in list(self._feeds):
            feed.interrupt()

    def close(self) -> None:
        for feed in self._feeds:
            feed.close()
