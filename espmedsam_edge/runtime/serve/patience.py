"""HTTP connections that must say what they want in time, and may leave at any time: uvicorn alone waits for ever."""

from __future__ import annotations

import asyncio

import h11
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD_SECONDS = 10.0
"""How long a request's first lines may take to arrive."""


class PatientProtocol(H11Protocol):
    """Closes a connection that opens, or begins a request, and does not finish its head in time."""

    _limit: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """See ``asyncio.Protocol``."""
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        """See ``asyncio.Protocol``."""
        try:
            super().data_received(data)
        except (
            h11.LocalProtocolError
        ):  # the client sent nonsense and closed its side: uvicorn would answer all the same
            self.transport.close()
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """See ``asyncio.Protocol``."""
        super().connection_lost(exc)
        self._stop()

    def _watch(self) -> None:
        """Let the time run while a head is awaited; between requests uvicorn's own limit counts as well."""
        if self.conn.their_state is not h11.IDLE:
            self._stop()
        elif self._limit is None:
            self._limit = asyncio.get_running_loop().call_later(HEAD_SECONDS, self._close)

    def _stop(self) -> None:
        if self._limit is not None:
            self._limit.cancel()
            self._limit = None

    def _close(self) -> None:
        self._limit = None
        if self.conn.their_state is h11.IDLE and not self.transport.is_closing():
            self.transport.close()


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
