"""Names of machines."""

from __future__ import annotations


def is_host(name: str) -> bool:
    """Whether a name can be asked for at all; else each use of it ends in an error of Python's codecs."""
    try:
        return bool(name.encode("idna"))
    except UnicodeError:
        return False
