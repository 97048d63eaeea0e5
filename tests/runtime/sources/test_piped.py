"""What comes on standard input is told apart in bounded time."""

from __future__ import annotations

import os
import threading
import time

import pytest

from espmedsam_edge.runtime.sources.piped import Pipe, PipedPicture, source_of

_SIZE = 40 << 20  # bytes


@pytest.mark.parametrize(
    ("start", "part"),
    [(b"\xff\xd8\xff\xda\x00\x02", b"\xff\x00"), (b"\xff\xd8", b"\xff\xff")],
    ids=["stuffed bytes", "filling"],
)
def test_a_picture_of_nothing_but_parts_is_not_looked_through_for_long(start: bytes, part: bytes) -> None:
    receiver, sender = os.pipe()

    def send() -> None:
        with os.fdopen(sender, "wb") as stream:
            stream.write(start + part * (_SIZE // 2))

    writer = threading.Thread(target=send)
    writer.start()
    began = time.process_time()
    source = source_of(Pipe(receiver))
    seconds = time.process_time() - began
    writer.join()
    os.close(receiver)
    assert isinstance(source, PipedPicture)
    assert list(source) == []
    assert "standard input" in source.failures[0].message
    assert seconds < 3
