"""The sinks of a run that can be gone on with: they note what is finished, and write tables once all of it is there."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from espmedsam_edge.closing import Closing
from espmedsam_edge.errors import UserError
from espmedsam_edge.files import sha256_file, write_errors
from espmedsam_edge.runtime.segmentation import Segmentation
from espmedsam_edge.runtime.sinks.journal import Journal, Record
from espmedsam_edge.runtime.sinks.sink import Sink
from espmedsam_edge.runtime.sources.source import Source, SourceFrame

log = logging.getLogger(__name__)


class Table(Sink, Protocol):
    """A sink whose part of a frame can be kept, and given to it later."""

    def entry(self, frame: SourceFrame, result: Segmentation) -> Any:
        """Its part of a frame, as JSON has it."""

    def take(self, entry: Any) -> None:
        """Write such a part.

        Raises:
            UserError: it could not be written.
        """


State = tuple[int, int, int]
"""What changes when a file is written to: inode, bytes, time."""


def state_of(path: Path) -> State | None:
    """None: nothing is there."""
    try:
        state = os.stat(path)
    except OSError:
        return None
    return state.st_ino, state.st_size, state.st_mtime_ns


class ResumedTables:
    """Keeps in the journal what tables shall say of each frame, and writes them from there when the run ends.

    Stands behind all other sinks, as a picture is finished once it came here. A video is when its job ends: see ``of``.

    Args:
        journal: of the run; closed when this is.
        settings: see ``Record``.
        labels: what results call each file of the run, in the order of the tables.
        outputs: each file's results.
        states: of the files when it was decided what is to be done.
        tables: not yet entered.
    """

    def __init__(
        self,
        journal: Journal,
        settings: str,
        labels: Mapping[Path, str],
        outputs: Callable[[Path], Sequence[Path]],
        states: Mapping[Path, State | None],
        tables: Sequence[Table],
    ) -> None:
        self._journal, self._settings, self._labels = journal, settings, labels
        self._outputs, self._states, self._tables = outputs, states, tables
        self._size: tuple[int, int] = (0, 0)
        self._clips: set[Path] = set()
        # Of files that are done again, what an earlier run said counts no more.
        self._records: dict[str, Record] = {}
        for file, label in labels.items():
            record = journal.record(label, settings)
            if file not in states and record is not None:
                self._records[label] = record

    def __enter__(self) -> ResumedTables:
        return self

    def write(self, frame: SourceFrame, result: Segmentation) -> None:
        """See ``Sink.write``."""
        self._size = result.size
        if self._tables:
            self._journal.line([table.entry(frame, result) for table in self._tables])
        if frame.path not in self._clips:
            self.finished(frame.path)

    def of(self, source: Source, failed: Callable[[], bool]) -> Sink:
        """The first sink of a clip's job, which notes that it is finished when all its others are.

        Args:
            source: of the job.
            failed: whether the job failed in part.
        """
        self._clips.add(source.files[0])
        return _Clip(self, source, failed)

    def began(self, file: Path) -> None:
        """A clip is begun."""
        self._size = (0, 0)
        self._journal.began(self._labels[file])

    def finished(self, file: Path, *, whole: bool = True) -> None:
        """Note that a file is done; whether all of it could be."""
        label, state = self._labels[file], self._states[file]
        sha256 = ""
        if whole:
            try:
                sha256 = sha256_file(file)
            except OSError:
                whole = False
            if state is None or state_of(file) != state:
                log.warning("%s changed while it was segmented; --resume does it again.", label)
                whole = False
        self._journal.done(label, self._settings, sha256, self._outputs(file), self._size, whole=whole)
        record = self._journal.record(label, self._settings)
        if record is not None:
            self._records[label] = record

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with self._journal:
            if kind is None and self._tables:
                self._write_tables()

    def _write_tables(self) -> None:
        with ExitStack() as stack, write_errors(self._journal.folder):
            for table in self._tables:
                stack.enter_context(table)
            for label in self._labels.values():
                record = self._records.get(label)
                for entries in () if record is None else self._journal.lines(record):
                    self._take(entries)

    def _take(self, entries: Sequence[Any]) -> None:
        try:
            for table, entry in zip(self._tables, entries, strict=True):
                table.take(entry)
        except (AttributeError, LookupError, TypeError, ValueError, OverflowError):  # who else wrote there?
            place = self._journal.folder
            raise UserError(f"{place} is damaged.", "Remove that folder, and all is done anew.", exit_code=1) from None


class _Clip(Closing):
    def __init__(self, tables: ResumedTables, source: Source, failed: Callable[[], bool]) -> None:
        self._tables, self._source, self._failed = tables, source, failed

    def __enter__(self) -> _Clip:
        self._tables.began(self._source.files[0])
        return self

    def write(self, frame: SourceFrame, result: Segmentation) -> None:
        """The others write."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None or issubclass(kind, UserError):
            whole = kind is None and not self._source.failures and not self._failed()
            self._tables.finished(self._source.files[0], whole=whole)
