"""A stream of a live source outlasts its receiver: opened again, counted, told."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import numpy as np
import pytest

from espmedsam_edge.errors import UserError
from espmedsam_edge.runtime.sinks import reconnecting_stream
from espmedsam_edge.runtime.sinks.reconnecting_stream import ReconnectingStream
from espmedsam_edge.runtime.sources.live import BackOff

PICTURE = np.zeros((4, 4, 3), np.uint8)
QUICK = BackOff(0.001, 0.002)


class Receiver:
    """Where streams arrive: each writer that it gave, with the times of the frames that it got, while it is ``up``."""

    def __init__(self) -> None:
        self.up = threading.Event()
        self.up.set()
        self.refused = 0
        self.streams: list[list[float]] = []
        self.closed = 0

    def open(self) -> Receiver.Writer:
        if not self.up.is_set():
            self.refused += 1
            raise ConnectionRefusedError(111, "Connection refused")
        return self.Writer(self)

    class Writer:
        def __init__(self, receiver: Receiver) -> None:
            self.receiver, self.got = receiver, list[float]()
            receiver.streams.append(self.got)

        def write(self, frame: np.ndarray, time: float) -> None:
            if not self.receiver.up.is_set():
                raise BrokenPipeError(32, "Broken pipe")
            self.got.append(time)

        def close(self) -> None:
            self.receiver.closed += 1


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


@pytest.fixture
def _proven_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reconnecting_stream, "_PROOF_SECONDS", 0.0)


def begun(receiver: Receiver, stream: ReconnectingStream) -> int:
    """Send until the first frame arrives; how many did not."""
    early = 0
    while True:
        stream.write(PICTURE, 0)
        if receiver.streams and receiver.streams[0]:
            return early
        early += 1
        time.sleep(0.001)


@pytest.mark.usefixtures("_proven_at_once")
def test_a_receiver_that_restarts_gets_the_stream_again(said: list[str]) -> None:
    receiver = Receiver()
    stream = ReconnectingStream(receiver.open, "rtsp://r/live", QUICK)
    begun(receiver, stream)
    sent = 1

    def send_until(condition: Callable[[], bool]) -> None:
        nonlocal sent
        deadline = time.monotonic() + 60
        while not condition():
            assert time.monotonic() < deadline
            stream.write(PICTURE, sent)
            sent += 1
            time.sleep(0.001)

    for outage in range(1, 4):
        receiver.up.clear()
        refused = receiver.refused
        send_until(lambda: receiver.refused > refused + 1)  # noqa: B023 (called before it changes)
        receiver.up.set()
        send_until(lambda: stream.reconnects == outage)  # noqa: B023
    stream.close()
    assert len(receiver.streams) == 4
    assert receiver.closed == 4
    assert sum(map(len, receiver.streams)) + stream.unsent == sent
    assert [line.partition(" after")[0] for line in said] == [
        *["the stream to rtsp://r/live broke off: Broken pipe; trying again.", "the stream to rtsp://r/live is back"]
        * 3,
        f"the stream to rtsp://r/live broke off 3 times; {stream.unsent} frames were not sent.",
    ]


def test_a_receiver_that_is_slow_to_answer_holds_nothing_up() -> None:
    receiver, let = Receiver(), threading.Event()

    def opened() -> Receiver.Writer:
        assert let.wait(60)
        return receiver.open()

    stream = ReconnectingStream(opened, "rtsp://r/live", back_off=QUICK)
    for number in range(5):
        stream.write(PICTURE, number)
    let.set()
    begun(receiver, stream)
    stream.close()
    assert stream.unsent == 0  # those before it was open are not missed
    let.clear()
    with pytest.raises(UserError, match="was not open before the end"):
        ReconnectingStream(opened, "rtsp://r/live").close()
    let.set()
    until(lambda: receiver.closed == 2)  # what opened too late is closed


def test_what_does_not_last_at_the_start_is_an_error() -> None:
    receiver = Receiver()
    stream = ReconnectingStream(receiver.open, "rtsp://r/live", back_off=QUICK)
    begun(receiver, stream)
    receiver.up.clear()
    with pytest.raises(BrokenPipeError):
        stream.write(PICTURE, 1)
    stream = ReconnectingStream(receiver.open, "rtsp://r/live", back_off=QUICK)
    with pytest.raises(ConnectionRefusedError):
        begun(receiver, stream)


def test_what_opens_and_fails_again_and_again_is_one_line(monkeypatch: pytest.MonkeyPatch, said: list[str]) -> None:
    """As GStreamer does, which opens at once and tells some frames later that nobody is there."""
    now, wait = [100.0], threading.Event().wait
    receiver = Receiver()
    monkeypatch.setattr(reconnecting_stream.time, "monotonic", lambda: now[0])
    stream = ReconnectingStream(receiver.open, "udp://r:1", QUICK)
    begun(receiver, stream)
    now[0] += 1.5
    stream.write(PICTURE, 0)
    for opened in range(2, 5):
        receiver.up.clear()
        stream.write(PICTURE, 0)  # fails
        receiver.up.set()
        while len(receiver.streams) < opened:
            wait(0.001)
        while not receiver.streams[-1]:
            stream.write(PICTURE, 0)  # goes out, but the stream is too young
            wait(0.001)
    assert len(said) == 1
    now[0] += 1.5
    stream.write(PICTURE, 0)
    assert len(said) == 2
    assert stream.reconnects == 1
    stream.close()


@pytest.mark.usefixtures("_proven_at_once")
def test_a_stream_that_is_not_back_at_the_end_is_a_failure(said: list[str]) -> None:
    receiver = Receiver()
    stream = ReconnectingStream(receiver.open, "rtsp://r/live", BackOff(0.001, 600.0))
    begun(receiver, stream)
    receiver.up.clear()
    stream.write(PICTURE, 1)
    with pytest.raises(UserError, match=r"the stream to rtsp://r/live broke off: Broken pipe\. Check the receiver"):
        stream.close()
    assert said[-1] == "the stream to rtsp://r/live broke off 1 times; 1 frames were not sent."


@pytest.mark.usefixtures("_proven_at_once")
def test_a_bug_while_opening_again_is_not_hidden() -> None:
    receiver, broken = Receiver(), threading.Event()

    def opened() -> Receiver.Writer:
        if broken.is_set():
            raise ZeroDivisionError
        return receiver.open()

    stream = ReconnectingStream(opened, "rtsp://r/live", back_off=QUICK)
    begun(receiver, stream)
    receiver.up.clear()
    broken.set()

    def write() -> bool:
        stream.write(PICTURE, 1)
        return False

    with pytest.raises(ZeroDivisionError):
        until(write)
