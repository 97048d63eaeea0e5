"""The one error that a user can cause and mend."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from difflib import get_close_matches


def printable(text: str) -> str:
    """A text as a terminal may show it: what moves the cursor, sets a title or turns the reading direction as escapes.

    Names of files, modalities and streams and texts of metadata come from others. Every character that is neither
    printable nor a space (control characters, those without a width, bidirectional marks, halves of surrogate pairs,
    which stand for bytes of a name that are not UTF-8) becomes its escape of Python's.

    Examples:
        >>> printable("polyp\x1b[2J.png")
        'polyp\\\\x1b[2J.png'
    """
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def spreadsheet_safe(text: str) -> str:
    """A name as a cell of a CSV file: ``printable``, and with an apostrophe before what a spreadsheet would calculate.

    Spreadsheets take cells for formulas that start with =, +, - or @ (or their wide forms), some after white space, and
    quotes do not keep them from it (CWE-1236); where a comma is in numbers, a semicolon begins a cell. For texts from
    outside only: a number keeps its minus.
    """
    return _FORMULA.sub(r"\1'\2", printable(text))


_FORMULA = re.compile('(^|;)([\\s"]*[=+@\uff1d\uff0b\uff0d\uff20-])')


def plot_safe(text: str) -> str:
    """A name as matplotlib draws it: ``printable``, and between two dollars no formula, which may be an error."""
    return printable(text).replace("$", r"\$")


_LONGEST = (
    2000  # characters of a message: a line with a few names of files, not the megabytes that others put into names
)

_LOOKED_AT = 1000  # names that a misspelt one is compared with: files may have a million


_LOGIN = re.compile(r"(:/+)(?!USER:PASSWORD@)[^\s/@:]*:\S*@")  # that of examples stays


def without_login(text: str) -> str:
    """A text in which addresses name no user and no password: one may stand where a file's name was wanted.

    Examples:
        >>> without_login("no file at https://me:secret@host/weights.pth.")
        'no file at https://***@host/weights.pth.'
    """
    return _LOGIN.sub(r"\1***@", text) if ":/" in text else text


def _one_line(text: str) -> str:
    line = printable(" ".join(text.split()))
    return without_login(line if len(line) <= _LONGEST else f"{line[: _LONGEST - 500]} ... {line[-495:]}")


class UserError(Exception):
    """Something the user can put right: says what failed, on which value, and what to do next.

    Examples:
        >>> from espmedsam_edge import Bundle, UserError
        >>> try:
        ...     Bundle.open("nowhere.bundle")
        ... except UserError as error:
        ...     print(error.message, error.exit_code)
        no bundle at nowhere.bundle. 2

    Commands print it as one line and leave with ``exit_code``: 2 for wrong use, 1 where inputs or the machine failed.
    Errors of any other class are bugs of this package. What message and hint quote is made ``printable``, addresses
    are ``without_login``, and what is longer than 2,000 characters lacks its middle.
    """

    def __init__(self, message: str, hint: str = "", *, exit_code: int = 2) -> None:
        self.message = _one_line(message)
        self.hint = _one_line(hint)
        self.exit_code = exit_code
        super().__init__(f"{self.message} {self.hint}".strip())

    def __reduce__(self) -> tuple[Callable[..., UserError], tuple[type[UserError], str, str], dict[str, object]]:
        """Crosses process borders, with all that it carries."""
        return _again, (type(self), self.message, self.hint), self.__dict__


def _again(kind: type[UserError], message: str, hint: str) -> UserError:
    error = kind.__new__(kind)
    UserError.__init__(error, message, hint)
    return error


def nearest(value: str, known: Iterable[str]) -> str:
    """The hint for a misspelt name: the nearest known one first, then all of them."""
    names = list(dict.fromkeys(known))
    close = get_close_matches(value.lower(), names[:_LOOKED_AT], n=1, cutoff=0.5)
    listing = f"Known: {', '.join(names)}." if names else "None is known."
    return f"Did you mean '{close[0]}'? {listing}" if close else listing
