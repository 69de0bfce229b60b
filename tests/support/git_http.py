"""A smart-HTTP git server on 127.0.0.1 over `git http-backend`, for tests."""

from __future__ import annotations

import contextlib
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import cast
from urllib.parse import urlsplit

from tests.support.repositories import ENV


@dataclass
class GitServer:
    """A running server. `authorization`: the header it demands, or None. `redirect`: answer everything so."""

    root: Path
    url: str = ""
    authorization: str | None = None
    redirect: str | None = None
    seen: list[tuple[str, str | None]] = field(default_factory=list)
    """Path and Authorization header of each request."""


class _Server(ThreadingHTTPServer):
    daemon_threads = False
    state: GitServer


class _Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self._serve()

    def do_POST(self) -> None:
        self._serve()

    def log_message(self, *args: object) -> None:
        pass  # a test's output is not a place for access logs

    def _serve(self) -> None:
        state = cast(_Server, self.server).state
        header = self.headers.get("Authorization")
        state.seen.append((self.path, header))
        body = self._body()
        if state.redirect is not None:
            self.send_response(302)
            self.send_header("Location", state.redirect + self.path)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        if state.authorization is not None and header != state.authorization:
            self.send_response(401)
            self.send_header("WWW-Authenticate", 'Basic realm="git"')
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        parts = urlsplit(self.path)
        env = {
            **ENV,
            "GIT_PROJECT_ROOT": str(state.root),
            "GIT_HTTP_EXPORT_ALL": "1",
            "GIT_PROTOCOL": self.headers.get("Git-Protocol", ""),
            "REMOTE_USER": "agent",
            "REMOTE_ADDR": "127.0.0.1",
            "REQUEST_METHOD": self.command,
            "PATH_INFO": parts.path,
            "QUERY_STRING": parts.query,
            "CONTENT_TYPE": self.headers.get("Content-Type", ""),
            "CONTENT_LENGTH": str(len(body)),
        }
        if encoding := self.headers.get("Content-Encoding"):
            env["HTTP_CONTENT_ENCODING"] = encoding
        answer = subprocess.run(
            ["git", "http-backend"], env=env, input=body, capture_output=True, check=True
        ).stdout
        head, _, content = answer.partition(b"\r\n\r\n")
        headers = dict(line.split(": ", 1) for line in head.decode().split("\r\n") if ": " in line)
        self.send_response(int(headers.pop("Status", "200").split()[0]))
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body


@contextlib.contextmanager
def git_server(root: Path) -> Iterator[GitServer]:
    """Serve the bare repositories below `root` at a free port."""
    server = _Server(("127.0.0.1", 0), _Handler)
    server.state = GitServer(root, f"http://127.0.0.1:{server.server_address[1]}")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server.state
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
