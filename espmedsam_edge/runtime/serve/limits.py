"""How often a client may do something: token buckets, one a client, in bounded memory."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable


class TokenBucket:
    """``burst`` at once, then ``rate`` a second.

    Example:
        >>> bucket = TokenBucket(rate=1, burst=2, clock=lambda: 0.0)
        >>> [bucket.take() for _ in range(3)]
        [True, True, False]
    """

    def __init__(self, rate: float, burst: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._rate, self._burst, self._clock = rate, burst, clock
        self._level, self._at = burst, clock()

    def take(self) -> bool:
        """Take one; False, and none is taken, where there is none."""
        if not self.has_one():
            return False
        self._level -= 1
        return True

    def has_one(self) -> bool:
        """Whether there is one to take."""
        now = self._clock()
        self._level = min(self._burst, self._level + (now - self._at) * self._rate)
        self._at = now
        return self._level >= 1


class Buckets:
    """A bucket for each client, forgotten when ``clients`` others came since. Used by one thread."""

    def __init__(
        self, rate: float, burst: float, clients: int = 1024, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._rate, self._burst, self._clients, self._clock = rate, burst, clients, clock
        self._buckets: OrderedDict[str, TokenBucket] = OrderedDict()

    def of(self, client: str) -> TokenBucket:
        """The client's bucket; a new one is full."""
        bucket = self._buckets.pop(client, None) or TokenBucket(self._rate, self._burst, self._clock)
        self._buckets[client] = bucket
        while len(self._buckets) > self._clients:
            self._buckets.popitem(last=False)
        return bucket
