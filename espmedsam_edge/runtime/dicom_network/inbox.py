"""What was received and is not sent on yet, on the disk: nothing that was answered with success is lost by a kill.

An instance goes by a hash of its SOP Instance UID, so that no value of a header is in a file's name. Its file is in
``waiting`` from before it is answered until its segmentation is delivered; then an empty file in ``done`` says so, and
what comes again is not done again. ``failed`` has what could not be segmented. Files of other names are nobody's
instances: they are neither segmented nor removed.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import stat
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from espmedsam_edge.closing import Closing
from espmedsam_edge.errors import UserError
from espmedsam_edge.files import atomic_path, write_errors

_SUFFIX = ".dcm"
_NAME = re.compile(r"[0-9a-f]{32}")
_HALF_WRITTEN = re.compile(r"\.[0-9a-f]{32}\.[0-9a-f]{12}\.dcm")
_DAY = 24 * 60 * 60


class Inbox(Closing):
    """The folder of one listener, which holds it locked.

    Args:
        folder: made if it is not there.
        spare: bytes that are to stay free on its disk.

    Raises:
        UserError: another listener has it, another user made it, or it cannot be written to.
    """

    def __init__(self, folder: Path, spare: int = 0) -> None:
        self.folder, self._spare = folder, spare
        self._waiting, self._done, self._failed = folder / "waiting", folder / "done", folder / "failed"
        self._results = folder / "results"
        with write_errors(folder):
            for place in (self._waiting, self._done, self._failed, self._results):
                place.mkdir(mode=0o700, parents=True, exist_ok=True)
                _make_ours(place)
            self._lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._lock)
            raise UserError(f"another listener uses {folder}.", "Give each a --queue of its own.") from None
        for place in (self._waiting, self._failed, self._results):
            for file in place.glob(f".*{_SUFFIX}"):
                if _HALF_WRITTEN.fullmatch(file.name):  # when an earlier listener was killed
                    file.unlink(missing_ok=True)

    def close(self) -> None:
        """Let another listener have it."""
        os.close(self._lock)

    def put(self, uid: str, content: Iterable[bytes | memoryview]) -> None:
        """Keep an instance; it is on the disk when this returns. One that is there or done already is not kept twice.

        Args:
            uid: its SOP Instance UID.
            content: its file, in pieces.

        Raises:
            OSError, UserError: it could not be kept, as where too little is free, and nothing of it is left.
        """
        name = hashlib.sha256(uid.encode()).hexdigest()[:32]
        place = self._waiting / f"{name}{_SUFFIX}"
        if self.is_done(name) or place.exists():
            return
        if shutil.disk_usage(self._waiting).free < self._spare:
            raise UserError(f"less than {self._spare >> 20} MiB are free there.")
        with atomic_path(place, 0o600) as temporary, temporary.open("wb") as stream:
            stream.writelines(content)
        _sync(self._waiting)

    def waiting(self) -> list[str]:
        """The names of the instances that wait, those that came or were begun first before the others."""
        found = []
        with os.scandir(self._waiting) as entries:
            for entry in entries:
                name = entry.name.removesuffix(_SUFFIX)
                if name != entry.name and _NAME.fullmatch(name) and entry.is_file(follow_symlinks=False):
                    found.append((entry.stat().st_mtime_ns, name))
        return [name for _, name in sorted(found)]

    def begin(self, name: str) -> Path | None:
        """The file of an instance to be done; None: it is done, or gone. One that ends its process goes last then."""
        if self.is_done(name):
            self._forget(name)
            return None
        file = self._waiting / f"{name}{_SUFFIX}"
        try:
            os.utime(file)
        except FileNotFoundError:  # somebody took it away
            return None
        return file

    def result(self, name: str) -> Path:
        """Where its segmentation is until it is delivered."""
        return self._results / f"{name}{_SUFFIX}"

    def is_done(self, name: str) -> bool:
        """Whether its segmentation was delivered."""
        return self._mark(name).exists()

    def finish(self, name: str) -> None:
        """Its segmentation is delivered."""
        mark = self._mark(name)
        with write_errors(mark):
            mark.parent.mkdir(mode=0o700, exist_ok=True)
            mark.touch(0o600)
            _sync(mark.parent)
            _sync(self._done)
        self._forget(name)

    def forget(self, days: float) -> None:
        """Let go of what was delivered longer ago: sent again, it is done again."""
        before = time.time() - days * _DAY
        for mark in self._done.glob("*/*"):
            with suppress(OSError):
                if mark == self._mark(mark.name) and _NAME.fullmatch(mark.name) and mark.lstat().st_mtime < before:
                    mark.unlink()

    def fail(self, name: str, why: str) -> None:
        """It cannot be segmented."""
        with write_errors(self._failed):
            (self._failed / f"{name}.txt").write_text(f"{why}\n", "utf-8", "backslashreplace")
            (self._waiting / f"{name}{_SUFFIX}").replace(self._failed / f"{name}{_SUFFIX}")

    def _mark(self, name: str) -> Path:
        return self._done / name[:2] / name

    def _forget(self, name: str) -> None:
        self.result(name).unlink(missing_ok=True)
        (self._waiting / f"{name}{_SUFFIX}").unlink(missing_ok=True)


def _make_ours(place: Path) -> None:
    """Close a folder to other users: what lies there is delivered as this program's.

    Raises:
        UserError: it is another user's, or a link.
    """
    state = place.lstat()
    if not stat.S_ISDIR(state.st_mode) or state.st_uid not in (os.geteuid(), 0):
        raise UserError(f"{place} is a link, or another user's.", "Choose another --queue.")
    if state.st_mode & 0o077 and state.st_uid == os.geteuid():
        place.chmod(0o700)


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
