"""The Triton server in the wheel of pytriton, in an environment of its own that tools/test_packages.sh makes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from nginx import free_port

ROOT = Path(__file__).parents[2]
ENVIRONMENT = ROOT / ".venv-triton"


@dataclass
class Triton:
    """A server under way."""

    port: int
    grpc_port: int
    process: subprocess.Popen[bytes]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def get(self, path: str) -> Any:
        """What a path of its HTTP says, read as JSON; {} for an empty answer."""
        with urllib.request.urlopen(f"{self.url}/v2/{path}", timeout=10) as answer:
            return json.loads(answer.read() or b"{}")

    @property
    def ready(self) -> bool:
        try:
            self.get("health/ready")
        except (OSError, urllib.error.URLError):
            return False
        return True


@contextmanager
def triton_server(repository: Path, folder: Path) -> Iterator[Triton]:
    """Serve a repository on a port of this machine; ``folder`` is for its files."""
    if not (ENVIRONMENT / ".done").exists():
        pytest.skip(f"needs Triton (make test-packages makes {ENVIRONMENT.name})")
    port, grpc_port = free_port(), free_port()
    command = [sys.executable, str(ROOT / "tools" / "triton_server.py"), str(repository), "--http-port", str(port)]
    command += ["--grpc-port", str(grpc_port)]
    environment = os.environ | {"TMPDIR": str(folder)}
    log = folder / "triton.log"
    with log.open("wb") as output, subprocess.Popen(command, stdout=output, stderr=output, env=environment) as process:
        started = Triton(port, grpc_port, process)
        try:
            until = time.monotonic() + 120
            while not started.ready:
                assert process.poll() is None, log.read_text()[-3000:]
                assert time.monotonic() < until, log.read_text()[-3000:]
                time.sleep(0.1)
            yield started
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
