"""Debian's nginx as the gateway of a hospital: TLS, and what is behind it under a path."""

from __future__ import annotations

import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from certificates import make_certificate

PREFIX = "/ward-3/edge/"

# The location is the one of docs/serving.md, where a test compares it.
LOCATION = """\
location /ward-3/edge/ {
    proxy_pass http://127.0.0.1:8080/;
    proxy_http_version 1.1;
    proxy_set_header Host $http_host;
    proxy_set_header X-Forwarded-For $proxy_add_x_forwarded_for;
    proxy_set_header X-Forwarded-Proto $scheme;
    proxy_set_header Upgrade $http_upgrade;
    proxy_set_header Connection "upgrade";
    proxy_buffering off;
    client_max_body_size 32m;
}
"""
_CONFIGURATION = """
daemon off;
user root;
worker_processes 1;
pid {folder}/nginx.pid;
error_log {folder}/error.log;
events {{ worker_connections 256; }}
http {{
    access_log off;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    server {{
        listen 127.0.0.1:{port} ssl;
        ssl_certificate {certificate};
        ssl_certificate_key {key};
        {location}
    }}
}}
"""


def free_port() -> int:
    """A port of this machine that nobody has."""
    with socket.create_server(("127.0.0.1", 0)) as opened:
        return int(opened.getsockname()[1])


@contextmanager
def gateway(port: int, folder: Path) -> Iterator[str]:
    """nginx before the server on a port of this machine; gives the address (https) of what is behind it."""
    program = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
    if program is None:
        pytest.skip("needs nginx (Debian: apt-get install nginx-light)")
    own, made = free_port(), make_certificate(folder)
    file = folder / "nginx.conf"
    location = LOCATION.replace(":8080", f":{port}")
    file.write_text(
        _CONFIGURATION.format(folder=folder, port=own, certificate=made.certificate, key=made.key, location=location)
    )
    command = [program, "-p", str(folder), "-c", str(file), "-e", str(folder / "error.log")]
    with subprocess.Popen(command, stderr=subprocess.PIPE) as process:
        try:
            until = time.monotonic() + 30
            while socket.socket().connect_ex(("127.0.0.1", own)):
                assert process.poll() is None, process.stderr and process.stderr.read()
                assert time.monotonic() < until
                time.sleep(0.02)
            yield f"https://127.0.0.1:{own}{PREFIX}"
        finally:
            process.terminate()
