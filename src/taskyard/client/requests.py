"""The requests of the API as values, shared by both clients."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar
from urllib.parse import quote, urlsplit

import httpx
import msgspec

from taskyard import __version__
from taskyard.client.errors import ClientError, refused
from taskyard.client.models import Json, Repository, Run, Task, TaskPage

T = TypeVar("T")

PAGE = 100
"""The largest page that a server gives (tasks-api §1.5)."""
ANSWER_S = 30.0
CONNECT_S = 10.0
TURN_S = 660.0
"""A server may answer `user_message` only when the turn is over, within 600 s (tasks-api §6.6)."""


@dataclass(frozen=True)
class Call(Generic[T]):
    """One request below `/api/projects/{project}/`, and the kind of its answer."""

    method: str
    path: str
    answer: type[T]
    body: Json | None = None
    query: Mapping[str, str] = field(default_factory=dict)
    timeout_s: float = ANSWER_S

    @property
    def timeout(self) -> httpx.Timeout:
        """However long an answer may take, a server that is there accepts a connection soon."""
        return httpx.Timeout(self.timeout_s, connect=CONNECT_S)

    def decode(self, response: httpx.Response) -> T:
        """The answer; ClientError when it is not 2xx or not what was expected. Its body has been read."""
        if not response.is_success:
            raise refused(response)
        try:
            return msgspec.json.decode(response.content, type=self.answer)
        except msgspec.DecodeError as error:
            detail = f"the answer to {self.method} {response.url.path} is not of the Tasks API: {error}"
            raise ClientError(response.status_code, "unexpected_answer", detail) from None


@dataclass(frozen=True)
class Endpoint:
    """Where the server is and how to be let in."""

    url: str
    api_key: str = field(repr=False)
    project: int | str = "@current"

    @classmethod
    def of(cls, url: str | None, api_key: str | None, project: int | str) -> Endpoint:
        """With TASKYARD_URL and TASKYARD_API_KEY for what is not given; ClientError when nothing is."""
        url = url or os.environ.get("TASKYARD_URL")
        if not url:
            raise ClientError(0, "setup", "no server is named: give a URL or set TASKYARD_URL")
        api_key = api_key or os.environ.get("TASKYARD_API_KEY")
        if not api_key:
            raise ClientError(0, "setup", f"no API key for {url}: give one or set TASKYARD_API_KEY")
        api_key = api_key.strip()
        if not api_key.isascii() or not api_key.isprintable():
            # The HTTP library would show the key in its complaint.
            raise ClientError(
                0, "setup", "the API key has characters that no key has: copy it again, in one line"
            )
        return cls(url.rstrip("/"), api_key, project)

    def options(self) -> dict[str, Any]:
        """Arguments for an httpx client. A proxy of the environment is not for this machine's own server."""
        return {
            "base_url": f"{self.url}/api/projects/{quote(str(self.project), safe='@')}/",
            "headers": {
                "Authorization": f"Bearer {self.api_key}",
                "User-Agent": f"taskyard-client/{__version__}",
            },
            "timeout": httpx.Timeout(ANSWER_S, connect=CONNECT_S),
            "trust_env": not is_local(self.url),
        }


def is_local(url: str) -> bool:
    """True when a URL names this machine's loopback interface."""
    try:
        host = urlsplit(url).hostname
    except ValueError:
        return False
    return host in ("localhost", "127.0.0.1", "::1")


def run_path(task_id: str, run_id: str, rest: str = "") -> str:
    return f"tasks/{quote(task_id, safe='')}/runs/{quote(run_id, safe='')}/{rest}"


def create_task(
    title: str, description: str, repository: str | None, json_schema: Json | None, fields: Json
) -> Call[Task]:
    body: Json = {"title": title, "description": description, "origin_product": "user_created"}
    if repository is not None:
        body["repository"] = repository
    if json_schema is not None:
        body["json_schema"] = json_schema
    return Call("POST", "tasks/", Task, body | fields)


def get_task(task_id: str) -> Call[Task]:
    return Call("GET", f"tasks/{quote(task_id, safe='')}/", Task)


def list_tasks(offset: int, filters: Mapping[str, Any]) -> Call[TaskPage]:
    """One page. Pages are counted on here: `next` holds the server's idea of its own address."""
    query = {name: _query(value) for name, value in filters.items() if value is not None}
    return Call("GET", "tasks/", TaskPage, query=query | {"limit": str(PAGE), "offset": str(offset)})


def run_task(task_id: str, options: Json) -> Call[Task]:
    """Only what is given is sent: an explicit null is an error for most fields (tasks-api §4.8)."""
    body = {name: value for name, value in options.items() if value is not None}
    return Call("POST", f"tasks/{quote(task_id, safe='')}/run/", Task, body)


def get_run(task_id: str, run_id: str) -> Call[Run]:
    return Call("GET", run_path(task_id, run_id), Run)


def update_run(task_id: str, run_id: str, fields: Json) -> Call[Run]:
    return Call("PATCH", run_path(task_id, run_id), Run, fields)


def command(task_id: str, run_id: str, method: str, params: Json) -> Call[Json]:
    body: Json = {"jsonrpc": "2.0", "id": "1", "method": method}
    if params:
        body["params"] = params
    return Call("POST", run_path(task_id, run_id, "command/"), Json, body, timeout_s=TURN_S)


def command_result(answer: Json) -> Json:
    """The `result` of a JSON-RPC answer; ClientError for its `error`."""
    error = answer.get("error")
    if error is not None:
        detail = error.get("message") if isinstance(error, dict) else error
        code = error.get("code", "error") if isinstance(error, dict) else "error"
        raise ClientError(200, str(code), str(detail or "the agent refused the command"))
    result = answer.get("result")
    return result if isinstance(result, dict) else {}


def message_params(content: str | None, artifact_ids: Sequence[str]) -> Json:
    params: Json = {}
    if content is not None:
        params["content"] = content
    if artifact_ids:
        params["artifact_ids"] = list(artifact_ids)
    return params


def register_repository(origin: str, name: str | None) -> Call[Repository]:
    body = {"origin": origin} | ({} if name is None else {"name": name})
    return Call("POST", "repositories/", Repository, body)


def _query(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
