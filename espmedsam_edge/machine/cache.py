"""Where the program keeps what it can make again: engines, kernels, and bundles made from the weights it came with.

What lies there is run, so it must be the user's alone: folders are made 0700 and files 0600, and nothing is used that
another user owns or may write, nor what lies in a folder that one does. The superuser is no other user.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from io import FileIO
from pathlib import Path

import platformdirs

from espmedsam_edge.errors import UserError

CACHE_VARIABLE = "ESPMEDSAM_CACHE"

PRIVATE_FILE, PRIVATE_FOLDER = 0o600, 0o700
"""The modes of what is kept: the user's alone."""


def cache_place(cache: str | Path | None = None) -> Path:
    """``cache``, else $ESPMEDSAM_CACHE, else the user's cache folder.

    Raises:
        UserError: there can be no folder of that name.
    """
    chosen = cache or os.environ.get(CACHE_VARIABLE)
    base = Path(chosen) if chosen else _usual_place()
    try:
        place = base.expanduser().absolute()
        place.lstat()
    except (RuntimeError, OSError) as error:  # of a user there is not, or longer than names may be
        if not isinstance(error, OSError) or error.errno == errno.ENAMETOOLONG:
            raise UserError(
                f"the cache cannot be at {str(base)[:200]}.", f"Choose a folder of your own: ${CACHE_VARIABLE}=FOLDER"
            ) from error
    return place


def _usual_place() -> Path:
    return platformdirs.user_cache_path("espmedsam-edge")


def distrusted(path: Path, root: Path) -> str | None:
    """Why nothing is used that lies at a path in the cache, as one clause; None where it is the user's alone.

    Args:
        path: a file or folder, there or not.
        root: the cache's own folder: it and all between the two are looked at. That one may be shared as /tmp is,
            with the sticky bit, which leaves to everyone what is theirs. Of the folders above it none may be everyone's
            without that bit; who owns them, or is in their group, is trusted.
    """
    for place in Path(os.path.realpath(root)).parents:
        with contextlib.suppress(OSError):
            mode = place.stat().st_mode
            if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
                return f"other users may write to {place}, and put another folder in the cache's place"
    for place in _between(path, root):
        try:
            state = place.stat() if place == root else place.lstat()
        except FileNotFoundError:
            continue
        except OSError as error:
            return f"{place} cannot be looked at ({error.strerror})"
        reason = _not_ours(state, place)
        if reason is not None:
            return reason
    return None


def _between(path: Path, root: Path) -> Iterator[Path]:
    """The root, and every folder from there to the path, and the path."""
    yield root
    for depth in range(len(path.relative_to(root).parts)):
        yield root.joinpath(*path.relative_to(root).parts[: depth + 1])


def _not_ours(state: os.stat_result, place: Path) -> str | None:
    if state.st_uid not in (os.geteuid(), 0):
        return f"{place} belongs to another user (number {state.st_uid})"
    if stat.S_ISLNK(state.st_mode):
        return f"{place} is a link"
    sticky = stat.S_ISDIR(state.st_mode) and state.st_mode & stat.S_ISVTX
    if state.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and not sticky:
        return f"other users may write to {place}"
    return None


def read_kept(file: Path, root: Path) -> bytes:
    """A file's content, read once; see ``open_kept``."""
    with open_kept(file, root) as stream:
        return stream.readall()


@contextlib.contextmanager
def open_kept(file: Path, root: Path) -> Iterator[FileIO]:
    """A file, open to read, if it is the user's alone as ``distrusted`` says; the open file is looked at.

    Raises:
        OSError: it is not there, cannot be read, or is not to be trusted; ``strerror`` says why.
    """
    reason = distrusted(file.parent, root)
    if reason is not None:
        raise PermissionError(errno.EACCES, reason)
    descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    with FileIO(descriptor) as stream:
        state = os.fstat(descriptor)
        reason = _not_ours(state, file)
        if reason is None and not stat.S_ISREG(state.st_mode):
            reason = f"{file} is no ordinary file"
        if reason is not None:
            raise PermissionError(errno.EACCES, reason)
        yield stream


def make_private(folder: Path, root: Path) -> None:
    """Make a folder of the cache that is the user's alone, where need be with those above it.

    What is the user's own below the root is closed to others where it was open; so is the root in its usual place.

    Raises:
        OSError: it cannot be made.
        UserError: another user owns or may write it, or a folder above it up to the root.
    """
    root.parent.mkdir(parents=True, exist_ok=True)
    for place in _between(folder, root):
        with contextlib.suppress(FileExistsError):
            place.mkdir(PRIVATE_FOLDER)
        if not place.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(place))
        state = place.lstat()
        ours = stat.S_ISDIR(state.st_mode) and state.st_uid == os.geteuid()
        if ours and state.st_mode & 0o077 and (place != root or place == _usual_place()):
            place.chmod(PRIVATE_FOLDER)
        if (reason := distrusted(place, root)) is not None:
            raise UserError(
                f"the cache is not used: {reason}.",
                f"Close it to others (chmod go-w FOLDER), or choose one of your own: ${CACHE_VARIABLE}=FOLDER",
                exit_code=1,
            )
