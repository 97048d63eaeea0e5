"""The pools of memory that threads share; modules that are loaded without a look for garbage."""

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


_LOADING = """
import gc
from espmedsam_edge.machine.memory import loading_modules
looks = []
gc.callbacks.append(lambda phase, _: looks.append(phase))
class Cycle:
    def __init__(self): self.itself = self
for again in range(2):
    looks.clear()
    try:
        with loading_modules():
            kept = [[] for _ in range(5000)]
            seen, on = len(looks), gc.isenabled()
            raise ImportError
    except ImportError:
        print(seen, on, gc.isenabled())
    frozen = gc.get_freeze_count()
    [Cycle() for _ in range(100)]
    print(frozen > 5000, gc.collect() >= 100, gc.get_freeze_count() == frozen)
"""


def test_a_block_that_loads_modules_leaves_what_is_there_out_of_looks_for_garbage_once() -> None:
    done = subprocess.run([sys.executable, "-c", _LOADING], capture_output=True, text=True, check=True)
    first, after, second, after_second = done.stdout.splitlines()
    assert first == "0 False True"
    assert second.split()[0] != "0"
    assert second.split()[1:] == ["True", "True"]
    assert after == after_second == "True True True"
