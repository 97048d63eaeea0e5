"""Behind a proxy: limits and log see the client that it names, and nobody else names one."""

from __future__ import annotations

import http.client
import ssl
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from nginx import LOCATION, gateway

pytest.importorskip("uvicorn", reason="needs uvicorn (extra serve)")

from serving_setup import TOKEN

from espmedsam_edge.bundle import Bundle
from espmedsam_edge.errors import UserError
from espmedsam_edge.runtime.serve.address import parse_proxies
from espmedsam_edge.runtime.serve.options import ServeOptions
from espmedsam_edge.runtime.serve.serving import serve_alone

ROOT = Path(__file__).parents[3]


def status(url: str, token: str, client: str = "127.0.0.1", **headers: str) -> int:
    """Ask for the metrics from an address of this machine; the answer's status."""
    parts = urlsplit(url)
    assert parts.hostname is not None
    kind = http.client.HTTPConnection
    more = {}
    if parts.scheme == "https":
        kind, more = http.client.HTTPSConnection, {"context": ssl._create_unverified_context()}
    connection = kind(parts.hostname, parts.port, timeout=30, source_address=(client, 0), **more)
    connection.request("GET", f"{parts.path}metrics", headers={"Authorization": f"Bearer {token}", **headers})
    answer = connection.getresponse()
    answer.read()
    connection.close()
    return answer.status


def test_behind_nginx_the_client_is_who_asked_it(toy_bundle: Bundle, tmp_path: Path, said: list[str]) -> None:
    options = ServeOptions("0", TOKEN, trusted_proxies=["127.0.0.1"])
    with serve_alone(options, toy_bundle) as server, gateway(server.address.port, tmp_path) as url:
        forged = [status(url, "wrong", "127.0.0.2", **{"X-Forwarded-For": f"127.0.0.3, 10.0.0.{n}"}) for n in range(11)]
        assert forged == [401] * 10 + [429]  # a name of its own a guess helps nobody
        assert status(url, TOKEN, "127.0.0.2") == 429
        assert status(url, TOKEN, "127.0.0.3") == 200  # nor can others be shut out by it
        assert status(url, "wrong", "127.0.0.4") == 401
        assert said[1:] == ["a wrong token from 127.0.0.2."] * 10 + ["a wrong token from 127.0.0.4."]


def test_who_is_not_the_trusted_proxy_names_nobody(toy_bundle: Bundle, said: list[str]) -> None:
    with serve_alone(ServeOptions("0", TOKEN, trusted_proxies=["127.0.0.9"]), toy_bundle) as server:
        answers = [status(server.url, "wrong", **{"X-Forwarded-For": f"10.0.0.{n}"}) for n in range(11)]
        assert answers == [401] * 10 + [429]
        assert set(said[1:]) == {"a wrong token from 127.0.0.1."}
        # The proxy's word counts; many lines of the header are one list.
        assert status(server.url, "wrong", "127.0.0.9", **{"X-Forwarded-For": "198.51.100.7, 2001:db8::7"}) == 401
        assert said[-1] == "a wrong token from 2001:db8::7."


@pytest.mark.parametrize("form", ["2001:db8::{:x}", "[2001:db8::{:x}]:443", "192.0.2.1:{}", "::ffff:192.0.2.1"])
def test_an_address_of_ones_own_a_guess_helps_nobody(toy_bundle: Bundle, form: str) -> None:
    """Who has a network of IPv6 has 2^64 addresses; and some proxies name the port, which differs each time."""
    with serve_alone(ServeOptions("0", TOKEN, trusted_proxies=["127.0.0.9"]), toy_bundle) as server:
        guesses = [{"X-Forwarded-For": form.format(4711 + number)} for number in range(11)]
        answers = [status(server.url, "wrong", "127.0.0.9", **guess) for guess in guesses]
        assert answers == [401] * 10 + [429]
        for other in ("2001:db8:0:1::1", "192.0.2.2"):
            assert status(server.url, TOKEN, "127.0.0.9", **{"X-Forwarded-For": other}) == 200


@pytest.mark.parametrize("header", ["", ",", "a" * 9000, "\x1b[2J", "127.0.0.9", ", , ,"])
def test_an_odd_header_of_the_proxy_does_no_harm(toy_bundle: Bundle, header: str, said: list[str]) -> None:
    with serve_alone(ServeOptions("0", TOKEN, trusted_proxies=["127.0.0.9"]), toy_bundle) as server:
        assert status(server.url, "wrong", "127.0.0.9", **{"X-Forwarded-For": header}) in (400, 401)
        assert status(server.url, TOKEN, "127.0.0.9", **{"X-Forwarded-For": header}) in (400, 200)
        assert all(len(line) < 80 for line in said)


def test_who_trusts_a_proxy_needs_a_token(toy_bundle: Bundle) -> None:
    with serve_alone(ServeOptions("0", trusted_proxies=["127.0.0.1"]), toy_bundle) as server:
        assert server.token is not None
        assert status(server.url, "wrong") == 401
        assert status(server.url, server.token) == 200


@pytest.mark.parametrize(
    "given", ["", "*", "nginx", "0.0.0.0/0", "::/0", "10.0.0.1/8", "127.0.0.1:80", "127.0.0.1,::1"]
)
def test_what_is_no_proxys_address_is_one_line(given: str) -> None:
    with pytest.raises(UserError, match="--trust-proxy") as refused:
        parse_proxies([given])
    assert "\n" not in str(refused.value)


def test_a_proxy_is_known_by_both_families_of_addresses() -> None:
    assert parse_proxies(["10.1.2.3", "fd00::/8"]) == ["10.1.2.3/32", "::ffff:10.1.2.3/128", "fd00::/8"]


def test_the_page_has_the_location_that_is_tested() -> None:
    assert LOCATION in (ROOT / "docs" / "serving.md").read_text()
