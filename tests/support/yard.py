"""A server under test, with people, projects and keys, and the calls that tests make on it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar
from unittest.mock import AsyncMock, patch

import httpx

from taskyard import worker as workers
from taskyard.accounts import admin
from taskyard.db.engine import Database
from taskyard.sandbox.providers import provider_for
from taskyard.serve import listening
from taskyard.settings import Settings

Json = dict[str, Any]
DEADLINE_S = 60.0
T = TypeVar("T")


@dataclass
class Api:
    """Calls with one key, relative to the project."""

    client: httpx.AsyncClient
    database: Database
    project: int | str
    key: str | None

    async def request(self, method: str, path: str, **options: Any) -> httpx.Response:
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        headers |= options.pop("headers", {})
        url = path if path.startswith(("/", "http")) else f"/api/projects/{self.project}/{path}"
        return await self.client.request(method, url, headers=headers, **options)

    async def get(self, path: str, **options: Any) -> httpx.Response:
        return await self.request("GET", path, **options)

    async def post(self, path: str, body: Any = None, **options: Any) -> httpx.Response:
        return await self.request("POST", path, **({} if body is None else {"json": body}), **options)

    async def patch(self, path: str, body: Any) -> httpx.Response:
        return await self.request("PATCH", path, json=body)

    async def create_task(self, **fields: Any) -> Json:
        return ok(await self.post("tasks/", fields), 201)

    async def start(self, description: str = "", *, repository: str | None = None, **body: Any) -> Run:
        """A task with a run that was started."""
        task = await self.create_task(title="A task", description=description, repository=repository)
        started = ok(await self.post(f"tasks/{task['id']}/run/", body))
        return Run(self, task["id"], started["latest_run"]["id"])

    async def create_run(self, task: Json | None = None, **body: Any) -> Run:
        """A run that nothing starts; local unless said otherwise."""
        task = task or await self.create_task(title="A task")
        made = ok(await self.post(f"tasks/{task['id']}/runs/", body), 201)
        return Run(self, task["id"], made["id"])


@dataclass
class Run:
    api: Api
    task_id: str
    id: str

    def path(self, rest: str = "") -> str:
        return f"tasks/{self.task_id}/runs/{self.id}/{rest}"

    async def fetch(self) -> Json:
        return ok(await self.api.get(self.path()))

    async def patch(self, **fields: Any) -> Json:
        return ok(await self.api.patch(self.path(), fields))

    async def append(self, *items: Json) -> Json:
        return ok(await self.api.post(self.path("append_log/"), {"entries": list(items)}))

    async def cancel(self) -> Json:
        return ok(await self.api.patch(self.path(), {"status": "cancelled"}))

    async def command(self, method: str, **params: Any) -> Json:
        body = {"jsonrpc": "2.0", "id": 1, "method": method, "params": params}
        return ok(await self.api.post(self.path("command/"), body))

    async def log(self) -> list[Json]:
        response = await self.api.get(self.path("logs/"))
        assert response.status_code == 200, response.text
        return [json.loads(line) for line in response.text.splitlines()]

    async def status(self, *wanted: str) -> Json:
        """Wait until the run has one of the statuses."""
        return await eventually(
            self.fetch, lambda run: run["status"] in wanted, lambda run: f"status {wanted}, is {run}"
        )

    async def logged(self, text: str) -> list[Json]:
        """Wait until the log has the text."""
        return await eventually(
            self.log, lambda log: text in json.dumps(log), lambda log: f"{text!r} in the log {log[-5:]}"
        )

    async def turns(self, count: int) -> list[Json]:
        """Wait until so many turns have ended."""
        return await eventually(
            self.log,
            lambda log: len(of_method(log, "_posthog/turn_complete")) >= count,
            lambda log: f"{count} turns; the log ends {log[-3:]}",
        )

    async def shown(self, text: str) -> list[Json]:
        """Wait until what the agent says and does on the stream has the text; what it was asked does not count."""

        async def updates() -> list[Json]:
            events = [json.loads(line) for line in (await self.stream_text()).splitlines()]
            found = [
                event["notification"]["params"].get("update", {})
                for event in events
                if event.get("notification", {}).get("method") == "session/update"
            ]
            return [update for update in found if "user" not in str(update.get("sessionUpdate"))]

        return await eventually(
            updates, lambda found: text in json.dumps(found), lambda found: f"{text!r} in {found[-5:]}"
        )

    async def stream_text(self) -> str:
        """What is on the stream by now, as text: for waiting; the record itself is asked."""
        rows = await self.api.database.fetch(
            "SELECT data FROM events WHERE run_id = %(run)s ORDER BY seq", run=self.id
        )
        return "\n".join(row["data"] for row in rows)

    async def stream(self, last_event_id: str | None = None, **query: str) -> list[tuple[str, Json]]:
        """The whole stream until the server ends it: event ids and payloads, keepalives left out."""
        headers = {"Accept": "text/event-stream"}
        if last_event_id:
            headers["Last-Event-ID"] = last_event_id
        async with asyncio.timeout(DEADLINE_S):
            response = await self.api.get(self.path("stream/"), headers=headers, params=query)
        assert response.status_code == 200, response.text
        return parse_frames(response.text)


def parse_frames(text: str) -> list[tuple[str, Json]]:
    found = []
    for block in text.split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.splitlines())
        if "id" in fields:
            found.append((fields["id"], json.loads(fields["data"])))
    return found


def of_method(log: list[Json], method: str) -> list[Json]:
    """The params of the entries with this JSON-RPC method."""
    return [
        entry["notification"]["params"]
        for entry in log
        if entry.get("type") == "notification" and entry["notification"].get("method") == method
    ]


def updates(log: list[Json], kind: str) -> list[Json]:
    """The session updates of a kind."""
    found = [params["update"] for params in of_method(log, "session/update")]
    return [update for update in found if update["sessionUpdate"] == kind]


def said(log: list[Json]) -> str:
    """What the agent said, as the log has it."""
    return "\n".join(update["content"]["text"] for update in updates(log, "agent_message"))


@dataclass
class Yard:
    """A running server with two people of one project and one of another."""

    url: str
    settings: Settings
    database: Database
    client: httpx.AsyncClient
    keys: dict[str, str]
    project: int
    other_project: int
    users: dict[str, int] = field(default_factory=dict)

    def api(self, key: str | None = "ada", project: int | str | None = None) -> Api:
        return Api(self.client, self.database, project or self.project, self.keys[key] if key else None)


@asynccontextmanager
async def open_yard(settings: Settings, database: Database, *, worker: bool = False) -> AsyncIterator[Yard]:
    """The API on a free port, with a worker when asked for. `ada` is staff, `eve` is in the other project."""
    async with AsyncExitStack() as stack:
        users, keys = {}, {}
        for name in ("ada", "bob", "eve"):
            users[name] = (await admin.create_user(database, f"{name}@example.org"))["id"]
        project = (await admin.create_project(database, "Test Yard"))["id"]
        other = (await admin.create_project(database, "Other"))["id"]
        for name, member_of in (("ada", project), ("bob", project), ("eve", other)):
            await admin.add_member(database, f"{name}@example.org", member_of)
            keys[name] = (await admin.create_key(database, f"{name}@example.org", ["*"]))["key"]
        for scope in ("task:read", "task:write"):
            keys[scope] = (await admin.create_key(database, "ada@example.org", [scope]))["key"]
        if worker:
            stack.enter_context(_checked_once(settings))
            await stack.enter_async_context(workers.running_worker(settings, database))
        url = await stack.enter_async_context(listening(settings, database, "127.0.0.1", 0))
        client = httpx.AsyncClient(base_url=url, timeout=DEADLINE_S, trust_env=False)
        await stack.enter_async_context(client)
        yield Yard(url, settings, database, client, keys, project, other, users)


_checked: set[str] = set()


@contextmanager
def _checked_once(settings: Settings) -> Iterator[None]:
    """The first worker of a test process tries its sandboxes out; the others of the kind take that for granted."""
    if (kind := settings.sandbox.provider) in _checked:
        (settings.data_dir / "sandboxes").mkdir(mode=0o700, parents=True, exist_ok=True)
        with patch.object(workers, "checked_provider", AsyncMock(return_value=provider_for(settings))):
            yield
    else:
        yield
        _checked.add(kind)


def ok(response: httpx.Response, status: int = 200) -> Json:
    assert response.status_code == status, f"{response.request.url}: {response.status_code} {response.text}"
    return dict(response.json())


def error(response: httpx.Response, status: int, code: str, attr: str | None = None) -> Json:
    """A refusal in the envelope of the contract."""
    assert response.status_code == status, response.text
    body = response.json()
    assert set(body) == {"type", "code", "detail", "attr"}
    assert (body["code"], body["attr"]) == (code, attr), body
    return dict(body)


async def eventually(
    probe: Callable[[], Awaitable[T]], good: Callable[[T], bool], message: Callable[[T], str]
) -> T:
    """Call the probe until its value is good, for at most DEADLINE_S seconds."""
    end = asyncio.get_running_loop().time() + DEADLINE_S
    while True:
        value = await probe()
        if good(value):
            return value
        assert asyncio.get_running_loop().time() < end, f"after {DEADLINE_S} s no {message(value)}"
        await asyncio.sleep(0.03)
