"""The server in a thread of its own beside the run; it never holds the run up, and ends with it."""

from __future__ import annotations

import asyncio
import logging
import socket
import threading
from types import TracebackType

import uvicorn
import websockets  # noqa: F401 (uvicorn takes it for WebSockets; without it the page would stay empty)

from espmedsam_edge.errors import UserError
from espmedsam_edge.runtime.serve.address import (
    Address,
    Names,
    choose_token,
    is_loopback,
    listen,
    parse_address,
    parse_proxies,
)
from espmedsam_edge.runtime.serve.app import build_app
from espmedsam_edge.runtime.serve.gate import Access
from espmedsam_edge.runtime.serve.options import ServeOptions
from espmedsam_edge.runtime.serve.panel import Panel
from espmedsam_edge.runtime.serve.patience import DropLateAnswers, PatientProtocol
from espmedsam_edge.runtime.serve.segment_api import SegmentService
from espmedsam_edge.runtime.serve.viewer import MAX_MESSAGE

_CONNECTIONS = 128
_PING_SECONDS = 5.0


class Server:
    """Listens from the moment it is made, answers from entering to leaving.

    Args:
        panel: what it shows and changes.
        options: where and for whom; without a token one is made if others than this machine can reach the address.

    Raises:
        UserError: the port is taken; the host, the token or a proxy's address cannot be used.
    """

    def __init__(self, panel: Panel, options: ServeOptions) -> None:
        address, proxies = parse_address(options.address), parse_proxies(options.trusted_proxies)
        self._socket = listen(address)
        try:
            self.loopback = is_loopback(self._socket)
            self.token = choose_token(options.token, loopback=self.loopback and not proxies)
            names = Names.of(address, loopback=self.loopback, more=options.allowed_hosts)
        except BaseException:
            self._socket.close()
            raise
        self.address = Address(address.host, int(self._socket.getsockname()[1]))
        self.access = Access(self.token)
        app = build_app(panel, self.access, names)
        self._service: SegmentService = app.state.service
        config = uvicorn.Config(
            DropLateAnswers(app),
            http=PatientProtocol,
            lifespan="off",
            log_config=None,
            log_level="error",
            access_log=False,
            server_header=False,
            proxy_headers=bool(proxies),
            forwarded_allow_ips=proxies,
            ws_max_size=MAX_MESSAGE,
            ws_max_queue=8,
            ws_ping_interval=_PING_SECONDS,
            ws_ping_timeout=_PING_SECONDS,
            ws_per_message_deflate=False,
            limit_concurrency=_CONNECTIONS,
            h11_max_incomplete_event_size=16 << 10,
            timeout_keep_alive=10,
            timeout_graceful_shutdown=2,
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._run, name="espmedsam-serve", daemon=True)
        self._error: BaseException | None = None

    @property
    def url(self) -> str:
        """What to type into a browser on this machine, or for an address that others reach, on theirs."""
        host = self.address.host
        # Compared, not bound.
        if host in ("0.0.0.0", "::"):  # noqa: S104  # nosec B104
            host = socket.gethostname()
        return f"http://{Address(host, self.address.port)}/"

    def _run(self) -> None:
        try:
            asyncio.run(self._server.serve([self._socket]))
        except BaseException as error:  # noqa: BLE001 (raised again on leaving)
            self._error = error

    def __enter__(self) -> Server:
        self._thread.start()
        threading.Thread(target=self._service.start, name="espmedsam-decoder", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        # From now on requests break off, of which uvicorn would write tracebacks.
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL + 1)
        self._server.should_exit = True
        self._service.close()
        self._thread.join(10)
        self._socket.close()
        if self._error is not None and kind is None:
            raise UserError(f"the server stopped: {self._error}.", "Start it again.", exit_code=1) from self._error

    def wait(self) -> None:
        """Come back when the server has stopped, which Ctrl-C in the calling thread brings about."""
        while self._thread.is_alive():
            self._thread.join(0.5)
