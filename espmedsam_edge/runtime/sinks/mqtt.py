"""Lines of results to an MQTT broker: ``mqtt://[USER@]HOST[:PORT]/TOPIC``, ``mqtts://`` with TLS.

Each line is sent with quality 1 and counts as published when the broker has acknowledged it (one that was on its way
while the connection broke may come twice). ``TOPIC/status`` keeps what the run does: running, ended, or lost, which
the broker itself says of a run that is gone (last will).
"""

from __future__ import annotations

import json
import logging
import os
import re
import ssl
import sys
import threading
import time
from collections import deque
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from espmedsam_edge.errors import UserError
from espmedsam_edge.machine.hosts import is_host
from espmedsam_edge.machine.installation import why_missing
from espmedsam_edge.runtime.segmentation import Segmentation
from espmedsam_edge.runtime.sinks.publishing import Publication
from espmedsam_edge.runtime.sources.source import Failure, SourceFrame
from espmedsam_edge.runtime.sources.uris import check_login, read_options
from espmedsam_edge.version import __version__

log = logging.getLogger(__name__)

PASSWORD = "ESPMEDSAM_MQTT_PASSWORD"  # noqa: S105  # nosec B105 (the variable's name)
MOST_LINES, MOST_BYTES = 4096, 16 << 20
"""What waits for a broker that is away; older lines make way for newer ones."""

_IN_FLIGHT = 20  # that the broker has not acknowledged yet
_FIRST_SECONDS = 2.0  # to learn at the start whether the broker refuses
_LAST_SECONDS = 5.0  # for what waits at the end, if the broker is there or has just been
_LONGEST_PAUSE = 2  # seconds between two attempts
_OPTIONS = ("ca", "cert", "key", "password-file", "client")
_LONGEST = 16_000  # characters of an address
_LONGEST_PASSWORD = (1 << 16) - 1  # bytes, as MQTT has it
_EXAMPLE = "For example mqtt://broker.example/ward-3/masks, mqtts:// with TLS."


@dataclass(frozen=True)
class Broker:
    """Where to publish, and as whom.

    Attributes:
        address: what messages call it: no user name, no options.
        topic: of the lines.
        password: never shown.
        tls: None: not encrypted.
        client: the name that the broker knows it by; empty: one that the broker makes.
    """

    host: str
    port: int
    address: str
    topic: str
    user: str | None
    password: str | None
    tls: ssl.SSLContext | None
    client: str


def parse_broker(text: str) -> Broker:
    """Read an address; the password is in the file that it names, or in ``ESPMEDSAM_MQTT_PASSWORD``.

    Raises:
        UserError: no such address; a topic that cannot be published to; a file that cannot be read.
    """
    check_login(text)
    scheme = text.partition("://")[0].lower()
    plain, secure = scheme == "mqtt", scheme == "mqtts"
    try:
        parts = urlsplit(text.partition("#")[0])
        host, port = parts.hostname, parts.port
        topic = unquote(parts.path[1:], errors="strict")
        if not text.isprintable() or len(text) > _LONGEST or port == 0:  # else paho's threads end with it
            raise ValueError("no text")
    except ValueError:
        raise UserError(f"{scheme}://... is not a valid address.", _EXAMPLE) from None
    if not (plain or secure) or not host or not re.fullmatch(r"[\w.:%-]+", host) or not is_host(host):
        raise UserError(f"{scheme}://... names no host.", _EXAMPLE)
    if parts.password is not None:
        hint = f"Put it into a file, ?password-file=FILE, or into {PASSWORD}."
        raise UserError(f"{scheme}://{host}/... has a password in it, which other users of this machine see.", hint)
    port = port or (1883 if plain else 8883)
    address = f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}"
    _check_topic(topic + ("#" if "#" in text else ""), address)
    options = read_options(parts.query, address)
    for option in options:
        if option not in _OPTIONS:
            raise UserError(f"no option '{option}' in {address}.", f"Known: {', '.join(_OPTIONS)}.")
    user = None if parts.username is None else unquote(parts.username)
    password = _password(options.get("password-file"), address)
    if user is None and "password-file" in options:
        raise UserError(f"{address} has a password and no user.", f"Write {scheme}://USER@{host}/...")
    tls = _encrypted(options, address) if secure else None
    if plain and (given := [name for name in ("ca", "cert", "key") if name in options]):
        raise UserError(f"option '{given[0]}' of {address} is for TLS.", "Write mqtts://.")
    return Broker(host, port, address, topic, user, user and password, tls, options.get("client", ""))


def _check_topic(topic: str, address: str) -> None:
    if not topic:
        raise UserError(f"{address} names no topic.", _EXAMPLE)
    if set(topic) & set("+#"):
        raise UserError(f"the topic of {address} has a wildcard.", "+ and # are for who listens: name one topic.")
    if topic.startswith("$") or not topic.isprintable() or len(topic.encode("utf-8", "replace")) > 1024:
        raise UserError(f"nothing can be published to that topic of {address}.", "Use letters, digits, - and /.")


def files_of(text: str) -> list[str]:
    """The files that an address names; none if it is no address."""
    try:
        options = parse_qs(urlsplit(text.partition("#")[0]).query)
    except ValueError:
        return []
    return [file for name in _OPTIONS if name != "client" for file in options.get(name, [])]


def _password(file: str | None, address: str) -> str | None:
    place = PASSWORD if file is None else f"the password-file of {address}"
    try:
        if file is None:
            content = os.environb.get(PASSWORD.encode())
            if content is None:
                return None
        else:
            with open(file, "rb") as stream:
                content = stream.read(_LONGEST_PASSWORD + 1)
        if len(content) > _LONGEST_PASSWORD:
            raise ValueError("too long")
        text = content.decode("utf-8")
        return text if file is None else text.rstrip("\r\n")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is no password"
        raise UserError(f"cannot read {place}: {reason}.", "Check its name and its content.") from None


def _encrypted(options: dict[str, str], address: str) -> ssl.SSLContext:
    try:
        context = ssl.create_default_context(cafile=options.get("ca"))
        if "cert" in options or "key" in options:
            context.load_cert_chain(
                options.get("cert", ""), options.get("key"), lambda: ""
            )  # a password is not asked for
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", None) or getattr(error, "strerror", None) or "they cannot be read"
        hint = "ca, cert and key are PEM files; a key may have no password."
        raise UserError(f"cannot use the certificates of {address}: {reason}.", hint) from None
    return context


def open_mqtt(publication: Publication) -> MqttPublisher:
    """See ``PUBLISHERS``."""
    broker = parse_broker(publication.address)
    if (reason := why_missing("paho.mqtt.client", "mqtt")) is not None:
        raise UserError(f"cannot publish to {broker.address}: {reason}")
    return MqttPublisher(broker, publication)


class MqttPublisher:
    """Never waits for the broker while frames come: two threads of its own send what is in a bounded queue.

    A broker that refuses at the start (certificate, password) is an error; one that is away, then or later, costs the
    lines that the queue cannot hold. They are counted, and count as a failure.
    """

    def __init__(self, broker: Broker, publication: Publication) -> None:
        self.name = broker.address
        self._broker, self._form, self._failures = broker, publication.form, publication.failures
        self._lock = threading.Lock()
        self._waiting: deque[bytes] = deque()
        self._size = 0
        self._acknowledged: deque[int] = deque()  # what callbacks tell the sender; they must not take the lock
        self._wake = threading.Event()
        self._settled = threading.Event()  # the first attempt has ended
        self._refused: UserError | None = None
        self._lost: float | None = None  # since when
        self._leaving = self._been_there = False
        self._in_flight: set[int] = set()
        self.frames = self.published = self.dropped = 0
        self._client = self._made_client()
        self._sender = threading.Thread(target=self._send, name="espmedsam-mqtt", daemon=True)

    def _made_client(self) -> Any:
        from paho.mqtt.client import Client
        from paho.mqtt.enums import CallbackAPIVersion

        broker = self._broker
        client = Client(CallbackAPIVersion.VERSION2, client_id=broker.client)
        client.max_inflight_messages_set(2 * _IN_FLIGHT)  # the bound here counts
        client.reconnect_delay_set(1, _LONGEST_PAUSE)
        client.will_set(f"{broker.topic}/status", _status("lost"), qos=1, retain=True)
        if broker.user is not None:
            client.username_pw_set(broker.user, broker.password)
        if broker.tls is not None:
            client.tls_set_context(broker.tls)
        client.on_connect, client.on_connect_fail = self._on_connect, self._on_connect_fail
        client.on_disconnect, client.on_publish = self._on_disconnect, self._on_publish
        return client

    def __enter__(self) -> MqttPublisher:
        """Connect, in the background; only a refusal is waited for.

        Raises:
            UserError: the broker refuses.
        """
        self._client.connect_async(self._broker.host, self._broker.port, keepalive=20)
        self._client.loop_start()
        self._settled.wait(_FIRST_SECONDS)
        if self._refused is not None:
            self._stop()
            raise self._refused
        self._sender.start()
        return self

    def write(self, frame: SourceFrame, result: Segmentation) -> None:
        """Queue a frame's line, at once."""
        line = self._form.line(frame, result).encode()
        with self._lock:
            self.frames += 1
            self._waiting.append(line)
            self._size += len(line)
            while len(self._waiting) > MOST_LINES or self._size > MOST_BYTES:
                self._size -= len(self._waiting.popleft())
                self.dropped += 1
        self._wake.set()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Send what waits, if the broker is there; then say what was not published."""
        until = time.monotonic() + (_LAST_SECONDS if kind is None else 1.0)
        while self._left() and self._within_reach() and time.monotonic() < until:
            self._wake.set()
            time.sleep(0.01)
        self._leaving = True
        self._wake.set()
        self._sender.join(1.0)
        self._count_acknowledged()
        self.dropped += self._left()
        if self._client.is_connected():
            ended = _status("ended", complete=kind is None, published=self.published, dropped=self.dropped)
            with suppress(RuntimeError, ValueError):  # it has gone in this moment
                self._client.publish(f"{self._broker.topic}/status", ended, qos=1, retain=True).wait_for_publish(1.0)
        self._stop()
        if self.dropped:
            message = f"{self.dropped} of {self.frames} lines were not published to {self.name}: it was away."
            self._failures.append(Failure(self.name, f"{message} Check the broker and the network."))

    def _within_reach(self) -> bool:
        """Whether it is worth waiting for the broker: it is there, or was seconds ago."""
        if self._client.is_connected():
            return True
        lost = self._lost
        return self._been_there and lost is not None and time.monotonic() - lost < 2 * _LAST_SECONDS

    def _left(self) -> int:
        return self.frames - self.published - self.dropped

    def _stop(self) -> None:
        """End paho's thread; one that waits for a network that does not answer is left behind."""
        self._client.disconnect()
        stopping = threading.Thread(target=self._client.loop_stop, daemon=True)
        stopping.start()
        stopping.join(1.0)

    # The sender's thread: the only one that publishes lines.

    def _send(self) -> None:
        while not self._leaving:
            self._wake.wait()
            self._wake.clear()
            self._count_acknowledged()
            while len(self._in_flight) < _IN_FLIGHT and self._client.is_connected() and not self._leaving:
                with self._lock:
                    if not self._waiting:
                        break
                    line = self._waiting.popleft()
                    self._size -= len(line)
                self._in_flight.add(self._client.publish(self._broker.topic, line, qos=1).mid)

    def _count_acknowledged(self) -> None:
        while self._acknowledged:
            mid = self._acknowledged.popleft()
            if mid in self._in_flight:  # else it was the status
                self._in_flight.remove(mid)
                self.published += 1

    # Called by paho, in its thread, while it holds locks of its own.

    def _on_connect(self, client: Any, _data: object, _flags: object, reason: Any, _properties: object) -> None:
        if reason.is_failure:
            self._away(f"{reason}", refuses="unavailable" not in f"{reason}".lower())
            return
        self._been_there = True
        self._settled.set()
        client.publish(f"{self._broker.topic}/status", _status("running"), qos=1, retain=True)
        if self._lost is not None:
            log.info("%s is back after %.1f s.", self.name, time.monotonic() - self._lost)
            self._lost = None
        self._wake.set()

    def _on_connect_fail(self, _client: object, _data: object) -> None:
        error = sys.exc_info()[1]  # paho calls this while it handles it, and does not tell it otherwise
        if isinstance(error, ssl.SSLError):
            reason = getattr(error, "verify_message", None) or error.reason or "TLS failed"
            self._away(str(reason), refuses=True)
        else:
            self._away(getattr(error, "strerror", None) or str(error) or "no connection", refuses=False)

    def _on_disconnect(self, _client: object, _data: object, _flags: object, reason: Any, _properties: object) -> None:
        if not self._leaving and self._been_there:
            self._away(f"{reason}", refuses=False)

    def _on_publish(self, _client: object, _data: object, mid: int, _reason: object, _properties: object) -> None:
        self._acknowledged.append(mid)
        if self._waiting:  # else the next line is soon enough to count it
            self._wake.set()

    def _away(self, reason: str, *, refuses: bool) -> None:
        if refuses and not self._settled.is_set():
            hint = "Check user, password and certificates, and the broker's own log."
            self._refused = UserError(f"{self.name} refuses the connection: {reason.rstrip('.')}.", hint, exit_code=1)
        elif self._lost is None and self._refused is None:
            self._lost = time.monotonic()
            log.warning("%s is away (%s); %d lines wait at most. Trying again.", self.name, reason, MOST_LINES)
        self._settled.set()


def _status(what: str, **more: object) -> str:
    return json.dumps({"status": what, "version": __version__, **more})
