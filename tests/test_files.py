"""Files are complete or absent, whatever happens while they are written."""

from __future__ import annotations

import errno
import hashlib
import os
import resource
import signal
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from espmedsam_edge import files
from espmedsam_edge.errors import UserError, spreadsheet_safe
from espmedsam_edge.files import (
    atomic_directory,
    atomic_path,
    atomic_write,
    read_regular,
    sha256_file,
    temporary_file,
    temporary_folder,
)
from espmedsam_edge.imaging.decode import read_image


def entries(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def test_a_file_is_written_and_replaced(tmp_path: Path) -> None:
    file = tmp_path / "new" / "a.txt"
    atomic_write(file, "first")
    atomic_write(file, b"second")
    assert file.read_bytes() == b"second"
    assert entries(file.parent) == ["a.txt"]


def test_new_files_and_folders_follow_the_umask(tmp_path: Path) -> None:
    previous = os.umask(0o027)
    try:
        atomic_write(tmp_path / "a.txt", "x")
        with atomic_directory(tmp_path / "folder"):
            pass
    finally:
        os.umask(previous)
    assert stat.S_IMODE((tmp_path / "a.txt").stat().st_mode) == 0o640
    assert stat.S_IMODE((tmp_path / "folder").stat().st_mode) == 0o750


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_an_error_leaves_the_old_file(tmp_path: Path, error: type[BaseException]) -> None:
    file = tmp_path / "a.txt"
    atomic_write(file, "old")

    def interrupted() -> None:
        with atomic_path(file) as temporary:
            temporary.write_text("half")
            raise error

    with pytest.raises(error):
        interrupted()
    assert file.read_text() == "old"
    assert entries(tmp_path) == ["a.txt"]


@pytest.mark.parametrize(
    ("number", "words", "exit_code"),
    [
        (errno.ENOSPC, "no space left to write", 1),
        (errno.EDQUOT, "no space left to write", 1),
        (errno.EIO, "cannot write", 1),
        (errno.EROFS, "may not write", 2),
        (errno.EACCES, "may not write", 2),
        (errno.EBUSY, "cannot write", 1),  # a file that a container mounted there
        (errno.ELOOP, "cannot write", 2),
        (errno.EBADF, "nobody reads", 1),  # /dev/fd/0, which is open for reading
    ],
)
def test_the_systems_errors_become_one_line(tmp_path: Path, number: int, words: str, exit_code: int) -> None:
    file = tmp_path / "a.txt"

    def failing() -> None:
        with atomic_path(file):
            raise OSError(number, os.strerror(number))

    with pytest.raises(UserError, match=f"{words} {file}") as caught:
        failing()
    assert caught.value.exit_code == exit_code
    assert entries(tmp_path) == []


def test_a_folder_that_goes_meanwhile_is_one_line(tmp_path: Path) -> None:
    folder = tmp_path / "f"

    def removing() -> None:
        with atomic_path(folder / "a.txt") as temporary:
            temporary.unlink()
            folder.rmdir()

    with pytest.raises(UserError, match="its folder is gone"):
        removing()


def test_other_errors_are_not_disguised(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), atomic_path(tmp_path / "a.txt"):
        (tmp_path / "absent").read_bytes()


def test_a_folder_or_a_file_in_the_way_is_reported(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match=r"cannot write .*folder"):
        atomic_write(tmp_path / "folder", "x")
    with pytest.raises(UserError, match="cannot write"):
        atomic_write(tmp_path / "file" / "a.txt", "x")
    with pytest.raises(UserError, match="cannot write"):
        atomic_write(tmp_path / ("n" * 300), "x")


def test_a_disk_that_fills_up_leaves_nothing(tmp_path: Path) -> None:
    """A file size limit is the full disk that any machine can set up."""
    script = f"""
from pathlib import Path
from espmedsam_edge.errors import UserError, spreadsheet_safe
from espmedsam_edge.files import atomic_write
try:
    atomic_write(Path({str(tmp_path / "a.bin")!r}), bytes(100_000))
except UserError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000)),
    )
    assert done.stdout.startswith("cannot write")
    assert entries(tmp_path) == []


@pytest.mark.skipif(not os.path.exists("/proc/version"), reason="needs /proc")
def test_what_says_that_it_has_no_bytes_is_not_read_on_and_on(tmp_path: Path) -> None:
    link = tmp_path / "picture.png"  # /proc/self/pagemap gives 256 GB
    link.symlink_to("/proc/version")
    assert link.is_file()
    assert read_regular(link) == b""
    assert sha256_file(link) == hashlib.sha256(b"").hexdigest()
    with pytest.raises(UserError, match=r"picture\.png"):
        read_image(link)


def test_a_temporary_folder_goes_and_its_errors_say_how_to_choose_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def filling_up() -> None:
        with temporary_folder() as folder:
            (folder / "a").write_text("1")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(UserError, match=f"no space left to write {tmp_path}.*TMPDIR=FOLDER"):
        filling_up()
    assert entries(tmp_path) == []


def test_no_place_for_temporary_files_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def full() -> str:
        raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found in ['/tmp']")

    monkeypatch.setattr(tempfile, "gettempdir", full)
    with pytest.raises(UserError, match=r"no folder that temporary files.*TMPDIR=FOLDER"), temporary_folder():
        pass
    with pytest.raises(UserError, match=r"no folder that temporary files.*TMPDIR=FOLDER"):
        temporary_file()


def test_a_folder_appears_in_one_step(tmp_path: Path) -> None:
    target = tmp_path / "bundle"
    with atomic_directory(target) as folder:
        (folder / "a").write_text("1")
        assert not target.exists()
    assert entries(target) == ["a"]
    assert entries(tmp_path) == ["bundle"]


def test_a_folder_that_holds_something_is_never_replaced(tmp_path: Path) -> None:
    target = tmp_path / "new"
    target.mkdir()  # an empty one is

    def made_meanwhile() -> None:
        with atomic_directory(target) as folder:
            (folder / "b").write_text("2")
            (target / "a").write_text("1")

    with pytest.raises(UserError, match=r"cannot write .*new: Directory not empty"):
        made_meanwhile()
    assert entries(target) == ["a"]
    assert entries(tmp_path) == ["new"]


def test_what_others_write_while_a_folder_is_changed_is_carried_over(tmp_path: Path) -> None:
    target = tmp_path / "folder"
    with atomic_directory(target) as folder:
        for name in ("kept", "saved anew", "added to", "rewritten"):
            (folder / name).write_text("before")
    with atomic_directory(target, keep=True) as folder:
        (folder / "rewritten").unlink()
        (folder / "rewritten").write_text("ours")
        (target / "sub").mkdir()
        (target / "sub" / "new").write_text("theirs")
        (target / "editor").write_text("theirs")
        (target / "editor").replace(target / "saved anew")
        with (target / "added to").open("a") as stream:
            stream.write(", theirs")
        (target / "link").symlink_to("kept")
    found = {str(path.relative_to(target)): path.read_text() for path in target.rglob("*") if path.is_file()}
    assert found == {
        "kept": "before",
        "saved anew": "theirs",
        "added to": "before, theirs",
        "rewritten": "ours",
        "sub/new": "theirs",
        "link": "before",
    }
    assert (target / "link").is_symlink()


def test_keep_starts_from_what_there_is(tmp_path: Path) -> None:
    target = tmp_path / "bundle"
    with atomic_directory(target) as folder:
        (folder / "a").write_text("1")
    with atomic_directory(target, keep=True) as folder:
        (folder / "b").write_text("2")
    assert entries(target) == ["a", "b"]


def test_a_failed_change_leaves_the_old_folder(tmp_path: Path) -> None:
    target = tmp_path / "bundle"
    with atomic_directory(target) as folder:
        (folder / "a").write_text("1")

    def interrupted() -> None:
        with atomic_directory(target, keep=True) as folder:
            (folder / "a").unlink()
            (folder / "b").write_text("2")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert entries(target) == ["a"]
    assert entries(tmp_path) == ["bundle"]


def test_folders_swap_where_the_kernel_cannot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files.ctypes, "CDLL", lambda *_, **__: object())
    target = tmp_path / "bundle"
    for name in "ab":
        with atomic_directory(target, keep=True) as folder:
            (folder / name).write_text(name)
    assert entries(target) == ["a", "b"]
    assert entries(tmp_path) == ["bundle"]


def test_a_killed_writer_leaves_the_old_file(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    atomic_write(file, "old")
    script = f"""
import sys, time
from pathlib import Path
from espmedsam_edge.files import atomic_path
with atomic_path(Path({str(file)!r})) as temporary:
    temporary.write_text("half")
    print("writing", flush=True)
    time.sleep(60)
"""
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "writing\n"
    process.send_signal(signal.SIGKILL)
    process.wait(10)
    process.stdout.close()
    assert file.read_text() == "old"


def test_sha256_is_that_of_the_whole_file(tmp_path: Path) -> None:
    content = bytes(range(256)) * 10_000  # more than one piece
    (tmp_path / "a").write_bytes(content)
    assert sha256_file(tmp_path / "a") == hashlib.sha256(content).hexdigest()


def test_the_sha256_of_a_pipe_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="not an ordinary file"):
        sha256_file(tmp_path / "pipe")


def test_numbers_and_names_stay_and_formulas_do_not_run() -> None:
    assert [spreadsheet_safe(text) for text in ("", "a", "3-4", "'-1", "polyp=1")] == ["", "a", "3-4", "'-1", "polyp=1"]
    for start in ("=", "+", "-", "@", "  =", "\uff1d", "\uff20"):
        assert spreadsheet_safe(f"{start}1") == f"'{start}1"
