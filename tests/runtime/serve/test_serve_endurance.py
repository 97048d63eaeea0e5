"""Short versions of the benchmarks: damaged messages, and a live run with its view that stays flat."""

from __future__ import annotations

import importlib
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("uvicorn", reason="needs uvicorn (extra serve)")

from espmedsam_edge.bundle import Bundle
from espmedsam_edge.runtime.serve import patience
from espmedsam_edge.runtime.serve.options import ServeOptions
from espmedsam_edge.runtime.serve.serving import serve_alone

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"


@pytest.fixture
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Imports a script of the folder benchmarks."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield importlib.import_module
    for name in ("soak", "fuzz_serve", "fuzzing"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("seed", [1, 2])
def test_damaged_messages_are_answered_and_the_run_goes_on(benchmarks: Any, seed: int) -> None:
    result = benchmarks("fuzz_serve").fuzz(150, seed)
    assert result["hangs"] == 0
    assert result["answered_500"] == 0
    assert result["first_tracebacks"] == []
    assert result["run_goes_on"]
    assert result["health_after"] == 200


def test_a_run_with_viewers_keeps_its_order_threads_and_files(benchmarks: Any) -> None:
    """Memory is left to the long version: in seconds it says nothing."""
    result = benchmarks("soak").soak(14, 30, warm_up=6, every=3, size="160x120")
    assert result["frames"] > 30
    assert result["out_of_order"] == 0
    assert result["viewers"]["out_of_order"] == 0
    assert result["viewers"]["frames"] > 10
    assert result["viewers"]["visits"] > 0
    assert result["viewers"]["scrapes"] == result["viewers"]["segmented"] == 2 * result["viewers"]["visits"]
    few, most = result["after_warm_up"]["threads"]
    assert most - few <= 4  # those that draw and segment come when they are needed, and go


def test_who_says_nothing_is_sent_away(toy_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "HEAD_SECONDS", 0.2)
    with serve_alone(ServeOptions("0"), toy_bundle) as server:
        for begun in (b"", b"GET /healthz HT", b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n"):
            with socket.create_connection(("127.0.0.1", server.address.port), timeout=60) as client:
                client.sendall(begun)
                assert client.recv(100) == b""
        with socket.create_connection(("127.0.0.1", server.address.port), timeout=60) as client:
            for _ in range(3):  # one that asks in time may go on asking
                client.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
                answer = b""
                while not answer.endswith(b'{"status":"ok"}'):
                    answer += client.recv(10000)


def test_leaving_ends_all_threads(toy_bundle: Bundle) -> None:
    with serve_alone(ServeOptions("0"), toy_bundle) as server:
        held = [socket.create_connection(("127.0.0.1", server.address.port)) for _ in range(3)]
        time.sleep(0.1)
    assert [thread.name for thread in threading.enumerate() if thread.name == "espmedsam-serve"] == []
    for one in held:
        one.close()
