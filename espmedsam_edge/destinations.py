"""The one rule for where results go, for every output option of every command.

A result never replaces an input (links and hard links of it count), never goes into a bundle or the program's cache,
and replaces an existing file only if this program wrote it as a result of that kind, or if the user said
``--overwrite``.
Pipes, sockets and devices are written to as they are. What a run under way writes to is held by it: another one that
wants the same place is refused.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import logging
import os
import secrets
import stat
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

from espmedsam_edge.bundle import MANIFEST, Bundle
from espmedsam_edge.errors import UserError
from espmedsam_edge.files import check_exchangeable, identity, write_errors
from espmedsam_edge.machine.cache import cache_place, make_private
from espmedsam_edge.marks import ANNOTATIONS, FRAMES, Kind
from espmedsam_edge.pipes import is_pipe

log = logging.getLogger(__name__)

_ELSEWHERE = "Choose another place for the results."
_CLAIM_SUFFIX = ".places"
_RUNS = "runs"
# The cache's own folders.
_CACHED = ("bundles", "engines", "fetched", "inductor", "kernels", "openvino", "trials", "weights", _RUNS)


def _is_bundle(folder: Path) -> bool:
    if not os.path.isfile(folder / MANIFEST):
        return False
    try:
        Bundle.open(folder)
    except UserError:
        return False
    return True


BUNDLE = Kind("bundle", _is_bundle)


class Destination(NamedTuple):
    """Where a result goes, and what it is."""

    path: Path
    kind: Kind


def stands(path: Path) -> bool:
    """Whether a file, or a folder with something in it, is there. Pipes and devices do not count."""
    try:
        return (path.is_file() and not is_pipe(path)) or (path.is_dir() and any(path.iterdir()))
    except OSError:
        return True  # it cannot be looked into, so it is there


def check_destinations(
    destinations: Sequence[Destination], inputs: Iterable[Path] = (), overwrite: bool | None = None
) -> None:
    """Refuse a place that a result must not go to, before any work.

    Args:
        destinations: of all results.
        inputs: files that are read.
        overwrite: None: only what this program wrote is replaced; True: any file is; False: none.

    Raises:
        UserError: names the place and says why.
    """
    read = {found for file in inputs if (found := identity(file)) is not None}
    named = {os.path.realpath(file) for file in inputs}
    parents = {os.path.dirname(file) for file in named}
    taken: set[str] = set()
    frames: set[str] = set()
    kept: list[Destination] = []
    for destination in destinations:
        path, kind = destination
        if is_pipe(path):
            continue
        real = os.path.realpath(path)
        if identity(path) in read or real in named or (kind is FRAMES and real in parents):
            raise UserError(f"{path} would replace an input.", _ELSEWHERE)
        if real in taken:
            raise UserError(f"two results would be written to {path}.", "Give each kind of result a place of its own.")
        taken.add(real)
        if kind is BUNDLE:
            check_exchangeable(path)
        elif kind in (FRAMES, ANNOTATIONS):
            frames.add(real)
        elif path.is_dir():  # an empty one does not stand in the way, nor does it become a file
            _may_replace(destination, overwrite)
        if stands(path) and (overwrite is False or not _may_replace(destination, overwrite)):
            kept.append(destination)
    _check_owners({os.path.dirname(real) for real in taken} | frames)
    if kept:
        path, kind = kept[0]
        more = f", and {len(kept) - 1} more" if len(kept) > 1 else ""
        if overwrite is False:
            raise UserError(f"{path} exists{more}.", "Choose another place, or leave out --no-overwrite.")
        raise UserError(
            f"{path} exists and is no {kind.what} of this program{more}.",
            "Choose another place, or replace it: --overwrite",
        )
    for folder in {os.path.dirname(real) for real in taken - frames} | frames:
        check_writable(Path(folder))


def _may_replace(destination: Destination, overwrite: bool | None) -> bool:
    path, kind = destination
    if kind is BUNDLE:  # of a bundle only its own files are replaced, and of nothing else any: see ``write_bundle``
        return kind.wrote(path)
    if path.is_dir() and kind not in (FRAMES, ANNOTATIONS):
        raise UserError(f"cannot write {path}: it is a folder.", _ELSEWHERE)
    if kind in (FRAMES, ANNOTATIONS) and not path.is_dir():
        return False
    if overwrite or (path.is_file() and path.stat().st_size == 0):
        return True
    try:
        return kind.wrote(path)
    except OSError:
        return False


def check_again(destination: Destination, overwrite: bool | None) -> None:
    """Refuse, right before a result takes its place, what was put there since ``check_destinations``.

    Raises:
        UserError: names the file, which stays.
    """
    path = destination.path
    if os.path.lexists(path) and not is_pipe(path) and (overwrite is False or not _may_replace(destination, overwrite)):
        raise UserError(
            f"{path} was put there meanwhile, not by this run, and stays.", "Choose another place.", exit_code=1
        )


def _check_owners(folders: Collection[str]) -> None:
    """Refuse folders that lie in the program's cache or in a bundle."""
    cache = Path(os.path.realpath(cache_place()))
    cached = {cache / name for name in _CACHED}
    above = {place for folder in folders for place in (Path(folder), *Path(folder).parents)}
    for place in sorted(above):
        if place in cached:
            raise UserError(f"{place} is the program's own cache; results do not go into it.", _ELSEWHERE)
        if _is_bundle(place):
            raise UserError(f"{place} is a bundle; results do not go into it.", _ELSEWHERE)


def check_writable(folder: Path) -> None:
    """Refuse, before any work, a folder that files cannot be put into, or that cannot be made.

    Raises:
        UserError: says why.
    """
    with write_errors(folder):
        for there in (folder, *folder.parents):
            try:
                mode = there.stat().st_mode
            except FileNotFoundError:
                continue
            if not stat.S_ISDIR(mode):
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
            if not os.access(there, os.W_OK | os.X_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
            return


class Claims:
    """The places that a run writes to, told to other runs of the same user on this machine until it ends.

    Enter it for the length of the run. Places are told as hashes, in a file that is locked: the lock goes with its
    process, however that ends. They are told in the cache: runs with different caches (of two users or machines, or by
    ``XDG_CACHE_HOME``), or with one that cannot be written to, do not know of each other. What they write is whole, and
    replaces nothing that came meanwhile, all the same: see ``check_again``.
    """

    def __init__(self) -> None:
        self._folder: Path | None = cache_place() / _RUNS
        self._file: Path | None = None
        self._descriptor: int | None = None
        self._others: frozenset[str] = frozenset()

    def __enter__(self) -> Claims:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.release()

    def release(self) -> None:
        """Let others have the places."""
        if self._file is not None:
            self._file.unlink(missing_ok=True)
        if self._descriptor is not None:
            os.close(self._descriptor)
        self._file = self._descriptor = None

    @contextlib.contextmanager
    def planning(self) -> Iterator[None]:
        """Look at what others hold, and keep them from claiming anything until this run has."""
        with contextlib.ExitStack() as stack:
            try:
                self._others = self._held(stack)
            except OSError as error:
                log.debug("no run knows of another: %s", error.strerror)
                self._folder = None
            except UserError as error:
                log.warning("This run and others do not know where each of them writes: %s", error.message)
                self._folder = None
            yield

    def _held(self, stack: contextlib.ExitStack) -> frozenset[str]:
        """What other runs hold; the files of those that ended without a word go."""
        assert self._folder is not None
        make_private(self._folder, self._folder.parent)  # another user may hold a lock for ever, or lead elsewhere
        lock = os.open(self._folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        stack.callback(os.close, lock)
        fcntl.flock(lock, fcntl.LOCK_EX)
        held: set[str] = set()
        for file in self._folder.glob(f"*{_CLAIM_SUFFIX}"):
            with contextlib.suppress(OSError, ValueError), file.open("rb") as stream:
                try:
                    fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
                except OSError as error:
                    if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                        held.update(json.load(stream))
                else:
                    file.unlink()
        return frozenset(held)

    def taken(self, path: Path) -> bool:
        """Whether another run writes to a place; asked while planning."""
        return bool(self._others) and _key(path) in self._others

    def add(self, paths: Iterable[Path]) -> None:
        """Claim places; once, while planning.

        Raises:
            UserError: another run writes to one of them.
        """
        wanted = [path for path in paths if not is_pipe(path)]
        clash = next((path for path in wanted if self.taken(path)), None)
        if clash is not None:
            raise UserError(
                f"another run is writing to {clash}.", "Wait for its end, or choose another place.", exit_code=1
            )
        if self._folder is None or not wanted:
            return
        try:
            self._file = self._folder / f"{secrets.token_hex(8)}{_CLAIM_SUFFIX}"
            self._descriptor = os.open(self._file, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            fcntl.flock(self._descriptor, fcntl.LOCK_EX)
            with open(os.dup(self._descriptor), "w", encoding="ascii") as stream:
                json.dump([_key(path) for path in wanted], stream)
        except OSError as error:
            log.debug("no run knows of this one: %s", error.strerror)


def _key(path: Path) -> str:
    return hashlib.sha256(os.fsencode(os.path.realpath(path))).hexdigest()


@contextlib.contextmanager
def claimed(paths: Iterable[Path], *, inside: bool = False) -> Iterator[None]:
    """Keep other runs from places while the block lasts, whatever stands there.

    Args:
        paths: the places.
        inside: whether they may lie in a bundle.

    Raises:
        UserError: another run writes to one of them, or one lies in a bundle or the program's cache.
    """
    places = list(paths)
    if not inside:
        reals = {os.path.realpath(path) for path in places}
        _check_owners({os.path.dirname(real) for real in reals})
        for folder in {real if os.path.isdir(real) else os.path.dirname(real) for real in reals}:
            check_writable(Path(folder))
    with Claims() as claims:
        with claims.planning():
            claims.add(places)
        yield


@contextlib.contextmanager
def held(
    destinations: Sequence[Destination], inputs: Iterable[Path] = (), overwrite: bool | None = None
) -> Iterator[Callable[[], None]]:
    """Check places as ``check_destinations`` does and keep other runs from them while the block lasts.

    Yields what to call before anything is written: ``check_again`` for all of them.

    Raises:
        UserError: a place will not do, or another run writes to it.
    """

    def unchanged() -> None:
        for destination in destinations:
            check_again(destination, overwrite)

    with Claims() as claims:
        with claims.planning():
            check_destinations(destinations, inputs, overwrite)
            claims.add([destination.path for destination in destinations])
        yield unchanged
