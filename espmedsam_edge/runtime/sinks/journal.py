"""What a run has finished, file by file, kept beside its results, so that another run goes on from there.

A journal is a folder of files of JSON lines, one for each run that may be under way at the same time (a shard each). A
run appends to its own alone, which it holds locked, and reads all of them. A file counts as done by its last line,
which goes onto the disk after its results; lines that a kill left after the last such are cut off.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from espmedsam_edge.closing import Closing
from espmedsam_edge.errors import UserError
from espmedsam_edge.files import write_errors

_HEAD = {"journal": "espmedsam-edge", "version": 1}
_SUFFIX = ".jsonl"


@dataclass(frozen=True)
class Record:
    """A file that is done.

    Attributes:
        label: what results call it.
        settings: hash of all that its results depend on besides its content.
        sha256: of its content.
        outputs: its results, from the folder above the journal, each with its ``extent``.
        size: (H, W) of its last frame.
        whole: whether all of it could be done; else its lines count, and it is done again.
        lines: the file that its lines are in, and where they begin and end.
    """

    label: str
    settings: str
    sha256: str
    outputs: Sequence[Sequence[str | int | None]]
    size: Sequence[int]
    whole: bool
    lines: tuple[Path, int, int]


def extent(path: Path) -> int | None:
    """The size of a file in bytes, how many files are in a folder; None for nothing there."""
    try:
        return len(os.listdir(path)) if path.is_dir() else path.stat().st_size
    except OSError:
        return None


class Journal(Closing):
    """Opened for the length of a run.

    Args:
        folder: of the journal.
        name: of the run among those that share it.

    Attributes:
        found: whether an earlier run of that name left something.
        begun: labels of the files that runs of that name began and did not finish.

    Raises:
        UserError: another run of that name is under way, or the folder holds something else or cannot be written to.
    """

    def __init__(self, folder: Path, name: str = "all") -> None:
        self.folder = folder
        self.begun: set[str] = set()
        self._records: dict[tuple[str, str], Record] = {}
        self._own = folder / f"{name}{_SUFFIX}"
        if folder.is_symlink() or self._own.is_symlink():
            raise UserError(f"{folder} is a link, and no run's own folder.", "Choose another place for the results.")
        with write_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            for file in sorted(folder.glob(f"*{_SUFFIX}")):
                if not file.is_file():  # a pipe has no end, and opening it may not return
                    raise UserError(f"{file} is no ordinary file.", "Choose another place for the results.")
                if file != self._own:
                    self._load(file)
            self._stream: BinaryIO = self._own.open("ab+")
            try:
                self._lock()
                end = self._load(self._own)
                self.found = end > 0
                self._stream.truncate(end)
                self._start = end
                if not end:
                    self._append(_HEAD)
                    self._start = self._stream.tell()
            except BaseException:
                self._stream.close()
                raise

    def _lock(self) -> None:
        try:
            fcntl.flock(self._stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"another run is writing to {self._own}.", "Wait for its end, or choose another place.", exit_code=1
            ) from None
        except OSError:  # a file system without locks
            return

    def _load(self, file: Path) -> int:
        """Take in a file's records; returns where the last of them ends."""
        self.begun = set()
        offset = start = end = 0  # where a line begins, the lines of the next record do, the last record ends
        with file.open("rb") as stream:
            for line in stream:
                entry = _parsed(line)
                foreign = not offset and entry != _HEAD and not _line(_HEAD).startswith(line)
                if entry is None and not foreign:  # cut off by a kill, or just being written
                    break
                begin, offset = offset, offset + len(line)
                if foreign:
                    raise UserError(f"{file} is no journal of this version.", "Choose another place for the results.")
                if isinstance(entry, list):
                    continue
                try:
                    if "done" in entry:
                        self._take(entry, (file, start, begin))
                    elif "began" in entry:
                        self.begun.add(entry["began"])
                except (TypeError, ValueError, OverflowError):
                    raise UserError(f"{file} is damaged.", "Remove its folder, and all is done anew.") from None
                start = end = offset
        return end

    def _take(self, entry: dict[str, Any], lines: tuple[Path, int, int]) -> None:
        label, settings, sha256, outputs, (height, width), whole = entry["done"]
        outputs = [(name, as_it_was) for name, as_it_was in outputs]
        texts = label, settings, sha256, *(name for name, _ in outputs)
        if not all(isinstance(text, str) and "\0" not in text for text in texts):
            raise ValueError("no texts")
        size = int(height), int(width)
        if not 0 <= min(size) <= max(size) < 1 << 31:
            raise ValueError("no size")
        self.begun.discard(label)
        self._records[label, settings] = Record(label, settings, sha256, outputs, size, whole, lines)

    def record(self, label: str, settings: str) -> Record | None:
        """The last of a file."""
        return self._records.get((label, settings))

    def records(self, settings: str) -> list[Record]:
        """The last of each file, with these settings."""
        return [record for record in self._records.values() if record.settings == settings]

    def lines(self, record: Record) -> Iterator[list[Any]]:
        """What ``line`` took for a file, in order."""
        place, start, end = record.lines
        with place.open("rb") as stream:
            stream.seek(start)
            while stream.tell() < end:
                yield json.loads(stream.readline())

    def began(self, label: str) -> None:
        """A file is begun whose results grow."""
        self._append({"began": label})
        self._start = self._stream.tell()

    def line(self, values: Sequence[Any]) -> None:
        """Keep something of the file that is done next.

        Raises:
            UserError: the disk is full, or the folder cannot be written to.
        """
        self._append(list(values))

    def done(
        self,
        label: str,
        settings: str,
        sha256: str,
        outputs: Sequence[Path],
        size: Sequence[int],
        *,
        whole: bool = True,
        sync: bool = True,
    ) -> None:
        """A file is done: its results are whole, and its lines are those since the last one.

        Args:
            label, settings, sha256, size, whole: see ``Record``.
            outputs: its results.
            sync: put the journal onto the disk; else the next that does puts this one there, too.

        Raises:
            UserError: see ``line``.
        """
        above = self.folder.parent
        listed = [(os.path.relpath(path, above), extent(path)) for path in outputs]
        entry = {"done": [label, settings, sha256, listed, list(size), whole]}
        end = self._stream.tell()
        self._append(entry)
        if sync:
            with write_errors(self.folder, "what is finished stays, and the same command goes on from there"):
                os.fsync(self._stream.fileno())
        self._take(json.loads(json.dumps(entry)), (self._own, self._start, end))
        self._start = self._stream.tell()

    def stand(self, record: Record) -> bool:
        """Whether a file's results are all there, as they were written."""
        return all(extent(self.folder.parent / str(name)) == size for name, size in record.outputs)

    def _append(self, entry: object) -> None:
        with write_errors(self.folder, "what is finished stays, and the same command goes on from there"):
            self._stream.write(_line(entry))
            self._stream.flush()

    def close(self) -> None:
        """Let another run go on."""
        self._stream.close()


def _line(entry: object) -> bytes:
    return json.dumps(entry, separators=(",", ":")).encode() + b"\n"


def _parsed(line: bytes) -> Any:
    """A line's value, a list or an object; None for anything else."""
    try:
        value = json.loads(line) if line.endswith(b"\n") else None
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, list | dict) else None
