"""HTTP connections that must say what they want in time, and may leave at any time: uvicorn alone waits for ever."""

from __future__ import annotations

import asyncio

import h11
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD_SECONDS = 10.0
"""How long a request's first lines may take to arrive, a body that is not wanted to end, and an answer to be read."""

_MOST_CONNECTIONS = 256
_LOOKS = 4  # at what has not been read, in that time


class PatientProtocol(H11Protocol):
    """Closes a connection that opens, or begins a request, and does not finish its head in time, or reads no answer.

    Only a GET of HTTP/1.1 without a body becomes a WebSocket, and only while there are connections left: uvicorn would
    hand over any request that asks for it, uncounted, with a request line of its own.
    """

    _limit: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > _MOST_CONNECTIONS:  # below, uvicorn's limit answers once there is a request
            self.connections.discard(self)
            transport.abort()
            return
        _abort_when_unread(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        try:
            super().data_received(data)
        except (
            h11.LocalProtocolError
        ):  # the client sent nonsense and closed its side: uvicorn would answer all the same
            self.transport.close()
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._stop()

    def on_response_complete(self) -> None:
        """After an answer: the rest of a body that nobody reads may take as long as a head."""
        super().on_response_complete()
        self._stop()
        self._watch()

    def handle_websocket_upgrade(self, event: h11.Request) -> None:
        """See uvicorn: the connection goes on with another protocol."""
        self._stop()
        super().handle_websocket_upgrade(event)

    def _should_upgrade(self) -> bool:
        if not super()._should_upgrade():
            return False
        named = {name for name, _ in self.headers}
        plain = self.scope["method"] == "GET" and self.scope["http_version"] == "1.1"
        if not plain or named & {b"content-length", b"transfer-encoding", b"expect"}:
            return False
        return self.limit_concurrency is None or len(self.connections) < self.limit_concurrency

    @property
    def _owes(self) -> bool:
        """Whether the client has to send something that nobody else waits for with a limit of their own."""
        answered = self.cycle is not None and self.cycle.response_complete
        return self.conn.their_state is h11.IDLE or (answered and self.conn.their_state is h11.SEND_BODY)

    def _watch(self) -> None:
        """Let the time run while something is awaited; between requests uvicorn's own limit counts as well."""
        if not self._owes or self.transport.is_closing() or self.transport.get_protocol() is not self:
            self._stop()
        elif self._limit is None:
            self._limit = asyncio.get_running_loop().call_later(HEAD_SECONDS, self._close)

    def _stop(self) -> None:
        if self._limit is not None:
            self._limit.cancel()
            self._limit = None

    def _close(self) -> None:
        self._limit = None
        if self._owes and not self.transport.is_closing():
            self.transport.close()


def _abort_when_unread(transport: asyncio.Transport) -> None:
    """End a connection, of whatever protocol by then, when nothing that waits to be sent goes out for ten seconds."""
    loop = asyncio.get_running_loop()

    def look(before: int, unchanged: int) -> None:
        waiting = transport.get_write_buffer_size()
        if waiting == 0 and transport.is_closing():
            return
        unchanged = unchanged + 1 if waiting and waiting == before else 0
        if unchanged >= _LOOKS - 1:
            transport.abort()
        else:
            loop.call_later(HEAD_SECONDS / _LOOKS, look, waiting, unchanged)

    loop.call_later(HEAD_SECONDS / _LOOKS, look, 0, 0)


class DropLateAnswers:
    """ASGI middleware: an answer to a client that has closed its side is dropped, without a traceback in the log."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request or WebSocket."""
        try:
            await self.app(scope, receive, send)
        except h11.LocalProtocolError:
            return
