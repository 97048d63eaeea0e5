"""A video's bytes, up to where it can hold no picture any more."""

from __future__ import annotations

import os
from io import BufferedIOBase
from pathlib import Path
from typing import Any, Protocol

from espmedsam_edge.runtime.video.containers import START_BYTES, has_container


class Incoming(Protocol):
    """Where a video comes from; may have ``seek`` and ``tell`` as files do."""

    def read(self, size: int, /) -> bytes:
        """At most so many bytes; none at the end."""


class Bounded(BufferedIOBase):
    """Gives what another gives, until 128 MiB went by without a sign of life; then it ends.

    FFmpeg keeps what it reads until a packet ends, however long that says it is, and decoders take many times as much;
    the one of H.264 counts a packet's bits in 31 bits, and writes elsewhere from 256 MiB on.

    Args:
        source: what is read; closed with this if it is a file.
        name: a file's, by whose suffix FFmpeg may know it.

    Attributes:
        ended: whether it ended before what it gives.
        position: how far it was read, in bytes.
    """

    MOST = 128 << 20
    """Bytes without a packet, or of a stream without a container, such as raw H.264, without a picture."""

    def __init__(self, source: Any, name: str = "") -> None:
        self._source, self.name = source, name
        self._bare: bool | None = None
        self._left, self.ended = self.MOST, False
        self.position = 0

    @classmethod
    def file(cls, path: Path) -> Bounded:
        """Of a file.

        Raises:
            OSError: it cannot be opened.
        """
        return cls(path.open("rb", buffering=0), str(path.absolute()))

    def begin(self) -> None:
        """Count anew: opening a video may look through much of it."""
        self._left, self.ended = self.MOST, False

    def packet(self) -> None:
        """A packet came."""
        if not self._bare:
            self._left = self.MOST

    def picture(self) -> None:
        """A picture came."""
        self._left = self.MOST

    def read(self, size: int | None = -1, /) -> bytes:
        """At most so many bytes; none at the end."""
        self.ended = self.ended or self._left == 0
        if self.ended:
            return b""
        data: bytes = self._source.read(self._left if size is None or size < 0 else min(size, self._left)) or b""
        if self._bare is None:
            self._bare = not has_container(data[:START_BYTES])
        self._left -= len(data)
        self.position += len(data)
        return data

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return hasattr(self._source, "seek")

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        self.position = int(self._source.seek(offset, whence))
        return self.position

    def tell(self) -> int:
        return int(self._source.tell())

    def close(self) -> None:
        if self.name:
            self._source.close()
        super().close()
