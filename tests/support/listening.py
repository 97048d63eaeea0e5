"""What the package tells through ``logging``, for tests that look at it while it comes or outside a test's function."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class _Lines(logging.Handler):
    def __init__(self, call: Callable[[str], None]) -> None:
        super().__init__()
        self._call = call

    def emit(self, record: logging.LogRecord) -> None:
        self._call(record.getMessage())


@contextmanager
def listening(call: Callable[[str], None]) -> Iterator[None]:
    """Have ``call`` called with each line of the package that a user would see."""
    logger, handler = logging.getLogger("espmedsam_edge"), _Lines(call)
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)
