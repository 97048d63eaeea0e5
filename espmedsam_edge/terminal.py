"""Lines to the terminal: what others chose (names, addresses, metadata) is shown, and does nothing there."""

from __future__ import annotations

import sys
import threading
import traceback
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import typer

from espmedsam_edge.errors import printable, without_login
from espmedsam_edge.files import write_errors

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress


def tell(text: object, *, err: bool = False) -> None:
    """Print a text as ``printable_lines``; ``err``: on standard error. Stands for ``typer.echo``.

    Raises:
        UserError: it cannot be written, as to a full disk.
    """
    line = printable_lines(str(text))
    with write_errors(Path("standard error" if err else "standard output"), "what was written elsewhere stays"):
        if err and _drawing:  # by the console that draws: anything else would write into its bar
            _drawing[-1].print(line, markup=False, emoji=False, highlight=False, soft_wrap=True)
        else:
            typer.echo(line, err=err)


def printable_lines(text: str) -> str:
    """A text made ``printable``, but for its line ends, and ``without_login``."""
    return without_login("\n".join(printable(line) for line in text.split("\n")))


def terminal_console(**options: Any) -> Console:
    """A console of rich's that shows texts as ``tell`` does; its own colours and movements stay.

    Square brackets and colons in names are no markup of rich's: what is coloured has a style.
    """
    from rich.console import Console
    from rich.segment import Segment

    class PrintableConsole(Console):
        def render(self, *arguments: Any, **keywords: Any) -> Iterable[Segment]:
            for segment in super().render(*arguments, **keywords):
                if segment.control or segment.text.isprintable():
                    yield segment
                else:
                    yield Segment(printable_lines(segment.text), segment.style)

    return PrintableConsole(markup=False, emoji=False, **options)


_drawing: list[Console] = []
"""The consoles on standard error that draw bars now."""


def progress_bars(*columns: Any, **options: Any) -> Progress:
    """rich's bars on standard error, gone when they end; a line of ``tell`` there stands above them meanwhile."""
    from rich.progress import Progress, TextColumn

    for column in columns:
        if isinstance(column, TextColumn):
            column.markup = False

    class Bars(Progress):
        def start(self) -> None:
            super().start()
            if not self.disable:
                _drawing.append(self.console)

        def stop(self) -> None:
            super().stop()
            if self.console in _drawing:
                _drawing.remove(self.console)

    return Bars(*columns, console=terminal_console(stderr=True), transient=True, **options)


def show_tracebacks_printable() -> None:
    """Have the tracebacks of all threads quote names from outside as ``tell`` does."""

    def of_main(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        tell("".join(traceback.format_exception(kind, error, trace)).rstrip("\n"), err=True)

    def of_thread(ended: threading.ExceptHookArgs) -> None:
        if ended.exc_value is not None and not issubclass(ended.exc_type, SystemExit):
            tell(f"Exception in thread {ended.thread.name if ended.thread else 'unknown'}:", err=True)
            of_main(ended.exc_type, ended.exc_value, ended.exc_traceback)

    if sys.excepthook is sys.__excepthook__:  # another's stays
        sys.excepthook = of_main
    if threading.excepthook is threading.__excepthook__:
        threading.excepthook = of_thread
