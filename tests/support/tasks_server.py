"""A stand-in for the Tasks API of a server, for tests of its clients.

It answers over real sockets with what a test scripts, and can do what a healthy server does not: cut a
stream anywhere, send it in tiny pieces, refuse, close early. It holds no rules of the API.
"""

from __future__ import annotations

import json
import re
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal
from urllib.parse import parse_qs, urlsplit

Json = dict[str, Any]

TASK, RUN = "3f1c0e6e-0000-4000-8000-000000000001", "3f1c0e6e-0000-4000-8000-000000000002"
PREFIX = "/api/projects/@current/"
RUN_PATH = f"tasks/{TASK}/runs/{RUN}/"


@dataclass
class Seen:
    """One request as it arrived."""

    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    body: Any


@dataclass
class Connection:
    """How the server treats one connection to the stream.

    `upto`: bytes of the events to send before the end, None for all; `end`: in good order, or cut;
    `piece`: size of the pieces; `gate`: waited for after the first piece; `status` other than 200: a
    refusal, with `retry_after` as its header; `before` and `after`: bytes put around the events.
    """

    upto: int | None = None
    end: Literal["close", "cut"] = "close"
    piece: int = 4096
    gate: threading.Event | None = None
    status: int = 200
    retry_after: str = ""
    before: bytes = b""
    after: bytes = b""
    content_type: str = "text/event-stream"


@dataclass
class StandIn:
    """What the server knows, what it does, and what it was asked."""

    answers: dict[tuple[str, str], Callable[[Seen], tuple[int, Any]]] = field(default_factory=dict)
    """(method, path below the project) -> status and JSON (or bytes) of the answer."""
    events: list[tuple[str, str]] = field(default_factory=list)
    """Id and JSON text of each event of the run's stream."""
    connections: list[Connection] = field(default_factory=list)
    """For the next connections to the stream; afterwards they are orderly ones."""
    seen: list[Seen] = field(default_factory=list)
    url: str = ""

    def streams(self) -> list[Seen]:
        return [request for request in self.seen if request.path.endswith("/stream/")]

    def run(self, status: str = "completed", **fields: Any) -> None:
        """What `GET R/` answers from now on."""
        self.answers["GET", RUN_PATH] = lambda _: (200, run_json(status, **fields))


def run_json(status: str, **fields: Any) -> Json:
    return {"id": RUN, "task": TASK, "status": status, "state": {}, "artifacts": [], **fields}


def task_json(**fields: Any) -> Json:
    return {"id": TASK, "title": "A task", "slug": "DEF-0", **fields}


def state(number: int, status: str) -> tuple[str, str]:
    """A state event of the stream."""
    return f"1700000000000-{number}", json.dumps({"type": "task_run_state", "status": status})


def message(number: int, text: str, ensure_ascii: bool = True) -> tuple[str, str]:
    """An agent's text chunk as an event of the stream."""
    update = {"sessionUpdate": "agent_message_chunk", "content": {"type": "text", "text": text}}
    notification = {"method": "session/update", "params": {"update": update}}
    entry = {"type": "notification", "notification": notification}
    return f"1700000000000-{number}", json.dumps(entry, ensure_ascii=ensure_ascii)


def progress(number: int, label: str) -> tuple[str, str]:
    """A finished step as an event of the stream."""
    params = {"step": label, "status": "completed", "label": label, "group": "setup"}
    notification = {"method": "_posthog/progress", "params": params}
    return f"1700000000000-{number}", json.dumps({"type": "notification", "notification": notification})


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    stand_in: StandIn

    def log_message(self, *_: Any) -> None:
        pass

    def _serve(self) -> None:
        parts = urlsplit(self.path)
        length = int(self.headers.get("content-length") or 0)
        body = self.rfile.read(length)
        query = {name: values[0] for name, values in parse_qs(parts.query).items()}
        headers = {name.lower(): value for name, value in self.headers.items()}
        request = Seen(self.command, parts.path, query, headers, json.loads(body) if body else None)
        self.stand_in.seen.append(request)
        path = parts.path.removeprefix(PREFIX)
        answer = self.stand_in.answers.get((self.command, path))
        if answer is not None:
            self._answer(*answer(request))
        elif path == f"{RUN_PATH}stream/":
            connections = self.stand_in.connections
            self._stream(connections.pop(0) if connections else Connection(), headers.get("last-event-id"))
        else:
            self._answer(
                404, {"type": "invalid_request", "code": "not_found", "detail": "Not found.", "attr": None}
            )

    do_GET = do_POST = do_PATCH = _serve  # noqa: N815 - the base class looks for these names

    def _answer(self, status: int, value: Any, retry_after: str = "") -> None:
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        if retry_after:
            self.send_header("retry-after", retry_after)
        self.end_headers()
        self.wfile.write(data)

    def _stream(self, how: Connection, last: str | None) -> None:
        if how.status != 200:
            self._answer(how.status, {"detail": f"refused with {how.status}"}, how.retry_after)
            return
        ids = [event_id for event_id, _ in self.stand_in.events]
        rest = self.stand_in.events[ids.index(last) + 1 if last else 0 :]
        frames = "".join(f"id: {event_id}\ndata: {data}\n\n" for event_id, data in rest).encode()
        content = (how.before + frames)[: how.upto] + how.after
        self.send_response(200)
        self.send_header("content-type", how.content_type)
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()
        for start in range(0, len(content), how.piece):
            piece = content[start : start + how.piece]
            self.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
            self.wfile.flush()
            if start == 0 and how.gate is not None:
                how.gate.wait(60)
        self.close_connection = True
        if how.end == "close":
            self.wfile.write(b"0\r\n\r\n")
        else:
            self.connection.shutdown(socket.SHUT_RDWR)


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: Any) -> None:
        """A client that goes away in the middle is part of what is tested."""


@contextmanager
def tasks_server() -> Iterator[StandIn]:
    """A stand-in that listens on a free port."""
    stand_in = StandIn()
    handler = type("Handler", (_Handler,), {"stand_in": stand_in})
    server = _Server(("127.0.0.1", 0), handler)
    stand_in.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield stand_in
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def bearer(request: Seen) -> str:
    """The credential of a request."""
    found = re.fullmatch(r"Bearer (.+)", request.headers.get("authorization", ""))
    return found[1] if found else ""
