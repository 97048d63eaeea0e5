"""Masks of many frames on disk, a bit a pixel and one after the other as DICOM stores them, however many there are."""

from __future__ import annotations

import hashlib
import tempfile
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np
from numpy.typing import NDArray

from espmedsam_edge.closing import Closing


class PackedMasks(Closing):
    """Masks of one size, appended and read back one by one; memory holds a frame, a nameless file the rest.

    A frame begins where the one before ends, within a byte or not; a byte's lowest bit goes first (PS3.5, 8.1.1).

    Args:
        size: (height, width) of every mask.
        folder: where the file lies; it is gone when this ends, however it ends.

    Raises:
        OSError: the file cannot be written.
    """

    def __init__(self, size: tuple[int, int], folder: Path) -> None:
        self.size = size
        self.count = 0
        self._file = cast(BinaryIO, tempfile.TemporaryFile(dir=folder))  # noqa: SIM115 (``close`` does)
        self._rest = np.zeros(0, bool)  # what does not fill a byte yet

    def close(self) -> None:
        """Give the file up."""
        self._file.close()

    def append(self, mask: NDArray[np.generic]) -> None:
        """Add a mask, (height, width), foreground where it is not 0."""
        bits = np.concatenate([self._rest, mask.reshape(-1) != 0])
        whole = len(bits) // 8 * 8
        self._file.write(np.packbits(bits[:whole], bitorder="little").tobytes())
        self._rest = bits[whole:]
        self.count += 1

    def frame(self, index: int) -> NDArray[np.uint8]:
        """A mask that was appended, (height, width), 0 or 1. After it, nothing can be appended."""
        self._fill_up()
        height, width = self.size
        first = index * height * width
        self._file.seek(first // 8)
        data = np.frombuffer(self._file.read(height * width // 8 + 2), np.uint8)
        return np.unpackbits(data, bitorder="little")[first % 8 :][: height * width].reshape(self.size)

    def digest(self) -> str:
        """Hex SHA-256 of all masks. After it, nothing can be appended."""
        digest, stored = hashlib.sha256(), self.stored()
        while block := stored.read(1 << 20):
            digest.update(block)
        return digest.hexdigest()

    def stored(self) -> BinaryIO:
        """The file from its start, of an even number of bytes. After it, nothing can be appended."""
        self._fill_up()
        self._file.seek(0)
        return self._file

    def _fill_up(self) -> None:
        self._file.seek(0, 2)
        self._file.write(np.packbits(self._rest, bitorder="little").tobytes())
        self._rest = self._rest[:0]
        if self._file.tell() % 2:
            self._file.write(b"\0")
