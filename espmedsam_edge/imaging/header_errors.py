"""What is wrong with an image file's header."""

from __future__ import annotations

CUT_OFF = "it is cut off"


class HeaderError(ValueError):
    """Not a whole image of a known format; the text says why, as the end of a sentence."""


class NotReadError(HeaderError):
    """Of a kind that is not read, however whole."""
