"""Numbers in place of names: for sources whose names must not be passed on, as a file's may hold a patient's."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from espmedsam_edge.errors import UserError, printable
from espmedsam_edge.runtime.sources.passed_on import PassedOn
from espmedsam_edge.runtime.sources.source import Failure, Source, SourceFrame


class SourceNames:
    """What sources are called: ``source-2`` the second that was named, ``source-2-0001`` the first of its files.

    A folder's and a pattern's files are numbered by their names, in natural order, whatever order they are read in; so
    who has the files can tell which is which.
    """

    def __init__(self) -> None:
        self.files: dict[Path, str] = {}
        self._hide: _Hide | None = None

    def add(self, number: int, files: Sequence[Path] = ()) -> str:
        """Take in the files that what the user named led to; returns what it is called itself."""
        name = f"source-{number}"
        for index, file in enumerate(files, 1):
            self.files[file] = name if len(files) == 1 else f"{name}-{index:04d}"
        self._hide = None
        return name

    def hide(self, text: str) -> str:
        """A text with what files are called instead of their names."""
        if self._hide is None:
            folders = {str(file.parent): name.rsplit("-", 1)[0] for file, name in self.files.items() if "-" in name[7:]}
            folders.pop(".", None)
            self._hide = _Hide(folders | {str(file): name for file, name in self.files.items()})
        return self._hide(text)

    def hide_all(self, failures: Iterable[Failure]) -> list[Failure]:
        """Failures with what files are called instead of their names."""
        return [Failure(self.hide(failure.name), self.hide(failure.message)) for failure in failures]

    @contextmanager
    def in_errors(self) -> Iterator[None]:
        """Hide names in the error that ends the block."""
        try:
            yield
        except UserError as error:
            if not self.files:
                raise
            hidden = UserError(self.hide(error.message), self.hide(error.hint), exit_code=error.exit_code)
            raise hidden from error

    @contextmanager
    def in_records(self) -> Iterator[None]:
        """Hide names in what the package tells within the block, whoever listens."""

        def hidden(record: logging.LogRecord) -> bool:
            if self.files:
                record.msg, record.args = self.hide(record.getMessage()), ()
            return True

        names = [name for name in logging.root.manager.loggerDict if name.startswith(__name__.partition(".")[0])]
        loggers = [logging.getLogger(name) for name in names]
        for logger in loggers:
            logger.addFilter(hidden)
        try:
            yield
        finally:
            for logger in loggers:
                logger.removeFilter(hidden)


def hide(text: str, names: Iterable[str], shown: str) -> str:
    """A text with ``shown`` instead of any of the names."""
    return _Hide(dict.fromkeys(names, shown))(text)


class _Hide:
    """Replaces names where they stand for themselves: a folder ``.`` is not every full stop."""

    def __init__(self, shown: Mapping[str, str]) -> None:
        self._shown = {_plain(name): new for name, new in shown.items()}
        names = sorted((name for name in self._shown if name), key=len, reverse=True)
        either = "|".join(re.escape(name).replace(r"\ ", r"\s+") for name in names)
        self._pattern = re.compile(rf"(?<![\w./-])(?:{either})(?![\w-]|\.\w)") if names else None

    def __call__(self, text: str) -> str:
        if self._pattern is None:
            return text
        return self._pattern.sub(lambda found: self._shown[_plain(found[0])], printable(" ".join(text.split())))


def _plain(name: str) -> str:
    """As errors have it: one space where there are several, or a line ends, and printable."""
    return printable(" ".join(name.split()))


class NumberedSource(PassedOn):
    """A source of files under another name, whose frames have their files' numbers for an address.

    What it says of what it cannot read has the files' names, which ``SourceNames`` hides where it is shown.

    Args:
        source: not yet entered.
        name: what it is called if it has several files; else it is called what its file is.
        names: of its files.
    """

    def __init__(self, source: Source, name: str, names: SourceNames) -> None:
        super().__init__(source)
        self._names = names
        self._name = name if len(source.files) > 1 else names.files[source.files[0]]

    @property
    def name(self) -> str:
        return self._name

    def __iter__(self) -> Iterator[SourceFrame]:
        for frame in self._source:
            yield replace(frame, address=self._names.files[frame.path])
