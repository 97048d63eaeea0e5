"""Runs a graph on a Triton Inference Server, which serves what ``espmedsam-edge deploy triton`` wrote from the bundle.

Only the network runs there: frames are prepared and masks made here. ``tritonclient`` is NVIDIA's client; the package
``triton`` that torch brings along is another thing, a compiler.
"""

from __future__ import annotations

import errno
import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.client import HTTPException
from typing import Any, TypeVar
from urllib.parse import urlsplit

import numpy as np

from espmedsam_edge.bundle import Bundle, Graph
from espmedsam_edge.errors import UserError
from espmedsam_edge.imaging.geometry import Tensor
from espmedsam_edge.machine.hosts import is_host
from espmedsam_edge.machine.installation import why_missing
from espmedsam_edge.runtime.backends.backend import BackendAway, BackendUnavailable, check_batch
from espmedsam_edge.runtime.backends.backend_spec import BackendSpec

_USAGE = "Give its address: --backend triton --url http://HOST:8000"
_CONNECT_SECONDS, _ABOUT_SECONDS, _RUN_SECONDS = 5.0, 10.0, 60.0
_ABOUT_BYTES = 1 << 20  # of an answer, beside logits

Made = TypeVar("Made")


def unavailable(name: str) -> str | None:
    """Why Triton cannot be asked from this machine, or None; asks nobody."""
    return why_missing("tritonclient.http", "triton")


def load(name: str, bundle: Bundle, graph: Graph, threads: int | None) -> TritonBackend:
    """Find the graph's model on the server, and check that it is this graph; ``threads`` is for other backends.

    Raises:
        BackendUnavailable: no such server, it lacks the model, or serves another graph or version of it.
        UserError: no address.
    """
    url = BackendSpec.parse(name).url
    server = _Server(url, _ABOUT_SECONDS, _ABOUT_BYTES)
    version = _check_served(server, bundle, graph)
    most = 4 * math.prod(graph.output_shape) + _ABOUT_BYTES
    return TritonBackend(_Server(url, _RUN_SECONDS, most), graph, version, lambda: _check_served(server, bundle, graph))


def _model(graph: Graph) -> str:
    return f"{graph.modality}_{graph.precision}"


def _check_served(server: _Server, bundle: Bundle, graph: Graph) -> str:
    """See that a server serves a bundle's graph; its version."""
    model = _model(graph)
    about = server.ask(" is no Triton server", lambda client: dict(client.get_server_metadata()))
    server.ask(f" has no model {model}", lambda client: client.get_model_metadata(model))

    def hash_of(client: Any) -> Any:
        return client.get_model_config(model).get("parameters", {}).get("graph_sha256", {}).get("string_value")

    served = server.ask(f" has no model {model}", hash_of)
    if served != graph.sha256:
        what = "does not say which graph it is" if served is None else "is another version of this graph"
        raise BackendUnavailable(
            f"{model} of Triton at {server.address} {what}.",
            f"Write its repository from {bundle.path} again (espmedsam-edge deploy triton), or name its own bundle.",
            exit_code=1,
        )
    return str(about.get("version", "of an unknown version"))


class _Connection:
    """A connection that gives a bounded answer to what is sent: in bytes, and in seconds from when it was sent."""

    def __init__(self, connection: Any, seconds: float, most: int) -> None:
        self._connection, self._seconds, self._most = connection, seconds, most
        self._until, self._left = math.inf, most

    def __getattr__(self, name: str) -> Any:
        return getattr(self._connection, name)

    def sendall(self, *data: Any) -> Any:
        self._until, self._left = time.monotonic() + self._seconds, self._most
        return self._connection.sendall(*data)

    def recv(self, size: int) -> bytes:
        data: bytes = self._connection.recv(min(size, self._left + 1))
        self._left -= len(data)
        if self._left < 0:
            raise OSError(errno.EMSGSIZE, f"its answer is over {self._most} bytes")
        if time.monotonic() > self._until:
            raise TimeoutError(errno.ETIMEDOUT, f"its answer takes over {self._seconds:g} seconds")
        return data


class _Server:
    """One server; each thread that asks has a client of its own, which is what tritonclient wants."""

    def __init__(self, url: str, seconds: float, most: int) -> None:
        self._seconds, self._most = seconds, most  # that an answer may take, and its bytes
        try:
            parts = urlsplit(url if "://" in url else f"http://{url}")
            host, port = parts.hostname, parts.port or 8000
        except ValueError:
            host = None
        if not host or parts.scheme not in ("http", "https") or parts.username is not None or parts.query:
            host = None
        if host is None or not is_host(host):
            raise UserError("that is no address of a Triton server." if url else "which Triton server?", _USAGE)
        shown = f"[{host}]" if ":" in host else host
        self.address = f"{parts.scheme}://{shown}:{port}{parts.path.rstrip('/')}"
        self._place, self._tls = self.address.partition("://")[2], parts.scheme == "https"
        self._clients = threading.local()

    def ask(self, otherwise: str, question: Callable[[Any], Made]) -> Made:
        """The answer to a question to the server.

        Args:
            otherwise: what a refusal means, after the server's address; empty: what it says.
            question: asked of a client.

        Raises:
            BackendAway: there is none.
            BackendUnavailable: it refuses.
        """
        with self._errors(otherwise):
            return question(self._client())

    def _client(self) -> Any:
        from tritonclient.http import InferenceServerClient

        if not hasattr(self._clients, "one"):
            client = InferenceServerClient(
                self._place, ssl=self._tls, connection_timeout=_CONNECT_SECONDS, network_timeout=self._seconds
            )
            self._bound(client._client_stub)
            self._clients.one = client
        return self._clients.one

    def _bound(self, stub: Any) -> None:
        """Bound what a client's HTTP takes; tritonclient reads whatever comes, and unpacks it."""
        pool, request = stub._connection_pool, stub.request
        connect = pool._create_socket

        def unpacked(*args: Any, **kwargs: Any) -> Any:
            answer = request(*args, **kwargs)
            if answer.get("Content-Encoding") is not None:
                raise ValueError("an answer is packed, which nobody asked for")
            return answer

        pool._create_socket = lambda: _Connection(connect(), self._seconds, self._most)
        stub.request = unpacked

    @contextmanager
    def _errors(self, otherwise: str) -> Iterator[None]:
        from tritonclient.utils import InferenceServerException

        try:
            yield
        except InferenceServerException as error:
            said = otherwise or f" refuses: {str(error.message()).rstrip('.')}"
            raise BackendUnavailable(f"{self.address}{said}.", "See the server's own output.", exit_code=1) from error
        except (OSError, ValueError, HTTPException) as error:  # the last two: something else answers
            reason = "the connection broke off, or something else answers"
            if isinstance(error, OSError):
                reason = error.strerror or str(error) or type(error).__name__
            raise BackendAway(
                f"no answer of Triton at {self.address}: {reason.rstrip('.')}.", "Is it running there?", exit_code=1
            ) from error
        except Exception as error:  # tritonclient believes what it is answered: KeyError, TypeError ...
            raise BackendUnavailable(
                f"{self.address} answers as no Triton server does.", "Is it one?", exit_code=1
            ) from error


class TritonBackend:
    """The network on a server.

    Args:
        server: where.
        graph: what it serves.
        version: of the server.
        check: sees again that it serves the graph, once it was away: another may be served since.
    """

    def __init__(self, server: _Server, graph: Graph, version: str, check: Callable[[], object]) -> None:
        self.name, self.graph = "triton", graph
        self.device = f"{server.address}, Triton {version}"
        self._server, self._model, self._check = server, _model(graph), check
        self._away = False

    def run(self, image: Tensor) -> Tensor:
        """See ``Backend.run``.

        Raises:
            BackendAway: no server answers, or it has not loaded the model yet.
        """
        check_batch(self.graph, image)
        try:
            if self._away:
                self._check()
            logits = self._run(image)
        except BackendUnavailable as error:
            self._away = True
            if isinstance(error, BackendAway) or self._server.ask(
                "", lambda client: client.is_model_ready(self._model)
            ):
                raise
            raise BackendAway(error.message, error.hint, exit_code=1) from error
        self._away = False
        return logits

    def _run(self, image: Tensor) -> Tensor:
        from tritonclient.http import InferInput, InferRequestedOutput

        given = InferInput("image", list(image.shape), "FP32")
        given.set_data_from_numpy(image)
        wanted = [InferRequestedOutput("logits")]
        answer: Any = self._server.ask("", lambda client: client.infer(self._model, [given], outputs=wanted))
        try:
            logits = np.array(answer.as_numpy("logits"), np.float32)
        except Exception as error:
            raise UserError(
                f"{self._model} at {self._server.address} answers no logits.",
                "Write its repository again.",
                exit_code=1,
            ) from error
        if logits.shape != self.graph.output_shape:
            raise UserError(
                f"{self._model} at {self._server.address} answers {logits.shape}, not {self.graph.output_shape}.",
                "Write its repository again.",
                exit_code=1,
            )
        return logits

    def close(self) -> None:
        """See ``Backend.close``; connections end with the threads that have them."""
