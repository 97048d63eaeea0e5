"""A small server on this machine: a folder of the web, and as much of Hugging Face's hub as its client asks for."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar
from urllib.parse import unquote, urlsplit

Files = dict[str, bytes]


class BundleServer(ThreadingHTTPServer):
    """``web`` are files by path; ``repositories`` are commits by name, newest last; ``asked`` is what was asked for."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answers)
        self.web: Files = {}
        self.redirects: dict[str, str] = {}
        self.repositories: dict[str, list[tuple[str, Files]]] = {}
        self.private: dict[str, bool] = {}
        self.asked: list[str] = []
        self.broken: int | None = None  # an error that is the answer to everything
        self.dripping = ""  # "head" or "body": what comes a byte at a time

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def commit(self, repository: str, files: Files) -> str:
        """Add to a repository; the commit's name."""
        commits = self.repositories.setdefault(repository, [])
        whole = {**(commits[-1][1] if commits else {}), **files}
        name = hashlib.sha1(repr((len(commits), sorted(whole.items()))).encode()).hexdigest()
        commits.append((name, whole))
        return name


@contextmanager
def serving() -> Iterator[BundleServer]:
    with BundleServer() as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


class _Answers(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: BundleServer
    codes: ClassVar = {"RepoNotFound": 401, "RevisionNotFound": 404, "EntryNotFound": 404}

    def log_message(self, format: str, *arguments: object) -> None:
        self.server.asked.append(f"{self.command} {self.path}")

    def answer(self, code: int, content: bytes = b"", **headers: str) -> None:
        if self.server.dripping and (self.server.dripping, self.command) != ("body", "HEAD"):
            with suppress(OSError):
                self._drip(headers)
            return
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        length = 100_000 if self.server.dripping else len(content)
        self.send_header("Content-Length", str(length))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _drip(self, headers: dict[str, str]) -> None:
        said = {"Content-Length": "100000"} | {name.replace("_", "-"): value for name, value in headers.items()}
        head = b"HTTP/1.1 200 OK\r\n" + "".join(f"{name}: {value}\r\n" for name, value in said.items()).encode()
        if self.server.dripping == "body":
            self.wfile.write(head + b"\r\n")
        else:
            self.wfile.write(head + b"X-Long: ")
        begin = time.monotonic()
        while self.server.dripping and time.monotonic() - begin < 20:
            self.wfile.write(b" ")
            time.sleep(0.02)
        self.close_connection = True

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if self.server.broken is not None:
            return self.answer(self.server.broken)
        if path in self.server.redirects:
            return self.answer(302, Location=self.server.redirects[path])
        if path in self.server.web:
            return self.answer(200, self.server.web[path])
        if "/resolve/" in path:
            repository, rest = path[1:].split("/resolve/")
            return self._resolve(repository, *rest.split("/", 1))
        return self.answer(404)

    def _resolve(self, repository: str, revision: str, file: str) -> None:
        commits = self.server.repositories.get(repository)
        if commits is None:
            return self._missing("RepoNotFound")
        known = dict(commits) | {"main": commits[-1][1]}
        if revision not in known:
            return self._missing("RevisionNotFound")
        if file not in known[revision]:
            return self._missing("EntryNotFound")
        content = known[revision][file]
        commit = commits[-1][0] if revision == "main" else revision
        return self.answer(200, content, ETag=f'"{hashlib.sha1(content).hexdigest()}"', X_Repo_Commit=commit)

    def _missing(self, what: str) -> None:
        self.answer(self.codes[what], X_Error_Code=what, X_Error_Message=what)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        if self.server.broken is not None:
            return self.answer(self.server.broken)
        path = urlsplit(self.path).path
        if path == "/api/repos/create":
            wanted = json.loads(body)
            name = f"{wanted.get('organization', 'owner')}/{wanted['name']}"
            self.server.repositories.setdefault(name, [])
            self.server.private[name] = wanted.get("private", wanted.get("visibility") == "private")
            return self._json({"url": f"{self.server.address}/{name}"})
        repository, _, _ = path.removeprefix("/api/models/").rpartition("/commit/")
        if repository:
            entries = [json.loads(line) for line in body.splitlines()]
            files = {
                entry["value"]["path"]: base64.b64decode(entry["value"]["content"])
                for entry in entries
                if entry["key"] == "file"
            }
            oid = self.server.commit(repository, files)
            return self._json({"commitUrl": f"{self.server.address}/{repository}/commit/{oid}", "commitOid": oid})
        if "/preupload/" in path:
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]
            ]
            return self._json({"files": files})
        return self.answer(404)

    def _json(self, value: object) -> None:
        self.answer(200, json.dumps(value).encode(), Content_Type="application/json")
