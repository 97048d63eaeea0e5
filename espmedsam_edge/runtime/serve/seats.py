"""Who is served next: a few at a time, one of each client, so that none waits for what another has sent."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Generic, TypeVar

Seat = TypeVar("Seat")


class Full(Exception):
    """Too many wait already."""


class Seats(Generic[Seat]):
    """Lends what there is a few of, each for one request; used in one event loop.

    Args:
        seats: what is lent.
        waiting: how many may wait.
        of_a_client: how many of one client may wait.
    """

    def __init__(self, seats: Sequence[Seat], waiting: int, of_a_client: int) -> None:
        self._free = list(seats)
        self._most, self._most_of_a_client = waiting, of_a_client
        self._queue: list[tuple[str, asyncio.Future[Seat]]] = []
        self._seated: set[str] = set()
        self._present: Counter[str] = Counter()  # requests that wait, or are about to, or are seated

    @asynccontextmanager
    async def place(self, client: str) -> AsyncIterator[None]:
        """A place among those who wait, taken while a request arrives.

        Raises:
            Full: there is none.
        """
        waiting = self._present.total() - len(self._seated)
        mine = self._present[client] - (client in self._seated)
        if waiting >= self._most or mine >= self._most_of_a_client:
            raise Full
        self._present[client] += 1
        try:
            yield
        finally:
            self._present[client] -= 1
            self._present += Counter()  # forgets clients of whom nothing is left

    @asynccontextmanager
    async def seat(self, client: str) -> AsyncIterator[Seat]:
        """Wait until one is free and the client has no other; those who came first go first."""
        turn: asyncio.Future[Seat] = asyncio.get_running_loop().create_future()
        self._queue.append((client, turn))
        self._lend()
        try:
            seat = await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():  # lent in the same moment
                self._give_back(client, turn.result())
            self._queue = [entry for entry in self._queue if entry[1] is not turn]
            raise
        try:
            yield seat
        finally:
            self._give_back(client, seat)

    def _give_back(self, client: str, seat: Seat) -> None:
        self._seated.discard(client)
        self._free.append(seat)
        self._lend()

    def _lend(self) -> None:
        for client, turn in list(self._queue):
            if not self._free:
                return
            if client not in self._seated and not turn.done():
                self._queue.remove((client, turn))
                self._seated.add(client)
                turn.set_result(self._free.pop())
