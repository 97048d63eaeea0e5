"""The server's addresses: the page, the live WebSocket, health, metrics and the service."""

from __future__ import annotations

from importlib.resources import files
from urllib.parse import parse_qs

import anyio
import anyio.to_thread
from anyio import CapacityLimiter
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, RedirectResponse, Response
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket

from espmedsam_edge.runtime.serve.address import Names
from espmedsam_edge.runtime.serve.gate import COOKIE, SESSION_SECONDS, Access, Gate, client_of, refusal, session_of
from espmedsam_edge.runtime.serve.metrics import CONTENT_TYPE, ServiceMetrics
from espmedsam_edge.runtime.serve.panel import Panel
from espmedsam_edge.runtime.serve.segment_api import SegmentService
from espmedsam_edge.runtime.serve.viewer import MAX_VIEWERS, TOO_MANY_VIEWERS, Viewer

_MAX_FORM = 4096
_FORM_SECONDS = 10.0
_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
_PAGE = {
    path.name: path.read_bytes()
    for path in files("espmedsam_edge.runtime.serve").joinpath("page").iterdir()
    if path.name.endswith(tuple(_TYPES))
}


def build_app(panel: Panel, access: Access, names: Names) -> Starlette:
    """The ASGI application; ``app.state.service`` is the ``SegmentService``, to be closed."""
    panel.needs_token = access.needs_token
    routes = _Routes(panel, access)
    app = Starlette(
        routes=[
            Route("/", routes.page, methods=["GET"]),
            Route("/page/{name}", routes.page_file, methods=["GET"]),
            Route("/login", routes.login_page, methods=["GET"]),
            Route("/login", routes.login, methods=["POST"]),
            Route("/logout", routes.logout, methods=["POST"]),
            Route("/healthz", routes.health, methods=["GET"]),
            Route("/metrics", routes.metrics, methods=["GET"]),
            Route("/v1/segment", routes.segment, methods=["POST"]),
            WebSocketRoute("/live", routes.live),
        ],
        middleware=[Middleware(Gate, access=access, names=names, answered=routes.counts.answered)],
        exception_handlers={404: _not_found, 405: _not_allowed},
    )
    app.router.redirect_slashes = False  # it would name this server's own address, not the gateway's
    app.state.service = routes.service
    return app


async def _not_found(request: Request, error: Exception) -> Response:
    return refusal(404, "there is nothing at this address.", "See / for the page, /v1/segment for the service.")


async def _not_allowed(request: Request, error: Exception) -> Response:
    return refusal(405, "not with this method.", "POST /v1/segment; GET for the rest.", getattr(error, "headers", None))


class _Routes:
    def __init__(self, panel: Panel, access: Access) -> None:
        self.counts = ServiceMetrics(panel, access)
        self._panel, self._access = panel, access
        self.service = SegmentService(panel, self.counts)
        self._painters = CapacityLimiter(2)

    async def page(self, request: Request) -> Response:
        return _page("index.html")

    async def page_file(self, request: Request) -> Response:
        name = request.path_params["name"]
        if name not in _PAGE or name.endswith(".html"):
            return refusal(404, "there is nothing at this address.")
        return _page(name)

    async def login_page(self, request: Request) -> Response:
        if not self._access.needs_token:
            return RedirectResponse("./", 303)
        return _page("login.html")

    async def login(self, request: Request) -> Response:
        """A form with the field ``token``: a right one gets a cookie, and the page."""
        body = bytearray()
        with anyio.move_on_after(_FORM_SECONDS) as limit:
            try:
                async for part in request.stream():
                    body += part
                    if len(body) > _MAX_FORM:
                        return refusal(413, "that is too long for a token.")
            except ClientDisconnect:
                return refusal(400, "the token broke off.", "Send it again.")
        if limit.cancel_called:
            return refusal(408, "the token took too long to arrive.", "Send it again.")
        try:
            token = parse_qs(body.decode("utf-8", "replace"), max_num_fields=4).get("token", [""])[0]
        except ValueError:
            return refusal(400, "that is no form with a token.", "Send one field: token.")
        right = self._access.right(token.strip(), client_of(request.scope))
        if right is None:
            return refusal(429, "too many wrong tokens.", "Wait a minute.", {"Retry-After": "60"})
        if not right:
            return refusal(401, "that is not the token.", "It was printed where the server was started.")
        response = JSONResponse({"status": "ok"})
        response.set_cookie(
            COOKIE,
            self._access.sessions.open(),
            max_age=SESSION_SECONDS,
            path=None,  # the browser's: that of the page, so that no neighbour behind a gateway gets it
            httponly=True,
            samesite="strict",
            secure=request.url.scheme == "https" or request.headers.get("origin", "").startswith("https://"),
        )
        return response

    async def logout(self, request: Request) -> Response:
        if (name := session_of(request.headers)) is not None:
            self._access.sessions.close(name)
        response = JSONResponse({"status": "ok"})
        response.set_cookie(COOKIE, max_age=0, expires=0, path=None, httponly=True, samesite="strict")
        return response

    async def health(self, request: Request) -> Response:
        seconds = self._panel.view.stalled
        if seconds is None:
            return JSONResponse({"status": "ok"})
        return JSONResponse({"status": "stalled", "seconds_without_frame": round(seconds, 1)}, status_code=503)

    async def metrics(self, request: Request) -> Response:
        text = await anyio.to_thread.run_sync(self.counts.text)
        return PlainTextResponse(text, headers={"Content-Type": CONTENT_TYPE})

    async def segment(self, request: Request) -> Response:
        return await self.service.answer(request)

    async def live(self, socket: WebSocket) -> None:
        await socket.accept()
        if self.counts.viewers >= MAX_VIEWERS:
            self.counts.viewers_refused.inc()
            await socket.close(TOO_MANY_VIEWERS, "there are enough viewers")
            return
        self.counts.viewers += 1
        try:
            await Viewer(socket, self._panel, self.counts, self._painters).serve()
        finally:
            self.counts.viewers -= 1


def _page(name: str) -> Response:
    kind = next(kind for suffix, kind in _TYPES.items() if name.endswith(suffix))
    return Response(_PAGE[name], media_type=kind)
