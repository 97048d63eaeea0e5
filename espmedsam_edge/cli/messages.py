"""What a command tells beside its results: the package's log records as lines on standard error."""

from __future__ import annotations

import inspect
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial, wraps
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, get_type_hints

import typer

from espmedsam_edge.errors import UserError, printable
from espmedsam_edge.terminal import progress_bars, tell

if TYPE_CHECKING:
    from espmedsam_edge.runtime.run.jobs import RunProgress

PACKAGE = __name__.partition(".")[0]
VERBOSE = typer.Option(False, "--verbose", "-v", help="Tell more, and which module each line is from.")
QUIET = typer.Option(False, "--quiet", "-q", help="Tell of warnings and errors alone.")
_LISTED_FAILURES = 1000


class Messages(logging.Handler):
    """Prints the package's records while it is entered, the bare message each; other loggers stay as they are.

    A progress bar stays below the lines: see ``tell``.
    """

    def __init__(self) -> None:
        super().__init__()
        self._logger = logging.getLogger(PACKAGE)
        self._verbose = self._quiet = False

    def __enter__(self) -> Messages:
        self._before = self._logger.level, self._logger.propagate
        self._logger.addHandler(self)
        self._logger.propagate = False  # else a handler that some library put on the root logger would print it again
        self._logger.setLevel(logging.INFO)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._logger.removeHandler(self)
        level, self._logger.propagate = self._before
        self._logger.setLevel(level)

    def emit(self, record: logging.LogRecord) -> None:
        """Print a record."""
        with suppress(UserError):  # standard error cannot be written: nobody is left to tell
            tell(self.format(record), err=True)

    def choose(self, *, verbose: bool = False, quiet: bool = False) -> None:
        """Print more, with the name of each record's logger, or warnings and errors alone; neither changes nothing.

        Raises:
            UserError: both were asked for.
        """
        self._verbose, self._quiet = self._verbose or verbose, self._quiet or quiet
        if self._verbose and self._quiet:
            raise UserError("--verbose and --quiet exclude each other.", "Leave one of them out.")
        if self._verbose:
            self.setFormatter(logging.Formatter("%(name)s: %(message)s"))
        self._logger.setLevel(logging.DEBUG if self._verbose else logging.WARNING if self._quiet else logging.INFO)


Command = Callable[..., None]


def talking(function: Command) -> Command:
    """A command's function with --verbose and --quiet after its own options."""
    signature = inspect.signature(function, eval_str=True)
    if "quiet" in signature.parameters:  # a group's module is kept, when ``main`` is called again
        return function
    hints = {**get_type_hints(function, include_extras=True), "verbose": bool, "quiet": bool}
    options = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=option, annotation=bool)
        for name, option in (("verbose", VERBOSE), ("quiet", QUIET))
    ]

    @wraps(function)
    def command(*arguments: Any, verbose: bool, quiet: bool, **named: Any) -> None:
        for messages in _installed():
            messages.choose(verbose=verbose, quiet=quiet)
        function(*arguments, **named)

    command.__annotations__ = hints
    command.__signature__ = signature.replace(parameters=[*signature.parameters.values(), *options])  # type: ignore[attr-defined]
    return command


def _installed() -> list[Messages]:
    return [handler for handler in logging.getLogger(PACKAGE).handlers if isinstance(handler, Messages)]


def tell_failures(lines: Sequence[str]) -> None:
    """Print what failed, a line each; of very many the first thousand."""
    for line in lines[:_LISTED_FAILURES]:
        tell(f"failed: {printable(line)}", err=True)  # names may hold line ends
    if len(lines) > _LISTED_FAILURES:
        tell(f"failed: {len(lines) - _LISTED_FAILURES} more.", err=True)


@contextmanager
def counting_bar(what: str, total: int | None = None) -> Iterator[Callable[..., None] | None]:
    """A bar on the terminal, and what moves it (``completed``, ``total``, ``advance``, ``description``); else None."""
    if not shows_progress():
        yield None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with progress_bars(*columns) as bar:
        yield partial(bar.update, bar.add_task(what, total=total))


@contextmanager
def run_bars(jobs: int) -> Iterator[Callable[[RunProgress], None] | None]:
    """A bar on the terminal with FPS and remaining time, a fresh one for each source; nothing where there is none."""
    if not shows_progress():
        yield None
        return
    from rich.markup import escape
    from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, TextColumn, TimeRemainingColumn
    from rich.text import Text

    class Speed(ProgressColumn):
        def render(self, task: Any) -> Text:
            return Text(f"{task.speed:.1f} FPS" if task.speed else "- FPS")

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), Speed(), TimeRemainingColumn())
    with progress_bars(*columns) as bars:
        tasks = {-1: bars.add_task("starting", total=None)}

        def show(progress: RunProgress) -> None:
            if progress.job not in tasks:
                for job in [-1] if progress.live else list(tasks):  # live sources go on beside each other
                    if job in tasks:
                        bars.remove_task(tasks.pop(job))
                part = f" ({progress.job + 1}/{jobs})" if jobs > 1 else ""
                tasks[progress.job] = bars.add_task(escape(Path(progress.name).name) + part, total=progress.expected)
            bars.update(tasks[progress.job], completed=progress.done, total=progress.expected)

        yield show


def shows_progress() -> bool:
    """Whether a command draws a bar: on a terminal, unless it is to be quiet."""
    return sys.stderr.isatty() and logging.getLogger(PACKAGE).isEnabledFor(logging.INFO)


@contextmanager
def once(*rooms: str) -> Iterator[None]:
    """Print what is told in the block the first time only: what holds for every graph is told once.

    Args:
        rooms: of the package, whose lines alone are meant; none: all.
    """
    told: set[str] = set()
    loggers = tuple(f"{PACKAGE}.{room}" for room in rooms) or (PACKAGE,)

    def first(record: logging.LogRecord) -> bool:
        if not record.name.startswith(loggers):
            return True
        line = record.getMessage()
        new = line not in told
        told.add(line)
        return new

    handlers = _installed()
    for handler in handlers:
        handler.addFilter(first)
    try:
        yield
    finally:
        for handler in handlers:
            handler.removeFilter(first)
