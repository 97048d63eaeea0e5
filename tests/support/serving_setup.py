"""A server without a socket: panel, view and application around a toy bundle."""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("starlette", reason="needs starlette (extra serve)")
pytest.importorskip("uvicorn", reason="needs uvicorn (extra serve)")

from starlette.testclient import TestClient, WebSocketTestSession

from espmedsam_edge.bundle import Bundle
from espmedsam_edge.imaging.encode import encode_image
from espmedsam_edge.phantoms import phantom
from espmedsam_edge.runtime.run.controls import Adjustable
from espmedsam_edge.runtime.segmenter import Segmenter
from espmedsam_edge.runtime.segmenter_pool import SegmenterPool, loader
from espmedsam_edge.runtime.serve.address import Address, Names
from espmedsam_edge.runtime.serve.app import build_app
from espmedsam_edge.runtime.serve.gate import Access
from espmedsam_edge.runtime.serve.live_view import LiveView
from espmedsam_edge.runtime.serve.panel import Panel
from espmedsam_edge.runtime.sources.source import SourceFrame

BASE = "http://127.0.0.1:8080"
TOKEN = "correct-horse-battery-staple"


@dataclass
class Stage:
    """All parts of a server, and a client that speaks to it."""

    panel: Panel
    pool: SegmenterPool
    access: Access
    client: TestClient

    @property
    def view(self) -> LiveView:
        return self.panel.view

    def connect(self, **headers: str | bytes) -> WebSocketTestSession:
        """A WebSocket to the live view, to be entered."""
        return self.client.websocket_connect("ws://127.0.0.1:8080/live", headers=headers)  # type: ignore[arg-type]

    def show(self, index: int = 0, *, seed: int = 0, **details: Any) -> SourceFrame:
        """Segment a phantom and hand it to the view as a run does."""
        image, _ = phantom("fundus", seed, (96, 128), index)
        frame = SourceFrame(image, Path("secret-name.mp4"), index, index / 25, **details)
        segmenter = self.panel.segmenter
        assert segmenter is not None
        self.view.write(frame, segmenter.segment_batch([image], self.panel.controls.current().threshold)[0])
        return frame


@contextmanager
def staged(
    bundle: Bundle,
    *,
    token: str | None = None,
    service: bool = False,
    holds: bool = False,
    live: bool = False,
    loopback: bool = True,
    clock: Any = time.monotonic,
) -> Iterator[Stage]:
    """A server on the bundle: of a run (``holds``: that writes, ``live``: of cameras), with ``service`` of none."""
    controls = Adjustable()
    view = LiveView(controls, holds=holds, live=live)
    with SegmenterPool(bundle, loader(bundle, None, "auto", threads=1)) as pool:
        first: Segmenter | None = None
        if not service or len(pool.modalities) == 1:
            first = pool.get(pool.modalities[0])
        panel = Panel(controls, pool, view, first, service=service)
        access = Access(token, clock)
        names = Names.of(Address("127.0.0.1", 8080), loopback=loopback)
        app = build_app(panel, access, names)
        with TestClient(app, base_url=BASE, follow_redirects=False) as client:
            try:
                yield Stage(panel, pool, access, client)
            finally:
                app.state.service.close()


def png(seed: int = 0, size: tuple[int, int] = (96, 128)) -> tuple[np.ndarray, bytes]:
    """A phantom (H, W, 3) and its PNG file."""
    image, _ = phantom("fundus", seed, size)
    return image, encode_image(image, ".png")


def next_text(socket: WebSocketTestSession, kind: str, passing: Any = None) -> dict[str, Any]:
    """The next text message of a kind that passes a check; frames and others before it are dropped."""
    for _ in range(200):
        message = socket.receive()
        if message["type"] == "websocket.close":
            raise AssertionError(f"closed: {message}")
        if message.get("text"):
            body = dict(json.loads(message["text"]))
            if body["type"] == kind and (passing is None or passing(body)):
                return body
    raise AssertionError(f"no message '{kind}'")


def next_frame(socket: WebSocketTestSession) -> tuple[dict[str, Any], bytes]:
    """The next frame's header and JPEG; texts before it are dropped."""
    for _ in range(200):
        message = socket.receive()
        if message["type"] == "websocket.close":
            raise AssertionError(f"closed: {message}")
        data = message.get("bytes")
        if data:
            (length,) = struct.unpack(">I", data[:4])
            return dict(json.loads(data[4 : 4 + length])), data[4 + length :]
    raise AssertionError("no frame")


def close_code(socket: WebSocketTestSession) -> int:
    """The code that the server closes the connection with; what it sends before is dropped."""
    while (message := socket.receive())["type"] != "websocket.close":
        pass
    return int(message["code"])
