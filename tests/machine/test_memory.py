"""The pools of memory that threads share."""

from __future__ import annotations

import subprocess
import sys

import pytest

# The statistics that glibc prints name each arena; six threads hold memory at once.
_COUNT = """
import ctypes, sys, threading
from espmedsam_edge.machine.memory import share_arenas
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
if sys.argv[1] == "shared":
    share_arenas()
at_once = threading.Barrier(6)


def work():
    at_once.wait()
    libc.malloc(1000)
    at_once.wait()


threads = [threading.Thread(target=work) for _ in range(6)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
libc.malloc_stats()
"""


def _arenas(how: str) -> int:
    done = subprocess.run([sys.executable, "-c", _COUNT, how], capture_output=True, text=True, check=True)
    return done.stderr.count("Arena ")


@pytest.mark.skipif(sys.platform != "linux", reason="the pools are glibc's")
def test_threads_share_two_pools() -> None:
    assert _arenas("each its own") > 2
    assert _arenas("shared") <= 2
