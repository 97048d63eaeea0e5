"""``[HOST:]PORT``, its socket, the token it needs and the names it answers to."""

from __future__ import annotations

import socket

import pytest

from espmedsam_edge.errors import UserError
from espmedsam_edge.runtime.serve.address import Address, Names, choose_token, is_loopback, listen, parse_address
from espmedsam_edge.runtime.serve.limits import Buckets, TokenBucket


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("8080", Address("127.0.0.1", 8080)),
        ("0.0.0.0:80", Address("0.0.0.0", 80)),
        ("tower-3.local:8080", Address("tower-3.local", 8080)),
        ("[::1]:8080", Address("::1", 8080)),
        ("[0:0:0:0:0:0:0:1]:0", Address("::1", 0)),
    ],
)
def test_an_address_is_a_port_with_or_without_a_host(text: str, expected: Address) -> None:
    assert parse_address(text) == expected
    assert parse_address(str(expected)) == expected


@pytest.mark.parametrize(
    "text", ["", "x", ":", ":80", "host:", "h:65536", "::1:80", "[::1]", "a b:80", "[x:]:1", "٣:80", "1:٣"]
)
def test_what_is_no_address_is_one_line(text: str) -> None:
    with pytest.raises(UserError, match="--serve"):
        parse_address(text)


def test_a_taken_port_and_a_foreign_host_are_one_line() -> None:
    with listen(Address("127.0.0.1", 0)) as first:
        assert is_loopback(first)
        with pytest.raises(UserError, match="is taken by another program"):
            listen(Address("127.0.0.1", first.getsockname()[1]))
    with pytest.raises(UserError, match=r"not an address of this machine|no address is known"):
        listen(Address("192.0.2.1", 0))
    with pytest.raises(UserError, match="no address is known"):
        listen(Address("no-such-host.invalid", 0))
    with listen(Address("0.0.0.0", 0)) as every:
        assert not is_loopback(every)


def test_others_need_a_token_and_a_weak_one_is_refused() -> None:
    assert choose_token(None, loopback=True) is None
    made = choose_token(None, loopback=False)
    assert made is not None
    assert len(made) >= 32
    assert made != choose_token(None, loopback=False)
    assert choose_token("x" * 16, loopback=True) == "x" * 16
    for weak in ("", "short", "with a space in it", "ümläut-ümläut-ümläut"):
        with pytest.raises(UserError, match="the token"):
            choose_token(weak, loopback=False)


def test_only_own_names_are_answered_to() -> None:
    local = Names.of(Address("127.0.0.1", 80), loopback=True, more=["Tower.example"])
    for header in ("localhost", "LOCALHOST:1", "127.0.0.1:8080", "[::1]:80", "tower.example:443", "localhost."):
        assert local.allow(header), header
    for header in (
        "",
        "evil.example",
        "evil.example:80",
        "192.168.0.9",
        "localhost:x",
        "localhost@evil",
        "a b",
        "127.0.0.1.evil",
    ):
        assert not local.allow(header), header
    everywhere = Names.of(Address("0.0.0.0", 80), loopback=False)
    for header in ("192.168.0.9:80", "[fe80::1]:80", f"{socket.gethostname()}:80", "localhost"):
        assert everywhere.allow(header), header
    assert not everywhere.allow("evil.example")
    with pytest.raises(UserError, match="--allow-host"):
        Names.of(Address("0.0.0.0", 80), loopback=False, more=["https://tower"])


def test_buckets_fill_up_again_and_forget_the_oldest() -> None:
    now = [0.0]
    bucket = TokenBucket(2, 3, lambda: now[0])
    assert [bucket.take() for _ in range(4)] == [True, True, True, False]
    now[0] = 0.5
    assert [bucket.take() for _ in range(2)] == [True, False]
    now[0] = 100
    assert [bucket.take() for _ in range(4)] == [True, True, True, False]
    buckets = Buckets(0, 1, clients=2, clock=lambda: now[0])
    assert buckets.of("a").take()
    assert not buckets.of("a").take()
    assert buckets.of("b").take()
    assert buckets.of("c").take()
    assert buckets.of("a").take()  # forgotten, so full again
