"""Requests, answers and errors of both clients."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import httpx
import pytest

from taskyard.client import AsyncTaskyard, ClientError, Taskyard, UnreachableError
from tests.support.tasks_server import (
    RUN,
    RUN_PATH,
    TASK,
    Seen,
    StandIn,
    bearer,
    run_json,
    task_json,
    tasks_server,
)


@pytest.fixture
def server() -> Iterator[StandIn]:
    with tasks_server() as stand_in:
        yield stand_in


class Blocked:
    """Calls a method of the asynchronous client as if it were the blocking one."""

    def __init__(self, url: str) -> None:
        self.url = url

    def __getattr__(self, name: str) -> Any:
        def call(*words: Any, **options: Any) -> Any:
            async def go() -> Any:
                async with AsyncTaskyard(self.url, "key") as yard:
                    result = getattr(yard, name)(*words, **options)
                    if hasattr(result, "__aiter__"):
                        return [item async for item in result]
                    return await result

            return asyncio.run(go())

        return call


@pytest.fixture(params=["blocking", "async"])
def yard(request: pytest.FixtureRequest, server: StandIn) -> Iterator[Any]:
    if request.param == "async":
        yield Blocked(server.url)
        return
    with Taskyard(server.url, "key") as client:
        yield client


def test_create_task(server: StandIn, yard: Any) -> None:
    server.answers["POST", "tasks/"] = lambda _: (201, task_json(unknown={"x": 1}, created_by={"id": 7}))
    task = yard.create_task(
        description="Do it", repository="acme/shop", json_schema={"type": "object"}, internal=True
    )
    assert (task.id, task.slug, task.latest_run, task.created_by.id) == (TASK, "DEF-0", None, 7)
    (request,) = server.seen
    assert request.body == {
        "title": "",
        "description": "Do it",
        "origin_product": "user_created",
        "repository": "acme/shop",
        "json_schema": {"type": "object"},
        "internal": True,
    }
    assert bearer(request) == "key"
    assert request.headers["user-agent"].startswith("taskyard-client/")


def test_run_task_sends_only_what_is_given(server: StandIn, yard: Any) -> None:
    server.answers["POST", f"tasks/{TASK}/run/"] = lambda _: (200, task_json(latest_run=run_json("queued")))
    task = yard.run_task(TASK, branch=None, runtime_adapter="claude", model="m")
    assert task.latest_run.status == "queued"
    assert not task.latest_run.is_terminal
    assert server.seen[0].body == {"runtime_adapter": "claude", "model": "m"}


def test_get_and_update_run(server: StandIn, yard: Any) -> None:
    server.run("completed", completed_at="2026-11-25T10:00:00.250000Z", output={"head_branch": "b"})
    run = yard.get_run(TASK, RUN)
    assert run.is_terminal
    assert run.completed_at == datetime(2026, 11, 25, 10, 0, 0, 250000, UTC)
    server.answers["PATCH", RUN_PATH] = lambda request: (200, run_json(request.body.get("status", "queued")))
    assert yard.cancel(TASK, RUN).status == "cancelled"
    yard.update_run(TASK, RUN, branch=None, output={"a": 1})
    assert [request.body for request in server.seen[1:]] == [
        {"status": "cancelled"},
        {"branch": None, "output": {"a": 1}},
    ]


def test_list_tasks_reads_all_pages_from_its_own_address(server: StandIn, yard: Any) -> None:
    def page(request: Seen) -> tuple[int, Any]:
        offset = int(request.query["offset"])
        results = [task_json(task_number=number) for number in range(offset, min(offset + 100, 230))]
        # As behind a proxy: the server's idea of its own address leads elsewhere.
        return 200, {"count": 230, "next": "http://192.0.2.1/" if offset < 200 else None, "results": results}

    server.answers["GET", "tasks/"] = page
    numbers = [task.task_number for task in yard.list_tasks(status="failed", internal=True, search=None)]
    assert numbers == list(range(230))
    assert [request.query for request in server.seen] == [
        {"status": "failed", "internal": "true", "limit": "100", "offset": str(offset)}
        for offset in (0, 100, 200)
    ]


def test_user_message_and_command(server: StandIn, yard: Any) -> None:
    path = f"{RUN_PATH}command/"
    server.answers["POST", path] = lambda _: (200, {"jsonrpc": "2.0", "id": "1", "result": {"queued": True}})
    assert yard.user_message(TASK, RUN, "more", artifact_ids=["a"]) == {"queued": True}
    yard.command(TASK, RUN, "cancel")
    assert [request.body for request in server.seen] == [
        {
            "jsonrpc": "2.0",
            "id": "1",
            "method": "user_message",
            "params": {"content": "more", "artifact_ids": ["a"]},
        },
        {"jsonrpc": "2.0", "id": "1", "method": "cancel"},
    ]
    server.answers["POST", path] = lambda _: (
        200,
        {"id": "1", "error": {"code": -32000, "message": "no turn runs"}},
    )
    with pytest.raises(ClientError, match=r"^no turn runs$") as caught:
        yard.command(TASK, RUN, "cancel")
    assert caught.value.code == "-32000"


@pytest.mark.parametrize("method", ["get_run", "user_message"])
def test_a_connection_is_never_waited_for_as_long_as_an_answer(method: str) -> None:
    limits: list[dict[str, float]] = []

    def answer(request: httpx.Request) -> httpx.Response:
        limits.append(request.extensions["timeout"])
        raise httpx.ConnectTimeout("")

    with (
        Taskyard("http://127.0.0.1:1", "key", transport=httpx.MockTransport(answer)) as yard,
        pytest.raises(UnreachableError, match="no connection within the time limit"),
    ):
        getattr(yard, method)(TASK, RUN)
    assert [limit["connect"] for limit in limits] == [10.0]


def test_logs_skip_what_is_no_entry(server: StandIn, yard: Any) -> None:
    deep = '{"type": ' + "[" * 100_000 + "]" * 100_000 + "}"
    text = '{"type": "a", "x": "\u2028"}\nnot json\n\n[1]\n' + deep + '\n{"type": "b"}'
    server.answers["GET", f"{RUN_PATH}logs/"] = lambda _: (200, text.encode())
    events = list(yard.logs(TASK, RUN))
    assert [(event.type, event.id) for event in events] == [("a", None), ("b", None)]
    assert events[0].raw == '{"type": "a", "x": "\u2028"}'


def test_register_repository(server: StandIn, yard: Any) -> None:
    server.answers["POST", "repositories/"] = lambda r: (
        201,
        {"name": "local/shop", "origin": r.body["origin"]},
    )
    assert yard.register_repository("/srv/shop").name == "local/shop"
    yard.register_repository("https://example.org/a/b.git", "a/b")
    assert [request.body for request in server.seen] == [
        {"origin": "/srv/shop"},
        {"origin": "https://example.org/a/b.git", "name": "a/b"},
    ]


@pytest.mark.parametrize(
    ("status", "body", "code", "text"),
    [
        (400, {"type": "validation_error", "code": "required", "detail": "This field is required.", "attr": "model"},
         "required", "model: This field is required."),
        (400, {"error": "No active sandbox for this task run"}, "error", "No active sandbox for this task run"),
        (400, {"detail": "Some ids are invalid", "missing_artifact_ids": ["x", "y"]}, "error",
         "Some ids are invalid: x, y"),
        (401, {"code": "authentication_failed", "detail": "Invalid API key", "attr": None}, "authentication_failed",
         "Invalid API key"),
        (502, b"<html>Bad gateway</html>", "error", "the server answered 502 Bad Gateway without an explanation"),
        (500, b"", "error", "the server answered 500 Internal Server Error without an explanation"),
        (200, b"<html>", "unexpected_answer", "not of the Tasks API"),
        (200, {"hello": 1}, "unexpected_answer", "not of the Tasks API"),
        (302, b"", "redirect", "use that address"),
    ],
)  # fmt: skip
def test_errors_read_well(server: StandIn, yard: Any, status: int, body: Any, code: str, text: str) -> None:
    server.answers["GET", f"tasks/{TASK}/"] = lambda _: (status, body)
    with pytest.raises(ClientError) as caught:
        yard.get_task(TASK)
    assert (caught.value.status, caught.value.code) == (status, code)
    assert text in str(caught.value)


def test_log_of_a_missing_run(yard: Any) -> None:
    with pytest.raises(ClientError, match=rf"^Not found: /api/projects/@current/{RUN_PATH}logs/$"):
        list(yard.logs(TASK, RUN))


def test_nobody_listens(unused_tcp_port: int) -> None:
    url = f"http://127.0.0.1:{unused_tcp_port}"
    with Taskyard(url, "key") as yard, pytest.raises(UnreachableError) as caught:
        yard.get_task(TASK)
    assert str(caught.value) == f"cannot reach the server at {url}: connection refused"


def test_an_id_cannot_leave_its_place_in_the_path(server: StandIn) -> None:
    with Taskyard(server.url, "key") as yard, pytest.raises(ClientError, match="Not found"):
        yard.get_task("../../../users/@me?x=")
    assert server.seen[0].path == "/api/projects/@current/tasks/..%2F..%2F..%2Fusers%2F%40me%3Fx%3D/"


def test_environment_and_what_is_missing(monkeypatch: pytest.MonkeyPatch, server: StandIn) -> None:
    monkeypatch.delenv("TASKYARD_API_KEY", raising=False)
    monkeypatch.delenv("TASKYARD_URL", raising=False)
    with pytest.raises(ClientError, match="set TASKYARD_URL"):
        Taskyard()
    monkeypatch.setenv("TASKYARD_URL", server.url + "/")
    with pytest.raises(ClientError, match="set TASKYARD_API_KEY"):
        Taskyard()
    monkeypatch.setenv("TASKYARD_API_KEY", "from-env\n")
    # A proxy for the outside is not asked for the server on this machine.
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    server.answers["GET", f"tasks/{TASK}/"] = lambda _: (200, task_json())
    with Taskyard() as yard:
        yard.get_task(TASK)
        assert "from-env" not in repr(yard.endpoint)
    assert bearer(server.seen[0]) == "from-env"


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://example.org", "nonsense"])
def test_urls_that_are_none(url: str) -> None:
    with pytest.raises(ClientError, match="is not the URL of a server"), Taskyard(url, "key") as yard:
        yard.get_task(TASK)


def test_imports_nothing_of_the_server() -> None:
    program = (
        "import sys, taskyard.client\n"
        "print(*sorted(name for name in sys.modules if name.startswith('taskyard.')), 'pydantic' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    *modules, pydantic = done.stdout.split()
    assert pydantic == "False"
    assert [name for name in modules if not name.startswith("taskyard.client")] == []
