"""One browser that looks on, over a WebSocket: frames as fast as it acknowledges them, its wishes as they come.

To the viewer: text messages ``hello``, ``state``, ``curve`` and ``error`` (JSON), and binary ones, each a frame: four
bytes with the length N of a JSON header (big-endian), the header, a JPEG. From it: ``ack`` and ``set`` (JSON).
"""

from __future__ import annotations

import asyncio
import json
import struct
import time
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Annotated, Any, Literal

import anyio
import anyio.to_thread
from anyio import CapacityLimiter
from anyio.abc import TaskGroup
from pydantic import BaseModel, Field, TypeAdapter, ValidationError
from starlette.websockets import WebSocket, WebSocketDisconnect, WebSocketState

from espmedsam_edge.errors import UserError
from espmedsam_edge.runtime.serve.adaptation import Adaptation
from espmedsam_edge.runtime.serve.limits import TokenBucket
from espmedsam_edge.runtime.serve.live_view import Picture
from espmedsam_edge.runtime.serve.metrics import ServiceMetrics
from espmedsam_edge.runtime.serve.panel import Change, Panel
from espmedsam_edge.runtime.serve.statistics import Statistics

MAX_MESSAGE = 4096
"""Bytes of a viewer's message."""

MAX_VIEWERS = 8
_MESSAGES_A_SECOND, _MESSAGES_AT_ONCE = 100.0, 200.0
_STATE_SECONDS = 0.5
_CURVE_POINTS = 240
_CHANGES_AT_ONCE = 4

TOO_MANY_VIEWERS = 4429
"""Close code of a viewer that is one too many; 1008 is one that does not keep to the rules."""


class Ack(BaseModel, extra="forbid", frozen=True, strict=True):
    """The viewer has shown a frame; ``width`` is how many pixels it can show across."""

    type: Literal["ack"]
    frame: Annotated[int, Field(ge=0)]
    width: Annotated[int, Field(ge=1, le=16384)] | None = None


class Wish(Change):
    """A change, named so."""

    type: Literal["set"]


_MESSAGES: TypeAdapter[Ack | Wish] = TypeAdapter(Annotated[Ack | Wish, Field(discriminator="type")])


class Viewer:
    """Serves one WebSocket until it closes.

    Args:
        socket: accepted already.
        panel: the run's controls.
        counts: where what is sent is counted.
        worker: how many pictures are drawn at a time, over all viewers.
    """

    def __init__(self, socket: WebSocket, panel: Panel, counts: ServiceMetrics, worker: CapacityLimiter) -> None:
        self._socket, self._panel, self._counts, self._worker = socket, panel, counts, worker
        self._adaptation = Adaptation()
        self._bucket = TokenBucket(_MESSAGES_A_SECOND, _MESSAGES_AT_ONCE)
        self._wake = asyncio.Event()
        self._notes: list[dict[str, Any]] = []
        self._unacknowledged: tuple[int, float] | None = None
        self._last_number = 0
        self._last_point = 0
        self._curve_of: Statistics | None = None
        self._changing = 0
        self._breach = ""  # why the connection is ended, once nothing is being sent any more

    async def serve(self) -> None:
        """Send and receive until either side ends."""
        loop = asyncio.get_running_loop()

        def wake() -> None:
            loop.call_soon_threadsafe(self._wake.set)

        stop_listening = self._panel.view.listen(wake)
        try:
            async with anyio.create_task_group() as group:
                for part in (self._send, self._receive):
                    group.start_soon(self._until_it_ends, part, group)
        finally:
            stop_listening()
        if self._breach and self._socket.application_state == WebSocketState.CONNECTED:
            await self._socket.close(1008, self._breach)

    async def _until_it_ends(self, part: Callable[[TaskGroup], Awaitable[None]], group: TaskGroup) -> None:
        try:
            await part(group)
        except WebSocketDisconnect:
            pass
        finally:
            group.cancel_scope.cancel()

    async def _send(self, group: TaskGroup) -> None:
        await self._send_message(json.dumps(self._panel.greeting()))
        next_state = 0.0
        while True:
            self._wake.clear()
            now = time.monotonic()
            if now >= next_state or self._notes:
                await self._send_state()
                next_state = now + _STATE_SECONDS
            if self._unacknowledged is None and self._panel.view.number > self._last_number:
                await self._send_picture()
            if not self._ready():
                timeout = max(0.0, next_state - time.monotonic())
                with anyio.move_on_after(timeout):
                    await self._wake.wait()

    def _ready(self) -> bool:
        return bool(self._notes) or (self._unacknowledged is None and self._panel.view.number > self._last_number)

    async def _send_state(self) -> None:
        while self._notes:
            await self._send_message(json.dumps(self._notes.pop(0)))
        state = {**self._panel.state(), "viewers": self._counts.viewers, "level": self._adaptation.level}
        await self._send_message(json.dumps(state))
        await self._send_curve()

    async def _send_curve(self) -> None:
        """The points that came since the last ones; all of them after another source was chosen."""
        statistics = self._panel.view.shown_statistics
        restart = statistics is not self._curve_of
        points = statistics.curve(0 if restart else self._last_point, _CURVE_POINTS)
        if points or restart:
            self._curve_of = statistics
            self._last_point = points[-1].number if points else 0
            values = [[round(point.at, 3), round(point.fraction, 6)] for point in points]
            await self._send_message(json.dumps({"type": "curve", "restart": restart, "points": values}))

    async def _send_picture(self) -> None:
        draw = partial(self._panel.view.picture, self._adaptation.width, self._adaptation.quality)
        try:
            picture = await anyio.to_thread.run_sync(draw, limiter=self._worker)
        except UserError as error:
            self._last_number = self._panel.view.number  # the next one may do better
            self._note(error)
            return
        if picture is None or picture.number <= self._last_number:
            return
        self._last_number = picture.number
        self._unacknowledged = (picture.number, time.monotonic())
        message = frame_message(picture)
        await self._send_message(message)
        self._counts.frames_sent.inc()
        self._counts.bytes_sent.inc(len(message))

    async def _send_message(self, message: str | bytes) -> None:
        try:
            await (self._socket.send_text(message) if isinstance(message, str) else self._socket.send_bytes(message))
        except RuntimeError as error:  # the connection was closed meanwhile, and ``_receive`` does not know it yet
            raise WebSocketDisconnect(1006) from error

    async def _receive(self, group: TaskGroup) -> None:
        while True:
            message = await self._socket.receive()
            if message["type"] != "websocket.receive":
                return
            text = message.get("text")
            if not self._bucket.take():
                self._breach = "too many messages"
                return
            if text is None or len(text) > MAX_MESSAGE:
                self._breach = "not a message of this protocol"
                return
            try:
                wanted = _MESSAGES.validate_json(text)
            except ValidationError:
                self._breach = "not a message of this protocol"
                return
            if isinstance(wanted, Ack):
                self._acknowledge(wanted)
            else:
                self._change(wanted, group)

    def _acknowledge(self, ack: Ack) -> None:
        if ack.width is not None:
            self._adaptation.viewport = ack.width
        if self._unacknowledged is not None and ack.frame == self._unacknowledged[0]:
            self._adaptation.acknowledged(time.monotonic() - self._unacknowledged[1])
            self._unacknowledged = None
            self._wake.set()

    def _change(self, wish: Wish, group: TaskGroup) -> None:
        """In a task and a thread of its own: loading a modality may take long, and acknowledgements go on."""
        if self._changing >= _CHANGES_AT_ONCE:
            self._note(UserError("changes come faster than they can be done.", "Wait a moment."))
            return
        self._changing += 1
        group.start_soon(self._apply, wish)

    async def _apply(self, wish: Wish) -> None:
        try:
            await anyio.to_thread.run_sync(self._panel.apply, wish, abandon_on_cancel=True)
        except UserError as error:
            self._note(error)
        finally:
            self._changing -= 1

    def _note(self, error: UserError) -> None:
        self._notes.append({"type": "error", "message": error.message, "hint": error.hint})
        del self._notes[:-10]
        self._wake.set()


def frame_message(picture: Picture) -> bytes:
    """A frame as it goes to the browser; see this module's first lines."""
    header = json.dumps(
        {
            "number": picture.number,
            "frame": picture.frame,
            "time": picture.time,
            "width": picture.width,
            "height": picture.height,
            "modality": picture.modality,
            "area": picture.area,
            "fraction": round(picture.fraction, 6),
            "confidence": None if picture.confidence is None else round(picture.confidence, 4),
        }
    ).encode()
    return struct.pack(">I", len(header)) + header + picture.jpeg
