"""Files that grow while a run goes on, and what a kill, a power cut or a full disk leaves of them."""

from __future__ import annotations

import errno
import logging
import os
import threading
from contextlib import suppress
from itertools import count
from pathlib import Path

from espmedsam_edge.errors import UserError
from espmedsam_edge.files import identity, write_errors
from espmedsam_edge.runtime.sinks.places import fitting, numbered

log = logging.getLogger(__name__)

SYNC_SECONDS = 0.5
"""How often what is in a growing file is put onto the disk: what a power cut may take of it."""


def make_partial(path: Path) -> Path:
    """Make the file that ``path`` grows in: ``a.partial.mp4`` for ``a.mp4``, or, if that is there, ``a.partial-2.mp4``.

    Raises:
        OSError: it cannot be made there.
    """
    for number in count(1):
        word = "partial" if number == 1 else f"partial-{number}"
        candidate = path.with_name(fitting(path.stem, f".{word}{path.suffix}"))
        with suppress(FileExistsError):  # of an earlier run, or of another one just now
            candidate.touch(exist_ok=False)
            return candidate
    raise AssertionError


def put_in_place(partial: Path, path: Path, before: tuple[int, int] | None) -> Path:
    """Give a whole file its name; where another file has come there meanwhile, it stays, and the new one is numbered.

    Args:
        partial: the file.
        path: its name.
        before: what stood there when it was decided that it may be replaced: its ``identity``, None for nothing.

    Returns:
        The name it got.

    Raises:
        OSError: it cannot be given one.
    """
    if before is not None and identity(path) == before:
        partial.replace(path)
        return path
    for number in count(1):
        candidate = numbered(path, number)
        try:
            os.link(partial, candidate, follow_symlinks=False)  # which never replaces
        except FileExistsError:
            continue
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK):
                raise
            if candidate.exists():  # a file system without links, as on SD cards
                continue
            partial.replace(candidate)
        else:
            partial.unlink()
        return candidate
    raise AssertionError


class GrowingFile:
    """A file that is readable at any moment, and takes its name once it is whole.

    ``begin`` makes it under its partial name, which says that it is not finished and keeps the suffix that players and
    readers go by. A kill leaves it there; the next run leaves it alone. Twice a second a thread of its own puts what
    was written onto the disk, so that the writer never waits for it.

    Args:
        path: the name it takes.
        keep_interrupted: whether an interrupted run keeps it, as for what cannot be recorded again.
    """

    def __init__(self, path: Path, *, keep_interrupted: bool = False) -> None:
        self.path, self.keep_interrupted = path, keep_interrupted
        self.partial: Path | None = None
        self._before = identity(path)  # what the run decided that it may replace
        self._sync: _Sync | None = None

    def begin(self) -> Path:
        """Make the empty file and the folders above it; its partial path.

        Raises:
            UserError: it cannot be made there.
        """
        with write_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.partial = make_partial(self.path)
            self._sync = _Sync(self.partial)
            _sync_folder(self.partial.parent)
        return self.partial

    @property
    def remains(self) -> str:
        """The end of an error's hint: where what was written until then is."""
        return "nothing was left behind" if self.partial is None else f"what was written is in {self.partial}"

    def check(self) -> None:
        """Notice what the disk refused while nobody waited for it.

        Raises:
            OSError: the last synchronisation failed.
        """
        if self._sync is not None and self._sync.error is not None:
            raise self._sync.error

    def end(self, kind: type[BaseException] | None, *, whole: bool = True) -> None:
        """Give the file its name if it is whole; else leave it under its partial name, or remove it.

        It is removed if the run was interrupted or broke off over a bug, unless ``keep_interrupted``; if the user can
        mend what went wrong (a full disk), what there is stays, as does a file that came out incomplete.

        Args:
            kind: the class of the error that ends the run, if one does.
            whole: whether everything that belongs into the file is in it.

        Raises:
            UserError: it is not whole although nothing else went wrong, or cannot be put onto the disk.
        """
        if self.partial is None or self._sync is None:
            return
        failed = kind is not None and issubclass(kind, UserError)
        interrupted = kind is not None and not failed
        try:
            with write_errors(self.path, self.remains):
                self._sync.finish()
                if interrupted and not self.keep_interrupted:
                    self.partial.unlink()
                elif whole and not failed:
                    placed = put_in_place(self.partial, self.path, self._before)
                    _sync_folder(self.path.parent)
                    if placed != self.path:
                        log.warning("%s was written by another program meanwhile; this run's is %s.", self.path, placed)
                elif not self.partial.stat().st_size:
                    self.partial.unlink()
        except UserError:
            if kind is None:
                raise
        if kind is None and not whole:
            raise UserError(
                f"{self.path} came out incomplete.", f"Is the disk full? {_sentence(self.remains)}", exit_code=1
            )


class _Sync:
    """A thread that puts a file's content onto the disk twice a second."""

    def __init__(self, path: Path) -> None:
        self.error: OSError | None = None
        self._descriptor = os.open(path, os.O_RDONLY)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="espmedsam-sync", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        size = -1
        while not self._stopping.wait(SYNC_SECONDS):
            try:
                if (grown := os.fstat(self._descriptor).st_size) != size:
                    os.fdatasync(self._descriptor)
                    size = grown
            except OSError as error:
                self.error = error
                return

    def finish(self) -> None:
        """Put everything onto the disk and stop.

        Raises:
            OSError: the disk refused.
        """
        self._stopping.set()
        self._thread.join()
        try:
            os.fsync(self._descriptor)
        finally:
            os.close(self._descriptor)


def _sync_folder(folder: Path) -> None:
    """Make a new name in a folder outlast a power cut, where the file system can."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}."
