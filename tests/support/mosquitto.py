"""Debian's mosquitto, an MQTT broker, on a port of this machine; it can be stopped and started again."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import pytest
from certificates import Certificate
from nginx import free_port

USER, PASSWORD = "tower", "correct horse/battery@staple"


class Mosquitto:
    """The broker; what it has got for a topic is collected by ``listening``.

    Args:
        folder: for its files.
        certificate: with one it speaks TLS only.
        login: whether it wants ``USER`` and ``PASSWORD``.
    """

    def __init__(self, folder: Path, certificate: Certificate | None = None, *, login: bool = False) -> None:
        program = shutil.which("mosquitto") or shutil.which("mosquitto", path="/usr/sbin")
        if program is None:
            pytest.skip("needs mosquitto (Debian: apt-get install mosquitto)")
        pytest.importorskip("paho.mqtt.client", reason="needs paho-mqtt (extra mqtt)")
        self.port = free_port()
        lines = [f"listener {self.port} 127.0.0.1", "log_type none", "user root", "max_queued_messages 0"]
        lines += ["persistence true", f"persistence_location {folder}/"]  # for who subscribed before it was stopped
        if certificate is not None:
            lines += [f"certfile {certificate.certificate}", f"keyfile {certificate.key}"]
        lines.append(f"allow_anonymous {'false' if login else 'true'}")
        if login:
            file = folder / "passwords"
            subprocess.run(
                [shutil.which("mosquitto_passwd") or "mosquitto_passwd", "-b", "-c", str(file), USER, PASSWORD],
                check=True,
                capture_output=True,
            )
            lines.append(f"password_file {file}")
        (folder / "mosquitto.conf").write_text("\n".join(lines) + "\n")
        self._command = [program, "-c", str(folder / "mosquitto.conf")]
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it, and come back once it listens."""
        self._process = subprocess.Popen(self._command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        until = time.monotonic() + 30
        while not _listens(self.port):
            assert self._process.poll() is None
            assert time.monotonic() < until
            time.sleep(0.01)

    def stop(self) -> None:
        """End it; connections break off."""
        if self._process is not None:
            self._process.terminate()
            self._process.wait()

    def __enter__(self) -> Mosquitto:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()


def _listens(port: int) -> bool:
    with socket.socket() as tried:
        return tried.connect_ex(("127.0.0.1", port)) == 0


class Heard:
    """What came for a topic and what is below it: (topic, body, retained) in order."""

    def __init__(self) -> None:
        self.messages: list[tuple[str, Any, bool]] = []
        self.subscribed = threading.Event()

    def of(self, topic: str) -> list[Any]:
        """The bodies for one topic."""
        return [body for at, body, _ in self.messages if at == topic]

    def wait_for(self, topic: str, passing: Any, seconds: float = 30) -> Any:
        """The first body that passes a check."""
        until = time.monotonic() + seconds
        while True:
            for body in self.of(topic):
                if passing(body):
                    return body
            assert time.monotonic() < until, (topic, self.messages[-5:])
            time.sleep(0.01)


@contextmanager
def hearing(port: int, topic: str, name: str = "listener") -> Iterator[Heard]:
    """Listen for a topic and all below it; of what the broker acknowledged while it was stopped nothing is missed."""
    from paho.mqtt.client import Client
    from paho.mqtt.enums import CallbackAPIVersion

    heard = Heard()
    client = Client(CallbackAPIVersion.VERSION2, client_id=name, clean_session=False)
    client.reconnect_delay_set(1, 1)
    client.on_connect = lambda *_: client.subscribe(f"{topic}/#", qos=1)
    client.on_subscribe = lambda *_: heard.subscribed.set()
    client.on_message = lambda _client, _data, message: heard.messages.append(
        (message.topic, json.loads(message.payload), message.retain)
    )
    client.connect("127.0.0.1", port)
    client.loop_start()
    assert heard.subscribed.wait(30)
    try:
        yield heard
    finally:
        client.disconnect()
        client.loop_stop()
