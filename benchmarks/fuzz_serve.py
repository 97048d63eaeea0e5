"""Whether the server stands 5,000 damaged requests, images and WebSocket messages: no crash, no hang, bounded memory.

    python benchmarks/fuzz_serve.py --name fuzz-serve-MACHINE [--inputs 5000] [--seed 0]

A run on a live phantom with a sleeping backend and its server on a socket. A fifth each: requests as raw bytes with
bytes changed, cut or put in; well-formed requests with strange paths, parameters and headers; damaged image files to
``POST /v1/segment``; damaged tokens and cookies; damaged messages over the WebSocket. Each must be answered, or its
connection closed, within 10 seconds; an answer 500, a traceback in the server's log or a run that stops is a failure.
"""

from __future__ import annotations

import logging
import random
import resource
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import cv2
import fuzzing
import numpy as np
from soak import Ordered, sleeping_segmenter
from websockets.exceptions import WebSocketException
from websockets.sync.client import ClientConnection, connect

from espmedsam_edge.phantoms import phantom
from espmedsam_edge.runtime.inference import Inference
from espmedsam_edge.runtime.request import InferenceRequest
from espmedsam_edge.runtime.serve.limits import Buckets
from espmedsam_edge.runtime.serve.options import ServeOptions
from espmedsam_edge.runtime.serve.server import Server

HANG_SECONDS = 10.0
TOKEN = "a-token-that-nobody-guesses"

_REQUESTS = (
    b"GET / HTTP/1.1\r\nHost: 127.0.0.1:@\r\n\r\n",
    b"GET /metrics HTTP/1.1\r\nHost: 127.0.0.1:@\r\nAuthorization: Bearer " + TOKEN.encode() + b"\r\n\r\n",
    b"POST /login HTTP/1.1\r\nHost: localhost\r\nContent-Length: 12\r\n\r\ntoken=abcdef",
    b"POST /v1/segment?threshold=0.5 HTTP/1.1\r\nHost: localhost\r\n"
    b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n",
    b"GET /live HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n",
    b"POST /live HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nContent-Length: 4\r\n\r\nbody",
    b"GET /live HTTP/1.0\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nExpect: 100-continue\r\n\r\n",
    b"GET /page/../../../etc/passwd HTTP/1.1\r\nHost: localhost\r\nOrigin: http://localhost\r\n\r\n",
)
_WORDS = (
    "fundus", "colonoscopy", "", "0.5", "nan", "-1", "1e999", "\x00", "../..", "%2e%2e%2f", "ü", "😀", "'", '"',
    "<script>", "null", "true", "[]", "{}", "9" * 400, "a" * 3000, "\r\nX: y", "image/png", "*/*", "q=1", ";", ",", "=",
    "&",
)  # fmt: skip
_MESSAGES = (
    '{"type": "ack", "frame": 1, "width": 800}',
    '{"type": "set", "threshold": 0.5}',
    '{"type": "set", "modality": "colonoscopy", "opacity": 0.3, "paused": false, "source": 0}',
)


def damaged(data: bytes, chance: random.Random) -> bytes:
    """Some bytes changed, taken out, put in, doubled, or the end cut off."""
    changed = bytearray(data)
    for _ in range(chance.randint(1, 6)):
        at = chance.randrange(len(changed) + 1)
        kind = chance.randrange(5)
        if kind == 0 and at < len(changed):
            changed[at] = chance.randrange(256)
        elif kind == 1:
            del changed[at : at + chance.randint(1, 20)]
        elif kind == 2:
            changed[at:at] = chance.randbytes(chance.randint(1, 20))
        elif kind == 3:
            changed[at:at] = changed[at : at + chance.randint(1, 200)] * chance.randint(1, 4)
        else:
            del changed[max(1, at) :]
    return bytes(changed)


def images() -> list[bytes]:
    """Small pictures in every format that is read."""
    picture, _ = phantom("colonoscopy", 0, (64, 80))
    deep = picture.astype(np.uint16) * 257
    kinds = (
        (".png", picture),
        (".jpg", picture),
        (".tif", picture),
        (".bmp", picture),
        (".webp", picture),
        (".png", deep),
    )
    return [cv2.imencode(suffix, pixels)[1].tobytes() for suffix, pixels in kinds]


def exchange(port: int, data: bytes, *, whole: bool = True) -> int:
    """Send bytes, and read until a head has come or the server closes: the status, or 0 for none.

    Where they may be less than a request (not ``whole``) and no answer comes, the client's side is closed.

    Raises:
        TimeoutError: neither within ``HANG_SECONDS``.
    """
    with socket.create_connection(("127.0.0.1", port), timeout=HANG_SECONDS) as client:
        try:
            client.sendall(data)
            client.settimeout(HANG_SECONDS if whole else 0.1)
            try:
                answer = client.recv(65536)
            except TimeoutError:
                if whole:
                    raise
                client.settimeout(HANG_SECONDS)
                client.shutdown(socket.SHUT_WR)
                answer = client.recv(65536)
        except ConnectionError:
            return 0
    parts = answer.split(None, 2)
    return int(parts[1]) if len(parts) > 1 and parts[1].isdigit() else 0


def request(method: str, path: str, headers: dict[str, str], body: bytes = b"") -> bytes:
    """A request as bytes, with whatever its parts hold."""
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    head = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n{lines}"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode("utf-8", "surrogatepass") + body


class Socket:
    """A WebSocket that is opened again whenever the server has closed it."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._open: ClientConnection | None = None
        self._stack = ExitStack()

    def send(self, message: str | bytes) -> int:
        """Send one message; the close code of a connection that was ended because of an earlier one, else 0."""
        if self._open is None:
            opening = connect(
                f"ws://127.0.0.1:{self._port}/live",
                additional_headers={"Authorization": f"Bearer {TOKEN}"},
                max_size=None,
                open_timeout=HANG_SECONDS,
                close_timeout=HANG_SECONDS,
            )
            self._open = self._stack.enter_context(opening)
        try:
            self._open.send(message)
            while True:
                self._open.recv(timeout=0.001)
        except TimeoutError:
            return 0
        except WebSocketException:
            code = self._open.close_code or 1006
            self.close()
            return code

    def close(self) -> None:
        """Close what is open."""
        self._stack.close()
        self._open = None


class Errors(logging.Handler):
    """The tracebacks that the server logs, and how many lines without one (a client that left in a handshake)."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.found: list[str] = []
        self.lines = 0

    def emit(self, record: logging.LogRecord) -> None:
        """See ``logging.Handler``."""
        if record.exc_info:
            self.found.append(self.format(record))
        else:
            self.lines += 1


def bombard(server: Server, messages: int, seed: int) -> dict[str, Any]:
    """Send them, and count the answers by kind and status."""
    chance, port, files = random.Random(seed), server.address.port, images()
    web = Socket(port)
    bearer = {"Authorization": f"Bearer {TOKEN}"}
    paths = ("/", "/live", "/metrics", "/healthz", "/v1/segment", "/login", "/page/view.js", "/page/")

    def words() -> str:
        return "".join(chance.choices(_WORDS, k=chance.randint(0, 4)))

    def raw() -> int:
        return exchange(port, damaged(chance.choice(_REQUESTS).replace(b"@", str(port).encode()), chance), whole=False)

    def strange() -> int:
        query = "&".join(
            f"{chance.choice(('modality', 'threshold', words()))}={words()}" for _ in range(chance.randint(0, 3))
        )
        path = chance.choice(paths) + chance.choice(("", words())) + f"?{query}"
        headers = {chance.choice(("Accept", "Content-Type", "Origin", "Cookie", "X-Y", "Range")): words()} | bearer
        body = chance.choice((b"", chance.choice(files)))
        return exchange(port, request(chance.choice(("GET", "POST", "PUT", "HEAD", words())), path, headers, body))

    def picture() -> int:
        return exchange(port, request("POST", "/v1/segment", bearer, damaged(chance.choice(files), chance)))

    def credentials() -> int:
        token = damaged(TOKEN.encode(), chance).decode("latin-1")
        headers = chance.choice(
            ({"Authorization": f"Bearer {token}"}, {"Cookie": f"espmedsam_session={token}{words()}"})
        )
        form = request("POST", "/login", {}, f"token={token}".encode())
        return exchange(port, chance.choice((form, request("GET", "/metrics", headers))))

    def message() -> int:
        text = chance.choice(_MESSAGES).encode()
        data = chance.choice((text, damaged(text, chance), words().encode(), chance.randbytes(chance.randint(0, 6000))))
        return web.send(data if chance.random() < 0.1 else data.decode("utf-8", "replace"))

    kinds: dict[str, Callable[[], int]] = {
        "raw requests": raw, "strange requests": strange, "images": picture, "credentials": credentials,
        "messages": message,
    }  # fmt: skip
    answers: dict[str, Counter[int]] = {kind: Counter() for kind in kinds}
    slowest, hangs = 0.0, 0
    for number in range(messages):
        kind = list(kinds)[number % len(kinds)]
        begin = time.monotonic()
        try:
            answers[kind][kinds[kind]()] += 1
        except TimeoutError:
            hangs += 1
        slowest = max(slowest, time.monotonic() - begin)
    web.close()
    return {
        "messages": messages,
        "answers": {kind: {str(status): n for status, n in sorted(counts.items())} for kind, counts in answers.items()},
        "hangs": hangs,
        "answered_500": sum(counts[500] for counts in answers.values()),
        "slowest_seconds": round(slowest, 2),
    }


def fuzz(messages: int, seed: int) -> dict[str, Any]:
    """A run with its server under fire, and whether it went on."""
    errors, ordered, stop = Errors(), Ordered(), threading.Event()
    logging.getLogger().addHandler(errors)
    source = "test://colonoscopy?fps=10&size=160x120"
    try:
        with (
            sleeping_segmenter() as segmenter,
            Inference(InferenceRequest([source], segmenter, None, serve=ServeOptions("0", TOKEN))) as inference,
        ):
            server = inference.server
            assert server is not None
            server.access.requests = Buckets(1e9, 1e9)  # the limits would answer for what is to be tested
            server.access.wrong_tokens = Buckets(1e9, 1e9)
            run = threading.Thread(target=inference.run, kwargs={"sinks": [ordered], "stop": stop})
            run.start()
            result = bombard(server, messages, seed)
            inference.controls.change(paused=False)
            before, until = ordered.frames, time.monotonic() + 60
            while ordered.frames == before and time.monotonic() < until:
                time.sleep(0.05)
            result["run_goes_on"] = run.is_alive() and ordered.frames > before
            result["health_after"] = exchange(server.address.port, request("GET", "/healthz", {}))
            stop.set()
            run.join()
    finally:
        logging.getLogger().removeHandler(errors)
    result["tracebacks_logged"] = len(errors.found)
    result["lines_logged"] = errors.lines
    result["first_tracebacks"] = [error[-1500:] for error in errors.found[:3]]
    result["highest_resident_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return result


if __name__ == "__main__":
    fuzzing.main(__doc__, "fuzz-serve", fuzz)
