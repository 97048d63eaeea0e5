"""Who may ask: Host, Origin, token and rate are checked before anything else, and every answer gets its headers."""

from __future__ import annotations

import hmac
import logging
import secrets
import time
from collections.abc import Callable
from http.cookies import CookieError, SimpleCookie

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from espmedsam_edge.runtime.serve.address import Names
from espmedsam_edge.runtime.serve.limits import Buckets

log = logging.getLogger(__name__)

COOKIE = "espmedsam_session"
SESSION_SECONDS = 12 * 3600
_MOST_SESSIONS = 64
_LONGEST_ADDRESS = 53  # of IPv6 in letters, with brackets and a port

OPEN_PATHS = frozenset({"/healthz", "/login", "/page/login.js", "/page/view.css", "/page/icon.svg"})
"""What needs no token: they tell nothing of the run."""

_REQUESTS_A_SECOND, _REQUESTS_AT_ONCE = 50.0, 100.0
_WRONG_TOKENS_A_SECOND, _WRONG_TOKENS_AT_ONCE = 0.1, 10.0

_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), microphone=(), geolocation=(), payment=(), usb=()",
    "Cache-Control": "no-store",
}


def security_policy(host: str) -> str:
    """The Content-Security-Policy: scripts, styles and connections of this server alone, and none of it in a frame."""
    return (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
        f"connect-src 'self' ws://{host} wss://{host}; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
    )


class Sessions:
    """The browsers that have shown the token: a random name each, in a cookie, for twelve hours."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._until: dict[str, float] = {}

    def open(self) -> str:
        """A new session's name; with more than 64 the oldest ends."""
        name = secrets.token_urlsafe(32)
        self._until[name] = self._clock() + SESSION_SECONDS
        while len(self._until) > _MOST_SESSIONS:
            del self._until[next(iter(self._until))]
        return name

    def close(self, name: str) -> None:
        """End a session."""
        self._until.pop(name, None)

    def known(self, name: str) -> bool:
        """Whether a session of this name is open."""
        now, found = self._clock(), False
        for known, until in self._until.items():
            found |= hmac.compare_digest(known.encode(), name.encode("utf-8", "replace")) and until > now
        return found


class Access:
    """Who has shown the token, and how often each client may try. Used in the server's event loop only."""

    def __init__(self, token: str | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._token = None if token is None else token.encode()
        self.sessions = Sessions(clock)
        self.requests = Buckets(_REQUESTS_A_SECOND, _REQUESTS_AT_ONCE, clock=clock)
        self.wrong_tokens = Buckets(_WRONG_TOKENS_A_SECOND, _WRONG_TOKENS_AT_ONCE, clock=clock)
        self.refused = 0  # wrong tokens so far

    @property
    def needs_token(self) -> bool:
        """Whether clients have to show one."""
        return self._token is not None

    def right(self, shown: str, client: str) -> bool | None:
        """Whether a token is the right one, compared in constant time; None: this client was wrong too often."""
        if self._token is None:
            return True
        bucket = self.wrong_tokens.of(client)
        if not bucket.has_one():
            return None
        if hmac.compare_digest(self._token, shown.encode("utf-8", "replace")):
            return True
        bucket.take()
        self.refused += 1
        log.warning("a wrong token from %s.", client)
        return False

    def admits(self, headers: Headers, client: str) -> bool | None:
        """Whether a request has a session's cookie or ``Authorization: Bearer TOKEN``; None: wrong too often."""
        if self._token is None:
            return True
        if (name := session_of(headers)) is not None and self.sessions.known(name):
            return True
        kind, _, shown = headers.get("authorization", "").partition(" ")
        return self.right(shown.strip(), client) if kind.lower() == "bearer" else False


def session_of(headers: Headers) -> str | None:
    """The session that a request's cookie names."""
    cookie: SimpleCookie = SimpleCookie()
    try:
        cookie.load(headers.get("cookie", ""))
    except CookieError:
        return None
    return cookie[COOKIE].value if COOKIE in cookie else None


def client_of(scope: Scope) -> str:
    """The address that a request came from; behind a trusted proxy, the one that it names."""
    client = scope.get("client")
    return str(client[0])[:_LONGEST_ADDRESS] if client else ""


def refusal(status: int, message: str, hint: str = "", headers: dict[str, str] | None = None) -> JSONResponse:
    """An error as the service gives it: what is wrong, and what to do."""
    return JSONResponse({"error": message, "hint": hint}, status_code=status, headers=headers)


class Gate:
    """ASGI middleware: lets through what ``Access`` and ``Names`` allow, and puts the security headers on answers."""

    def __init__(self, app: ASGIApp, access: Access, names: Names, answered: Callable[[str, int], None]) -> None:
        self.app, self.access, self.names, self.answered = app, access, names, answered

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request or WebSocket."""
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        refused = self._refused(scope, headers)
        host = headers.get("host", "") if refused is None or refused.status_code != 421 else "localhost"

        async def send_with_headers(message: Message) -> None:
            if message["type"] in ("http.response.start", "websocket.http.response.start"):
                own = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    own.setdefault(name, value)
                own.setdefault("Content-Security-Policy", security_policy(host))
                self.answered(str(scope["path"]), int(message["status"]))
            await send(message)

        if refused is None:
            await self.app(scope, receive, send_with_headers)
        elif scope["type"] == "http":
            await refused(scope, receive, send_with_headers)
        elif "websocket.http.response" in scope.get("extensions", {}):
            await receive()
            await refused(scope, receive, send_with_headers)
        else:
            await receive()
            await send({"type": "websocket.close", "code": 1008})

    def _refused(self, scope: Scope, headers: Headers) -> Response | None:
        """The answer to a request that must not go on; None for one that may."""
        client, path, hosts = client_of(scope), str(scope["path"]), headers.getlist("host")
        if not self.access.requests.of(client).take():
            return refusal(429, "too many requests.", "Wait a second.", {"Retry-After": "1"})
        if len(hosts) != 1 or not self.names.allow(hosts[0]):
            return refusal(421, "this server is not known by that name.", "Start it with --allow-host NAME.")
        origin = headers.get("origin")
        if origin is not None and origin not in (f"http://{hosts[0]}", f"https://{hosts[0]}"):
            return refusal(403, "a page from another origin may not ask here.", "Open this server's own page.")
        if path in OPEN_PATHS:
            return None
        admitted = self.access.admits(headers, client)
        if admitted is None:
            return refusal(429, "too many wrong tokens.", "Wait a minute.", {"Retry-After": "60"})
        if admitted:
            return None
        if path == "/" and scope["type"] == "http":
            return RedirectResponse("login", 303)  # relative: a gateway may have put the page below a path
        needed = {"WWW-Authenticate": "Bearer"}
        return refusal(401, "a token is needed.", "Send it as: Authorization: Bearer TOKEN.", needed)
