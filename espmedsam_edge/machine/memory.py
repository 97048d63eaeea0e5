"""How the C library hands out memory to threads, and when Python looks for garbage."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Iterator
from contextlib import contextmanager, suppress

_ARENA_MAX = -8  # M_ARENA_MAX of glibc's malloc.h
_ARENAS = 2


def share_arenas() -> None:
    """Let all threads of this process take memory from two pools of glibc's, instead of up to eight a core.

    A run has a score of threads. What each leaves behind in a pool of its own is not given back: with objects measured
    in every frame a live run grew by hundreds of megabytes an hour. To be called before threads are started. Nothing
    happens where the C library is another one. The same as ``MALLOC_ARENA_MAX=2`` in the environment.
    """
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(_ARENA_MAX, _ARENAS)


@contextmanager
def loading_modules() -> Iterator[None]:
    """Load modules in the block without a look for garbage meanwhile, and leave what is there then out of later looks.

    Hundreds of modules leave next to none, and looking takes an eighth of the time that they need. Only the first time
    in a process: what a program that calls a command again and again has left by then is its own.
    """
    if not gc.isenabled() or gc.get_freeze_count():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
