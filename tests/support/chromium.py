"""A headless Chromium, driven by its DevTools protocol over a WebSocket: no driver program, no Selenium."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import tempfile
import time
import urllib.request
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import pytest

PROGRAMS = ("chromium", "chromium-browser", "google-chrome")
_OPTIONS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--remote-debugging-port=0",
)
_KEYS = {"Tab": 9, "Enter": 13, "Escape": 27, " ": 32, "ArrowRight": 39, "ArrowDown": 40}


class Chromium:
    """One browser with one tab, in a profile of its own that is removed in the end.

    Example:
        >>> with Chromium() as browser:  # doctest: +SKIP
        ...     browser.open("http://127.0.0.1:8080/")
        ...     browser.wait_for("document.title === 'ESP-MedSAM Edge'")
    """

    def __init__(self, *options: str) -> None:
        program = next((found for name in PROGRAMS if (found := shutil.which(name))), None)
        if program is None:
            pytest.skip("needs Chromium (Debian: apt-get install chromium)")
        self._client = pytest.importorskip("websockets.sync.client", reason="needs websockets (extra serve)")
        self._profile = Path(tempfile.mkdtemp(prefix="chromium-"))
        command = [program, *_OPTIONS, *options, f"--user-data-dir={self._profile}", "about:blank"]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self._number = 0
        self._stack = ExitStack()
        self.events: list[dict[str, Any]] = []

    def __enter__(self) -> Chromium:
        file = self._profile / "DevToolsActivePort"
        until = time.monotonic() + 60
        while not (file.is_file() and "\n" in file.read_text()):
            if self._process.poll() is not None or time.monotonic() > until:
                self.close()
                pytest.skip("Chromium does not start here")
            time.sleep(0.05)
        port = file.read_text().split()[0]
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/json") as answer:
            tab = next(tab for tab in json.load(answer) if tab["type"] == "page")
        opening = self._client.connect(tab["webSocketDebuggerUrl"], max_size=None, open_timeout=30, ping_interval=None)
        self._socket = self._stack.enter_context(opening)
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.close()
        self.close()

    def close(self) -> None:
        """End the browser and remove its profile."""
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        shutil.rmtree(self._profile, ignore_errors=True)

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One command of the DevTools protocol; events that come meanwhile go to ``events``."""
        self._number += 1
        self._socket.send(json.dumps({"id": self._number, "method": method, "params": parameters}))
        while True:
            message = json.loads(self._socket.recv(timeout=60))
            if message.get("id") == self._number:
                assert "error" not in message, (method, message["error"])
                return dict(message["result"])
            self.events.append(message)

    def open(self, url: str) -> None:
        """Go to an address."""
        self.call("Page.navigate", url=url)

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression, awaited if it is a promise."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, (expression, answer["exceptionDetails"])
        return answer["result"].get("value")

    def wait_for(self, expression: str, seconds: float = 60) -> Any:
        """Wait until an expression is true, also across a change of page; returns its value."""
        until = time.monotonic() + seconds
        while True:
            try:
                value = self.evaluate(expression)
            except AssertionError:  # the page is not that far yet
                value = None
            if value:
                return value
            assert time.monotonic() < until, f"never true: {expression}"
            time.sleep(0.05)

    def press(self, key: str) -> None:
        """Press and release a key: a character or a name of ``_KEYS``."""
        code = _KEYS.get(key, ord(key.upper()) if len(key) == 1 else 0)
        text = {"Enter": "\r"}.get(key, key if len(key) == 1 else "")
        common = {"key": key, "windowsVirtualKeyCode": code}
        self.call("Input.dispatchKeyEvent", type="keyDown", text=text, **common)
        self.call("Input.dispatchKeyEvent", type="keyUp", **common)

    def type(self, text: str) -> None:
        """Type into what has the focus."""
        self.call("Input.insertText", text=text)

    def resize(self, width: int, height: int, *, scale: float = 1) -> None:
        """Give the page another size, in CSS pixels."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=scale, mobile=False
        )

    def screenshot(self, path: str | os.PathLike[str], kind: str = "png", quality: int | None = None) -> None:
        """What the page shows, as a file."""
        options = {} if quality is None else {"quality": quality}
        data = self.call("Page.captureScreenshot", format=kind, **options)["data"]
        Path(path).write_bytes(base64.b64decode(data))

    def errors(self) -> list[str]:
        """What went wrong on the page so far: exceptions, and what the browser itself reported as an error."""
        found = []
        for event in self.events:
            parameters = event.get("params", {})
            if event.get("method") == "Runtime.exceptionThrown":
                found.append(str(parameters["exceptionDetails"]))
            elif event.get("method") == "Log.entryAdded" and parameters["entry"]["level"] == "error":
                found.append(parameters["entry"]["text"])
        return found
