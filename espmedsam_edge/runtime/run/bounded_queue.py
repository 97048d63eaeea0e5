"""A queue between two stages of the pipeline, bounded in items and in bytes, that can be aborted from any thread."""

from __future__ import annotations

import threading
from collections import deque
from typing import Generic, TypeVar

Item = TypeVar("Item")


class Aborted(Exception):
    """The queue was aborted while, or before, this thread used it."""


class BoundedQueue(Generic[Item]):
    """First in, first out.

    Args:
        items: how many it holds at most.
        size: how many bytes its items may hold together; an item larger than that goes in alone.
    """

    def __init__(self, items: int, size: int) -> None:
        self._limit, self._size_limit = items, size
        self._items: deque[tuple[Item, int]] = deque()
        self._size = 0
        self._aborted = False
        self._changed = threading.Condition()

    def put(self, item: Item, size: int = 0) -> None:
        """Append an item of ``size`` bytes once there is room.

        Raises:
            Aborted: the queue was aborted.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._aborted or not self._items or self._has_room(size))
            self._check()
            self._items.append((item, size))
            self._size += size
            self._changed.notify_all()

    def _has_room(self, size: int) -> bool:
        return len(self._items) < self._limit and self._size + size <= self._size_limit

    def get(self) -> Item:
        """Take the first item once there is one.

        Raises:
            Aborted: the queue was aborted.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._aborted or self._items)
            self._check()
            item, size = self._items.popleft()
            self._size -= size
            self._changed.notify_all()
            return item

    def wait(self, seconds: float) -> bool:
        """Whether there is an item, within some seconds.

        Raises:
            Aborted: the queue was aborted.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._aborted or self._items, seconds)
            self._check()
            return bool(self._items)

    def abort(self) -> None:
        """Wake every thread that waits, let go of the items, and raise ``Aborted`` from now on."""
        with self._changed:
            self._aborted = True
            self._items.clear()
            self._changed.notify_all()

    def _check(self) -> None:
        if self._aborted:
            raise Aborted
