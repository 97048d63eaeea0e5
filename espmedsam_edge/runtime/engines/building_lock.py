"""The right to build one engine, which one process has at a time."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path

from espmedsam_edge.errors import UserError
from espmedsam_edge.files import is_open_file
from espmedsam_edge.machine.cache import CACHE_VARIABLE, PRIVATE_FILE, make_private

log = logging.getLogger(__name__)

_WAIT_S = 0.2


@contextlib.contextmanager
def building_lock(folder: Path, stem: str) -> Iterator[bool]:
    """Hold the right to build one engine; waits while another process holds it. Yields whether it had to wait.

    The lock goes with its process, however that ends. On file systems without locks the build goes on without one:
    files are written whole either way.

    Raises:
        UserError: the cache folder cannot be written to.
    """
    file = folder / f"{stem}.lock"
    waited = False
    while True:
        descriptor = _open_lock(folder, file)
        try:
            waited = _acquire(descriptor, stem) or waited
            if not is_open_file(descriptor, file):
                continue  # removed by a clean-up between opening and locking: another process may hold a new one
            yield waited
            return
        finally:
            os.close(descriptor)


def _open_lock(folder: Path, file: Path) -> int:
    try:
        make_private(folder, folder.parent)
        return os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, PRIVATE_FILE)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(
                f"the engine cache {folder} is full.",
                f"Remove engines (espmedsam-edge engines clean), or choose another folder with ${CACHE_VARIABLE}.",
                exit_code=1,
            ) from error
        raise UserError(
            f"the engine cache {folder} cannot be written: {error.strerror}.",
            f"Choose another folder with --cache or ${CACHE_VARIABLE}.",
            exit_code=1,
        ) from error


def _acquire(descriptor: int, stem: str) -> bool:
    waited = False
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not waited:
                log.info("Another process is building %s; waiting for it.", stem)
            waited = True
            time.sleep(_WAIT_S)
        except OSError:
            return waited
        else:
            return waited
