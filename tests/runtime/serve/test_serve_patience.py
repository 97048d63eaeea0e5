"""Connections that ask for odd things, or for nothing, or do not listen: answered or closed in time, and counted."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from contextlib import suppress

import pytest

pytest.importorskip("uvicorn", reason="needs uvicorn (extra serve)")

from espmedsam_edge.bundle import Bundle
from espmedsam_edge.machine.environment import process_memory
from espmedsam_edge.runtime.serve import app, patience, segment_api
from espmedsam_edge.runtime.serve import server as server_module
from espmedsam_edge.runtime.serve.limits import Buckets
from espmedsam_edge.runtime.serve.options import ServeOptions
from espmedsam_edge.runtime.serve.server import Server
from espmedsam_edge.runtime.serve.serving import serve_alone

WAIT = 1.0  # in place of ten seconds
UPGRADE = b"Host: localhost\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
KEY = b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"


@pytest.fixture
def server(toy_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(patience, "HEAD_SECONDS", WAIT)
    monkeypatch.setattr(app, "_FORM_SECONDS", WAIT)
    monkeypatch.setattr(segment_api, "PATIENCE_SECONDS", WAIT)
    monkeypatch.setattr(server_module, "_PING_SECONDS", WAIT / 2)
    with serve_alone(ServeOptions("0"), toy_bundle, threads=1) as made:
        made.access.requests = Buckets(1e9, 1e9)
        yield made


def opened(server: Server) -> socket.socket:
    return socket.create_connection(("127.0.0.1", server.address.port), timeout=10 * WAIT)


def connections(server: Server) -> int:
    return len(server._server.server_state.connections)


def until_none(server: Server, seconds: float) -> float:
    """How long it takes until no connection is left."""
    begin = time.monotonic()
    while connections(server) and time.monotonic() - begin < seconds:
        time.sleep(0.02)
    assert connections(server) == 0
    return time.monotonic() - begin


def status_of(answer: bytes) -> int:
    return int(answer.split(None, 2)[1]) if answer else 0


@pytest.mark.parametrize(
    ("request_", "statuses"),
    [
        (b"GET /live HTTP/1.1\r\n" + UPGRADE + KEY + b"\r\n", {101}),
        (b"POST /live HTTP/1.1\r\n" + UPGRADE + KEY + b"\r\n", {404, 405}),
        (b"PUT /live HTTP/1.1\r\n" + UPGRADE + KEY + b"Content-Length: 5\r\n\r\nhello", {404, 405}),
        (b"DELETE / HTTP/1.1\r\n" + UPGRADE + KEY + b"\r\n", {404, 405}),
        (b"GET /live HTTP/1.1\r\n" + UPGRADE + KEY + b"Content-Length: 5\r\n\r\nhello", {404, 405}),
        (b"GET /live HTTP/1.1\r\n" + UPGRADE + KEY + b"Content-Length: 99999\r\n\r\nhello", {404, 405}),
        (b"GET /live HTTP/1.1\r\n" + UPGRADE + KEY + b"Transfer-Encoding: chunked\r\n\r\n5\r\nhel", {404, 405}),
        (b"GET /live HTTP/1.1\r\n" + UPGRADE + KEY + b"Expect: 100-continue\r\n\r\n", {404, 405}),
        (b"GET /live HTTP/1.0\r\n" + UPGRADE + KEY + b"\r\n", {404, 405}),
        (b"POST /v1/segment HTTP/1.1\r\n" + UPGRADE + KEY + b"Content-Length: 5\r\n\r\nhello", {422}),
        (b"GET /live HTTP/1.1\r\n" + UPGRADE + b"\r\n", {400, 426}),
        (b"GET /live HTTP/1.1\r\n" + UPGRADE + b"Sec-WebSocket-Key: x\r\n\r\n", {400, 426}),
        (b"GET /live HTTP/1.1\r\n" + UPGRADE.replace(b"13", b"8") + KEY + b"\r\n", {400, 426}),
        (b"GET /healthz HTTP/1.1\r\n" + UPGRADE + KEY + b"\r\n", {403, 404}),
        (b"GET /live HTTP/1.1\r\n" + UPGRADE.replace(b"websocket", b"h2c") + b"\r\n", {404, 405}),
        (b"GET /live HTTP/1.1\r\n" + UPGRADE + KEY[:20], {0}),
        (b"GET /liv", {0}),
        (b"", {0}),
        (b"POST /login HTTP/1.1\r\nHost: localhost\r\nContent-Length: 999999\r\n\r\n", {408}),
        (b"POST /v1/segment HTTP/1.1\r\nHost: localhost\r\nContent-Length: 999999\r\n\r\nhalf", {408}),
        (b"POST /v1/segment HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nFFFFFFFF\r\nhalf", {408}),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", {400, 404, 405, 421, 505}),
    ],
)
def test_every_request_is_answered_or_closed_in_time(server: Server, request_: bytes, statuses: set[int]) -> None:
    begin = time.monotonic()
    with opened(server) as client:
        client.sendall(request_)
        try:
            answer = client.recv(65536)
        except ConnectionResetError:
            answer = b""
        assert status_of(answer) in statuses
        assert time.monotonic() - begin < 3 * WAIT
        if status_of(answer) != 101:
            until_none(server, 13)  # kept for ten seconds for a next request, at most
    assert until_none(server, 13) < 13


def test_a_body_that_nobody_wants_does_not_keep_a_connection(server: Server) -> None:
    """A byte now and then, after the answer: uvicorn starts its time anew with each."""
    with opened(server) as client:
        client.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000000\r\n\r\n")
        assert status_of(client.recv(65536)) == 200
        begin = time.monotonic()
        while connections(server) and time.monotonic() - begin < 6 * WAIT:
            with suppress(ConnectionError):
                client.sendall(b"x")
            time.sleep(0.1)
        assert time.monotonic() - begin < 3 * WAIT


def test_a_picture_that_comes_a_byte_at_a_time_is_given_up_and_a_slow_one_is_not(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    head = b"POST /v1/segment HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n"
    with opened(server) as client:
        client.sendall(head % 1000)
        begin = time.monotonic()
        client.settimeout(0.1)
        answer = b""
        while not answer and time.monotonic() - begin < 6 * WAIT:
            client.sendall(b"x")
            with suppress(TimeoutError):
                answer = client.recv(65536)
        assert status_of(answer) == 408
        assert time.monotonic() - begin < 2 * WAIT
    monkeypatch.setattr(segment_api, "SLOWEST", 100)
    with opened(server) as client:
        client.sendall(head % 1000)
        for _ in range(10):  # twice as long, but 500 bytes a second
            client.sendall(b"x" * 100)
            time.sleep(WAIT / 5)
        assert status_of(client.recv(65536)) == 422


def test_answers_that_are_not_read_end_the_connection(server: Server) -> None:
    with opened(server) as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.settimeout(0.2)
        asked = b"GET /page/view.js HTTP/1.1\r\nHost: localhost\r\n\r\n" * 500
        begin = time.monotonic()
        try:
            while time.monotonic() - begin < WAIT / 2:
                client.send(asked)
        except (TimeoutError, ConnectionError):
            pass
        assert until_none(server, 6 * WAIT) < 4 * WAIT


def test_a_viewer_that_does_not_read_is_let_go(server: Server) -> None:
    with opened(server) as client:
        client.sendall(b"GET /live HTTP/1.1\r\n" + UPGRADE + KEY + b"\r\n")
        assert client.recv(12) == b"HTTP/1.1 101"
        assert until_none(server, 6 * WAIT) < 4 * WAIT


def test_very_many_connections_are_counted_and_go(server: Server) -> None:
    clients = []
    before = process_memory()[0] or 0
    try:
        for number in range(500):
            clients.append(opened(server))
            clients[-1].sendall((b"", b"GET /live HTTP/1.1\r\n" + UPGRADE, b"POST /v1/seg")[number % 3])
        assert (process_memory()[0] or 0) - before < 40 << 20
        deadline = time.monotonic() + WAIT / 2
        while time.monotonic() < deadline:
            assert connections(server) <= patience._MOST_CONNECTIONS + 1  # one is just being turned away
            time.sleep(0.01)
        assert until_none(server, 6 * WAIT) < 4 * WAIT
        with opened(server) as client:
            client.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            assert status_of(client.recv(65536)) == 200
    finally:
        for client in clients:
            client.close()
