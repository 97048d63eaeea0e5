"""Compiled networks in the cache: reading one and hashing it at the same time."""

from __future__ import annotations

import hashlib
import threading
from io import FileIO
from pathlib import Path

import numpy as np
import pytest

from espmedsam_edge.runtime.engines.compiled_networks import read_hashed

PIECE = 4 << 20  # what is read at once


def content_of(size: int) -> bytes:
    return np.random.default_rng(size).integers(0, 256, size, np.uint8).tobytes()


@pytest.mark.parametrize("size", [0, 1, PIECE - 1, PIECE, PIECE + 1, 3 * PIECE + 12345])
def test_what_is_read_is_what_is_hashed(tmp_path: Path, size: int) -> None:
    content = content_of(size)
    (tmp_path / "network").write_bytes(content)
    memory = bytearray(size)
    with FileIO(tmp_path / "network") as stream:
        assert read_hashed(stream, memoryview(memory)) == hashlib.sha256(content).hexdigest()
    assert memory == content


def test_a_file_that_became_shorter_or_longer_has_another_hash_than_it_had(tmp_path: Path) -> None:
    content = content_of(PIECE + 100)
    for now in (content[:-1], content[:PIECE], b"", content + b"more"):
        (tmp_path / "network").write_bytes(now)
        memory = bytearray(len(content))
        with FileIO(tmp_path / "network") as stream:
            found = read_hashed(stream, memoryview(memory))
        assert found == hashlib.sha256(now[: len(content)]).hexdigest()


def test_a_disk_that_fails_on_the_way_is_an_error_and_leaves_no_thread(tmp_path: Path) -> None:
    class Failing(FileIO):
        reads = 0

        def readinto(self, memory: memoryview) -> int | None:  # type: ignore[override]
            self.reads += 1
            if self.reads == 2:
                raise OSError(5, "Input/output error")
            return super().readinto(memory)

    (tmp_path / "network").write_bytes(content_of(2 * PIECE))
    with Failing(tmp_path / "network") as stream, pytest.raises(OSError, match="Input/output error"):
        read_hashed(stream, memoryview(bytearray(2 * PIECE)))
    assert "espmedsam-hash" not in {thread.name for thread in threading.enumerate()}
