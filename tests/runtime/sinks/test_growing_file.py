"""A file that grows has its name only when it is whole, and is on the disk before that."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from espmedsam_edge.errors import UserError
from espmedsam_edge.runtime.sinks import growing_file
from espmedsam_edge.runtime.sinks.growing_file import GrowingFile, make_partial


def begun(tmp_path: Path, *, keep_interrupted: bool = False, content: bytes = b"content") -> GrowingFile:
    file = GrowingFile(tmp_path / "new" / "a.mp4", keep_interrupted=keep_interrupted)
    file.begin().write_bytes(content)
    return file


def test_it_takes_its_name_at_the_end(tmp_path: Path) -> None:
    file = begun(tmp_path)
    assert os.listdir(tmp_path / "new") == ["a.partial.mp4"]
    assert file.remains == f"what was written is in {tmp_path}/new/a.partial.mp4"
    file.end(None)
    assert os.listdir(tmp_path / "new") == ["a.mp4"]
    assert file.path.read_bytes() == b"content"


def test_what_an_earlier_run_left_is_left_alone(tmp_path: Path) -> None:
    assert make_partial(tmp_path / "a.mp4") == tmp_path / "a.partial.mp4"
    assert make_partial(tmp_path / "a.mp4") == tmp_path / "a.partial-2.mp4"
    assert make_partial(tmp_path / "a.mp4") == tmp_path / "a.partial-3.mp4"


@pytest.mark.parametrize(
    ("kind", "keep", "whole", "left"),
    [
        (KeyboardInterrupt, False, True, []),
        (RuntimeError, False, True, []),
        (KeyboardInterrupt, True, True, ["a.mp4"]),
        (KeyboardInterrupt, True, False, ["a.partial.mp4"]),
        (UserError, False, True, ["a.partial.mp4"]),
        (UserError, True, False, ["a.partial.mp4"]),
    ],
)
def test_what_is_left_of_a_run_that_failed(
    tmp_path: Path, kind: type[BaseException], keep: bool, whole: bool, left: list[str]
) -> None:
    begun(tmp_path, keep_interrupted=keep).end(kind, whole=whole)
    assert os.listdir(tmp_path / "new") == left


def test_a_file_that_is_not_whole_is_reported_and_kept(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"a\.mp4 came out incomplete.*What was written is in .*a\.partial\.mp4"):
        begun(tmp_path).end(None, whole=False)
    assert os.listdir(tmp_path / "new") == ["a.partial.mp4"]


def test_an_empty_file_that_is_not_whole_is_no_file(tmp_path: Path) -> None:
    begun(tmp_path, content=b"").end(UserError, whole=False)
    assert os.listdir(tmp_path / "new") == []


def test_a_file_never_begun_has_no_end(tmp_path: Path) -> None:
    file = GrowingFile(tmp_path / "a.mp4")
    file.end(None, whole=False)
    assert file.remains == "nothing was left behind"
    assert os.listdir(tmp_path) == []


def test_a_place_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot write .*a\.mp4"):
        GrowingFile(tmp_path / "file" / "a.mp4").begin()


def test_what_is_written_goes_onto_the_disk_while_it_grows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced = threading.Semaphore(0)
    monkeypatch.setattr(growing_file, "SYNC_SECONDS", 0.001)
    monkeypatch.setattr(growing_file.os, "fdatasync", lambda descriptor: synced.release())
    file = begun(tmp_path)
    assert synced.acquire(timeout=60)
    file.end(None)


def test_a_disk_that_refuses_is_noticed_by_the_writer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = threading.Event()

    def refuse(descriptor: int) -> None:
        asked.set()
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(growing_file, "SYNC_SECONDS", 0.001)
    monkeypatch.setattr(growing_file.os, "fdatasync", refuse)
    file = begun(tmp_path)
    assert asked.wait(60)
    assert file._sync is not None
    file._sync._thread.join(60)
    with pytest.raises(OSError, match="Input/output"):
        file.check()
    file.end(UserError)
