"""How often a client may do something: token buckets, one a client, in bounded memory."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from functools import lru_cache
from ipaddress import IPv4Address, ip_address, ip_network


@lru_cache(maxsize=1024)
def counted_as(client: str) -> str:
    """What an address counts as: of IPv6 its network of 64 bits, as who has one address there has all of them.

    A port that a proxy names with it makes no other client.

    Examples:
        >>> [counted_as(text) for text in ("10.0.0.7", "10.0.0.7:4711", "[2001:db8::7]:443", "::ffff:10.0.0.7")]
        ['10.0.0.7', '10.0.0.7', '2001:db8::/64', '10.0.0.7']
    """
    bare = client.partition("]")[0].removeprefix("[") if client.startswith("[") else client
    try:
        address = ip_address(bare if bare.count(":") != 1 else bare.partition(":")[0])
    except ValueError:
        return client
    if isinstance(address, IPv4Address):
        return str(address)
    return str(address.ipv4_mapped or ip_network((int(address) >> 64 << 64, 64)))


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
        client = counted_as(client)
        bucket = self._buckets.pop(client, None) or TokenBucket(self._rate, self._burst, self._clock)
        self._buckets[client] = bucket
        while len(self._buckets) > self._clients:
            self._buckets.popitem(last=False)
        return bucket
