"""Files that are complete or absent: atomic writes, directory exchange, hashes."""

from __future__ import annotations

import codecs
import contextlib
import ctypes
import errno
import fcntl
import hashlib
import json
import os
import secrets
import shutil
import stat
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import IO, Any, BinaryIO

from espmedsam_edge.errors import UserError
from espmedsam_edge.pipes import STANDARD_OUTPUT, is_pipe, open_pipe

_RENAME_EXCHANGE = 2
_AT_FDCWD = -100


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of a file, in pieces, no more of it than its size; OSError as ``open_regular``, so for pipes, too."""
    with open_regular(path) as stream:
        digest, left = hashlib.sha256(), os.fstat(stream.fileno()).st_size
        while block := stream.read(min(left, 1 << 20)):
            digest.update(block)
            left -= len(block)
    return digest.hexdigest()


class ChangedError(Exception):
    """A file holds other bytes than those that were asked for."""


def read_checked(path: Path, sha256: str) -> bytes:
    """A file's content, read once and only if it has this hash: what is returned is what was checked.

    Args:
        path: of an ordinary file; anything else is refused, so that a pipe in its place does not hang.
        sha256: 64 hexadecimal digits.

    Raises:
        ChangedError: it has another hash.
        OSError: it cannot be read, or is no ordinary file.
    """
    content = read_regular(path)
    if hashlib.sha256(content).hexdigest() != sha256:
        raise ChangedError(f"{path} has another SHA-256 than {sha256}")
    return content


def read_regular(path: Path, limit: int | None = None, *, holes: bool = True) -> bytes:
    """An ordinary file's content, read once, and no more of it than its size.

    What lies in /proc counts as ordinary files of no bytes, and some of them give terabytes, or wait: in a stranger's
    folder a link to one may be called like a picture.

    Args:
        path: links are followed.
        limit: the most bytes that it may have.
        holes: whether nearly all of it may be zeros that nobody wrote: a file of terabytes on a few kilobytes of disk.

    Raises:
        OSError: it cannot be read, is no ordinary file (EINVAL), has more bytes (EFBIG) or has such holes (EIO).
    """
    with open_regular(path) as stream:
        size = (state := os.fstat(stream.fileno())).st_size
        if not holes and size > 1 << 26 and 0 < state.st_blocks * 512 < size // 16:  # a disk may compress a little
            raise OSError(errno.EIO, "nearly all of it was never written", str(path))
        if limit is not None and size > limit:
            raise OSError(errno.EFBIG, f"over {limit} bytes", str(path))
        return stream.read(size)


def open_regular(path: Path) -> BinaryIO:
    """An ordinary file, open to read; what a pipe or a device gives has no end, and opening a pipe may not return.

    Raises:
        OSError: it cannot be opened, or is no ordinary file (EINVAL).
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not an ordinary file", str(path))
    return os.fdopen(descriptor, "rb")


def read_json(content: bytes | str, *, edited: bool = False) -> Any:
    """JSON from outside, in UTF-8.

    Args:
        content: bytes, or the text itself.
        edited: whether people write such files: their editors may put a byte order mark first, which programs do not.

    Raises:
        ValueError: it is none, is in another encoding, is nested without end, or has numbers of thousands of digits.
    """
    try:
        return json.loads(_utf8(content, edited=edited))
    except RecursionError as error:
        raise ValueError("its values are nested too deeply") from error


def _utf8(content: bytes | str, *, edited: bool) -> str:
    if isinstance(content, str):
        return content
    try:
        return content.removeprefix(codecs.BOM_UTF8 if edited else b"").decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not UTF-8 (byte {error.start})") from error


class NotTomlError(ValueError):
    """A text is not TOML; says where."""


_MOST_DOTS = 10_000  # a line; the time that a key takes grows with the square of its parts


def read_toml(content: bytes | str) -> dict[str, Any]:
    """TOML from outside, in UTF-8; people write it, as what is ``edited`` for ``read_json``.

    Raises:
        NotTomlError: it is none.
        ValueError: it is not UTF-8, is nested without end, or has numbers of thousands of digits or keys of thousands
            of parts.
    """
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    text = _utf8(content, edited=True)
    if any(line.count(".") > _MOST_DOTS for line in text.splitlines()):
        raise ValueError("a line has thousands of dots")
    try:
        values = tomllib.loads(text)
        str(values)  # a hexadecimal number may be longer than Python prints
    except tomllib.TOMLDecodeError as error:
        raise NotTomlError(str(error)) from error
    except RecursionError as error:
        raise ValueError("its values are nested too deeply") from error
    return values


NOTHING = "nothing was left behind"
"""How the line of a full disk ends, where nothing remains."""


_NO_PLACE = {errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.EEXIST, errno.ENOTEMPTY, errno.ELOOP}


@contextlib.contextmanager
def write_errors(path: Path, remains: str = NOTHING) -> Iterator[None]:
    """Turn the operating system's write errors into one clear line about ``path``, which ends with what remains."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(
                f"no space left to write {path}.",
                f"Free some space or choose another place; {remains}.",
                exit_code=1,
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise UserError(f"may not write {path}: {error.strerror}.", "Choose a folder you can write to.") from error
        if error.errno in _NO_PLACE:
            raise UserError(f"cannot write {path}: {error.strerror}.", "Choose another path.") from error
        if error.errno in (errno.EBUSY, errno.EXDEV):
            hint = f"Mount the folder above it, or choose another path; {remains}."
            raise UserError(f"cannot write {path}: something is mounted there.", hint, exit_code=1) from error
        if error.errno == errno.ENOENT and os.path.realpath(path).startswith(("/proc/", "/sys/")):
            raise UserError(f"cannot write {path}: no file can be made there.", "Choose another path.") from error
        if error.errno == errno.ENOENT and not path.parent.exists():
            raise UserError(f"cannot write {path}: its folder is gone.", "Repeat the command.", exit_code=1) from error
        if error.errno in (errno.EPIPE, errno.EBADF, errno.ENXIO, errno.ECONNREFUSED, errno.ECONNRESET):
            if path == STANDARD_OUTPUT:
                raise UserError("whoever read standard output has gone.", exit_code=1) from error
            raise UserError(f"nobody reads {path}.", "Start its reader first, and let it read.", exit_code=1) from error
        if error.errno in (errno.EFBIG, errno.EIO):
            raise UserError(
                f"cannot write {path}: {error.strerror}.", f"Check the disk; {remains}.", exit_code=1
            ) from error
        raise


def temporary_place() -> Path:
    """Where temporary files go.

    Raises:
        UserError: no folder takes any, as on a full disk or in a container that may not write.
    """
    try:
        return Path(tempfile.gettempdir())
    except FileNotFoundError as error:  # none takes even a few bytes
        raise UserError(
            "there is no folder that temporary files can be written to.",
            "Free some space, or name a folder: TMPDIR=FOLDER",
            exit_code=1,
        ) from error


def temporary_file() -> IO[bytes]:
    """A file without a name, gone when it is closed; a UserError if it cannot be made."""
    place = temporary_place()
    with write_errors(place, "TMPDIR=FOLDER names another one"):
        return tempfile.TemporaryFile(dir=place)


@contextlib.contextmanager
def temporary_folder() -> Iterator[Path]:
    """A folder for files that are gone when the block ends; an error in writing them is one clear line."""
    place = temporary_place()
    with (
        write_errors(place, "TMPDIR=FOLDER names another one"),
        tempfile.TemporaryDirectory(prefix="espmedsam-") as folder,
    ):
        yield Path(folder)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def atomic_path(path: Path, mode: int = 0o666, *, synced: bool = True, remains: str = NOTHING) -> Iterator[Path]:
    """A temporary path beside ``path``, with its suffix, that takes its place when the block ends well.

    Its file is there, with ``mode`` as far as the process's mask lets it. On any error, Ctrl-C included, it is removed
    and ``path`` stays as it was. What a pipe gets is written elsewhere first. With ``synced`` the content is on the
    disk by then; without, a power cut soon after may leave a damaged file. ``remains`` is for ``write_errors``.
    """
    if is_pipe(path):
        with temporary_folder() as folder, write_errors(path):
            whole = folder / f"whole{path.suffix}"
            whole.touch()
            yield whole
            with whole.open("rb") as content, open_pipe(path) as pipe:
                shutil.copyfileobj(content, pipe)
        return
    with write_errors(path, remains):
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.stem[:40]}.{secrets.token_hex(6)}{path.suffix}")
        temporary.touch(mode, exist_ok=False)
        try:
            yield temporary
            if synced:
                _sync(temporary)
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def atomic_write(
    path: Path, content: bytes | str, mode: int = 0o666, *, synced: bool = True, remains: str = NOTHING
) -> None:
    """Write a whole file or nothing; ``synced`` and ``remains`` as for ``atomic_path``."""
    with atomic_path(path, mode, synced=synced, remains=remains) as temporary:
        temporary.write_bytes(content.encode("utf-8", "backslashreplace") if isinstance(content, str) else content)


def _exchange(first: Path, second: Path) -> None:
    """Swap two directories in one step where the kernel and the file system can; else rename in two."""
    libc = ctypes.CDLL(None, use_errno=True)
    if hasattr(libc, "renameat2"):
        code = libc.renameat2(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE)
        if code == 0:
            return
    aside = first.with_name(f".{first.name[:40]}.{secrets.token_hex(6)}")
    second.rename(aside)
    first.rename(second)
    aside.rename(first)


def check_exchangeable(path: Path) -> None:
    """Raise a UserError, before any work, for a directory that is mounted, or that the command runs in."""
    if path.is_dir() and os.path.ismount(os.path.realpath(path)):
        raise UserError(
            f"{path} is mounted, and is replaced as a whole.", "Name a folder in it, or mount that above it."
        )
    if identity(path) == identity(Path()) is not None:
        raise UserError(f"{path} is the current folder, and is replaced as a whole.", "Call it from the one above it.")


@contextlib.contextmanager
def atomic_directory(path: Path, *, keep: bool = False) -> Iterator[Path]:
    """A new directory beside ``path`` that takes its place when the block ends well.

    Without ``keep`` there may be nothing at ``path``, or an empty directory. With it the new directory starts with hard
    links to (else copies of) the files ``path`` holds; replace, never modify them. What others put into ``path`` while
    the block runs is carried over. What ``check_exchangeable`` says holds.
    """
    check_exchangeable(path)
    path = Path(os.path.realpath(path))
    with write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name[:40]}.{secrets.token_hex(6)}")
        temporary.mkdir()
        try:
            before = _states(path) if keep else {}
            if before:
                shutil.copytree(path, temporary, symlinks=True, dirs_exist_ok=True, copy_function=_link_or_copy)
            yield temporary
            for file in temporary.rglob("*"):
                if file.is_file() and not file.is_symlink():
                    _sync(file)
            if keep and path.exists():
                _exchange(temporary, path)
                _carry_over(temporary, path, before)
            else:
                temporary.rename(path)  # which never replaces a directory that holds something
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


_State = tuple[int, int, int]


def _state(file: Path) -> _State:
    state = file.lstat()
    return state.st_ino, state.st_size, state.st_mtime_ns


def _states(folder: Path) -> dict[Path, _State]:
    """Every file below a folder, with what changes when it is replaced or written to."""
    files = (Path(place) / name for place, _, names in os.walk(folder) for name in names)
    return {file.relative_to(folder): _state(file) for file in files}


def _carry_over(old: Path, new: Path, before: dict[Path, _State]) -> None:
    """Move what came into the old directory, or changed in it, since ``before``; what was rewritten stays rewritten."""
    for name, state in _states(old).items():
        if before.get(name) == state:
            continue
        target = new / name
        if not os.path.lexists(target) or (name in before and _state(target)[1:] == before[name][1:]):
            target.parent.mkdir(parents=True, exist_ok=True)
            (old / name).replace(target)


@contextlib.contextmanager
def directory_lock(path: Path) -> Iterator[Callable[[], bool]]:
    """Hold the right to replace an existing directory; waits while another process holds it.

    Yields a function that tells whether the directory at ``path`` is still the one that is held: nothing stops writers
    that do not ask. The lock goes with its process, however that ends; file systems without locks have none.
    """
    while True:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            with contextlib.suppress(OSError):
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            if is_open_file(descriptor, path):
                yield partial(is_open_file, descriptor, path)
                return
            # The process that held it has put another in its place.
        finally:
            os.close(descriptor)


def identity(path: Path) -> tuple[int, int] | None:
    """Device and inode of what a path leads to, the same for links and hard links of a file; None for nothing there."""
    try:
        state = path.stat()
    except (OSError, ValueError):
        return None
    return state.st_dev, state.st_ino


def is_open_file(descriptor: int, path: Path) -> bool:
    """Whether ``path`` still names the file or directory that is open under ``descriptor``."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except OSError:
        return False


def _link_or_copy(source: str, target: str) -> str:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
    return target
