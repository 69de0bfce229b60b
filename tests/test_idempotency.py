"""`Idempotency-Key`: a request sent twice is done once."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from taskyard import idempotency, json_schema
from taskyard.app import application
from taskyard.artifacts import store as artifacts
from taskyard.tasks import service
from tests.support.artifacts import item, named, send
from tests.support.browser import open_browser
from tests.support.yard import Api, Run, Yard, error, eventually, ok

UNKEYED = {
    # They answer a question.
    "/api/projects/{project_id}/tasks/summaries",
    "/api/projects/{project_id}/tasks/{task_id}/runs/{run_id}/artifacts/presign",
    "/api/projects/{project_id}/tasks/{task_id}/runs/{run_id}/artifacts/download",
    # It numbers its lines itself, and comes with a token of the run.
    "/api/projects/{project_id}/tasks/{task_id}/runs/{run_id}/event_stream",
    # Adding somebody twice is the same as once, and the answer may have a secret that must not be kept.
    "/api/projects/{project_id}/members",
    # Nothing is kept of it.
    "/api/projects/{project_id}/tasks/{task_id}/presence",
}
"""POSTs of a project that take no key. A new one belongs here or in `idempotency.KEYED`."""


async def create(api: Api, key: str | None, path: str = "tasks/", body: Any = None, **headers: str) -> Any:
    if key is not None:
        headers["Idempotency-Key"] = key
    return await api.post(path, {"title": "x"} if body is None else body, headers=headers)


async def count(yard: Yard, table: str = "tasks") -> int:
    (row,) = await yard.database.fetch("SELECT count(*) AS n FROM " + table)
    return int(row["n"])


def test_every_post_is_on_one_of_the_lists(yard: Yard) -> None:
    there = {
        (method, route.path_format)
        for route in application(yard.settings, yard.database).routes
        for handler in getattr(route, "route_handlers", [])
        for method in handler.http_methods
        if "{project_id}" in route.path_format
    }
    posts = {path for method, path in there if method == "POST"}
    assert there >= idempotency.KEYED
    assert posts - {path for _, path in idempotency.KEYED} == UNKEYED


async def test_the_same_request_gets_the_same_answer(yard: Yard) -> None:
    first = await create(yard.api(), "k1")
    assert ok(first, 201)["title"] == "x"
    assert "idempotent-replayed" not in first.headers
    again = await create(yard.api(), "k1")
    assert (again.status_code, again.content) == (201, first.content)
    assert again.headers["content-type"] == first.headers["content-type"]
    assert again.headers["idempotent-replayed"] == "true"
    assert await count(yard) == 1
    assert ok(await create(yard.api(), "k2"), 201)["id"] != first.json()["id"]
    assert ok(await create(yard.api(), None), 201)["id"] != first.json()["id"]
    assert await count(yard) == 3


async def test_another_request_is_refused(yard: Yard) -> None:
    task = ok(await create(yard.api(), "k"), 201)
    body = error(await create(yard.api(), "k", body={"title": "y"}), 422, "idempotency_key_reused")
    assert body == {
        "type": "invalid_request",
        "code": "idempotency_key_reused",
        "detail": "This Idempotency-Key was used for another request. Take a new key for a new request.",
        "attr": None,
    }
    error(
        await create(yard.api(), "k", f"tasks/{task['id']}/run/", {"title": "x"}),
        422,
        "idempotency_key_reused",
    )
    assert await count(yard) == 1
    assert await count(yard, "runs") == 0


async def test_concurrent_duplicates_wait_for_the_first(yard: Yard) -> None:
    """More than there are connections: they hold nothing that the first one needs."""
    answers = await asyncio.gather(*(create(yard.api(), "k") for _ in range(20)))
    assert {answer.status_code for answer in answers} == {201}
    assert len({answer.content for answer in answers}) == 1
    assert sum("idempotent-replayed" not in answer.headers for answer in answers) == 1
    assert await count(yard) == 1


async def test_runs_are_started_once(yard: Yard) -> None:
    task = await yard.api().create_task(title="x")
    path = f"tasks/{task['id']}/run/"
    answers = await asyncio.gather(*(create(yard.api(), "k", path, {}) for _ in range(4)))
    assert {ok(answer)["latest_run"]["id"] for answer in answers} == {answers[0].json()["latest_run"]["id"]}
    assert (await count(yard, "runs"), await count(yard, "run_queue")) == (1, 1)
    one = ok(await create(yard.api(), "r", f"tasks/{task['id']}/runs/", {}), 201)
    assert ok(await create(yard.api(), "r", f"tasks/{task['id']}/runs/", {}), 201) == one
    assert await count(yard, "runs") == 2


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("sandbox_environments/", {"name": "e"}),
        (
            "task_automations/",
            {"name": "a", "prompt": "p", "repository": "o/r", "cron_expression": "0 9 * * 1-5"},
        ),
        ("repositories/", {"origin": "https://git.example/o/r.git"}),
    ],
)
async def test_everything_that_creates(yard: Yard, path: str, body: dict[str, str]) -> None:
    first = await create(yard.api(), "k", path, body)
    assert first.status_code == 201, first.text
    again = await create(yard.api(), "k", path, body)
    assert (again.status_code, again.content) == (201, first.content)
    assert again.headers["idempotent-replayed"] == "true"


async def twice(run: Run, method: str, path: str, body: Any) -> Any:
    """The answer to a request that is sent twice with one key."""
    headers = {"Idempotency-Key": f"{method} {path}"}
    first = await run.api.request(method, path, json=body, headers=headers)
    assert first.status_code == 200, first.text
    again = await run.api.request(method, path, json=body, headers=headers)
    assert (again.status_code, again.content) == (200, first.content)
    assert again.headers["idempotent-replayed"] == "true"
    return first.json()


async def test_what_acts_on_a_run(yard: Yard) -> None:
    run = await yard.api().create_run(environment="cloud")
    await twice(run, "POST", run.path("append_log/"), {"entries": [{"n": 1}]})
    assert await run.log() == [{"n": 1}]
    await twice(run, "POST", run.path("relay_message/"), {"text": "x"})
    await twice(run, "PATCH", run.path("set_output/"), {"output": 1})
    assert (await twice(run, "POST", run.path("start/"), {}))["latest_run"]["id"] == run.id
    assert await count(yard, "run_queue") == 1
    message = {"jsonrpc": "2.0", "method": "user_message", "params": {"content": "hello"}, "id": 7}
    assert (await twice(run, "POST", run.path("command/"), message))["result"] == {"queued": True}
    assert await count(yard, "commands") == 1
    await twice(run, "POST", run.path("command"), message | {"method": "steer"})
    assert await count(yard, "commands") == 3, "the message, and the order to stop the turn"
    await run.cancel()
    await twice(run, "POST", run.path("resume_in_cloud/"), None)


async def test_a_command_that_the_agent_answers_takes_no_key(yard: Yard) -> None:
    """It waits for another process, so it must be committed before."""
    run = await yard.api().create_run(environment="cloud")
    bodies: list[Any] = [{"jsonrpc": "2.0", "method": "cancel"}, [], {"method": 1}]
    for body in bodies:
        headers = {"Idempotency-Key": "k"}
        response = await run.api.post(run.path("command/"), body, headers=headers)
        assert response.status_code == 400
    assert await count(yard, "idempotency_keys") == 0


async def test_uploads(yard: Yard) -> None:
    run = await yard.api().create_run()
    inline = {"artifacts": [{"name": "a.txt", "type": "output", "content": "x" * 12_000_000}]}
    made = await twice(run, "POST", run.path("artifacts/"), inline)
    assert [entry["size"] for entry in made["artifacts"]] == [12_000_000]
    for path in (run.path("artifacts/"), f"tasks/{run.task_id}/staged_artifacts/"):
        announced = {"artifacts": [item()]}
        entry = (await twice(run, "POST", path + "prepare_upload/", announced))["artifacts"][0]
        await send(run.api, entry)
        await twice(run, "POST", path + "finalize_upload/", {"artifacts": [named(entry)]})
    assert [entry["name"] for entry in (await run.fetch())["artifacts"]] == ["a.txt", "notes.txt"]


async def test_keyed_uploads_do_not_take_all_connections(yard: Yard) -> None:
    """Each needs a second connection for a moment; the pool has six."""
    run = await yard.api().create_run()

    async def one(n: int) -> Any:
        body = {"artifacts": [{"name": f"{n}.txt", "type": "output", "content": "x"}]}
        return await run.api.post(run.path("artifacts/"), body, headers={"Idempotency-Key": f"k{n // 2}"})

    async with asyncio.timeout(25):  # less than a connection is waited for
        answers = await asyncio.gather(*map(one, range(0, 40, 2)), *map(one, range(0, 40, 2)))
    assert {answer.status_code for answer in answers} == {200}, {answer.text for answer in answers}
    assert len((await run.fetch())["artifacts"]) == 20


async def test_an_upload_that_fails_is_known_to_retention(
    yard: Yard, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its object may be stored already, so its key stays written down, whatever becomes of the request."""
    run = await yard.api().create_run()

    async def broken(*_: Any) -> Any:
        raise RuntimeError("it broke")

    monkeypatch.setattr(artifacts, "add", broken)
    body = {"artifacts": [{"name": "a.txt", "type": "output", "content": "x"}]}
    response = await run.api.post(run.path("artifacts/"), body, headers={"Idempotency-Key": "k"})
    assert response.status_code == 500
    assert (await count(yard, "idempotency_keys"), await count(yard, "stored_objects")) == (0, 1)


async def test_keys_belong_to_a_user_in_a_project(yard: Yard) -> None:
    ids = {
        ok(await create(api, "k"), 201)["id"]
        for api in (yard.api(), yard.api("bob"), yard.api("eve", yard.other_project))
    }
    assert len(ids) == 3
    same_user = await create(yard.api("task:write"), "k")
    assert same_user.json()["id"] in ids
    assert same_user.headers["idempotent-replayed"] == "true"


async def test_no_replay_without_permission(yard: Yard) -> None:
    await create(yard.api(), "k")
    error(await create(yard.api("task:read"), "k"), 403, "permission_denied")
    error(await create(yard.api(None), "k"), 401, "not_authenticated")
    error(await create(yard.api("eve"), "k"), 403, "permission_denied")


async def test_a_session_needs_its_csrf_token(yard: Yard) -> None:
    async with open_browser(yard, "ada") as browser:
        headers = {"Idempotency-Key": "k"}
        response = await browser.client.post("/api/projects/@current/tasks/", json={}, headers=headers)
        error(response, 403, "permission_denied")


async def test_refusals_are_remembered(yard: Yard) -> None:
    wrong = {"title": "x" * 256}
    first = await create(yard.api(), "k", body=wrong)
    error(first, 400, "max_length", "title")
    again = await create(yard.api(), "k", body=wrong)
    assert (again.status_code, again.content) == (400, first.content)
    assert again.headers["idempotent-replayed"] == "true"
    missing = "tasks/00000000-0000-4000-8000-000000000000/run/"
    error(await create(yard.api(), "m", missing, {}), 404, "not_found")
    assert (await create(yard.api(), "m", missing, {})).headers["idempotent-replayed"] == "true"


async def test_a_failure_is_forgotten_with_what_it_did(yard: Yard, monkeypatch: pytest.MonkeyPatch) -> None:
    """The task was written before the failure: it goes, and the retry makes it."""
    real = service.create

    async def broken(*args: Any) -> Any:
        await real(*args)
        raise RuntimeError("the disk is full")

    monkeypatch.setattr(service, "create", broken)
    assert (await create(yard.api(), "k")).status_code == 500
    assert (await count(yard), await count(yard, "idempotency_keys")) == (0, 0)
    monkeypatch.setattr(service, "create", real)
    retried = await create(yard.api(), "k")
    assert retried.status_code == 201
    assert "idempotent-replayed" not in retried.headers


async def test_a_waiting_duplicate_takes_over_after_a_failure(
    yard: Yard, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, started, go_on = service.create, asyncio.Event(), asyncio.Event()

    async def first_fails(*args: Any) -> Any:
        if not started.is_set():
            started.set()
            await go_on.wait()
            raise RuntimeError("it broke")
        return await real(*args)

    monkeypatch.setattr(service, "create", first_fails)
    first = asyncio.create_task(create(yard.api(), "k"))
    await started.wait()
    second = asyncio.create_task(create(yard.api(), "k"))
    await eventually(
        lambda: yard.database.fetch(
            "SELECT query FROM pg_stat_activity"
            " WHERE datname = current_database() AND wait_event_type = 'Lock'"
        ),
        lambda waiting: len(waiting) == 1,
        lambda waiting: f"request that waits: {waiting}",
    )
    go_on.set()
    assert (await first).status_code == 500
    assert (await second).status_code == 201
    assert await count(yard) == 1


async def test_after_a_day_a_key_is_new(yard: Yard) -> None:
    first = ok(await create(yard.api(), "k"), 201)
    await yard.database.execute("UPDATE idempotency_keys SET created_at = now() - interval '25 hours'")
    assert ok(await create(yard.api(), "k", body={"title": "y"}), 201)["id"] != first["id"]


async def test_old_keys_go(yard: Yard) -> None:
    for n in range(3):
        await create(yard.api(), f"old {n}")
    await yard.database.execute("UPDATE idempotency_keys SET created_at = now() - interval '25 hours'")
    await create(yard.api(), "new")
    assert await count(yard, "idempotency_keys") == 1


@pytest.mark.parametrize("key", ["", "x" * 256, "caf\xe9", "a\tb"])
async def test_refused_keys(yard: Yard, key: str) -> None:
    headers = [
        (b"Authorization", f"Bearer {yard.keys['ada']}".encode()),
        (b"Idempotency-Key", key.encode("latin-1")),
    ]
    response = await yard.client.post(f"/api/projects/{yard.project}/tasks/", json={}, headers=headers)
    error(response, 400, "invalid_input", "Idempotency-Key")


async def test_a_key_elsewhere_changes_nothing(yard: Yard) -> None:
    headers = {"Idempotency-Key": "k"}
    assert (await yard.api().get("tasks/", headers=headers)).status_code == 200
    for _ in range(2):
        made = await yard.api().post("/api/code/invites/redeem/", {"code": "c"}, headers=headers)
        assert "idempotent-replayed" not in made.headers
    assert await count(yard, "idempotency_keys") == 0


async def test_with_and_without_a_slash_it_is_one_request(yard: Yard) -> None:
    first = ok(await create(yard.api(), "k", "tasks/"), 201)
    assert ok(await create(yard.api(), "k", "tasks"), 201)["id"] == first["id"]


async def test_slow_checks_of_schemas_do_not_take_all_connections(yard: Yard) -> None:
    """Of outputs, and of large schemas in new tasks; the pool has six."""
    run = await yard.api().create_run(await yard.api().create_task(json_schema={"pattern": "^a*$"}))
    schema = {"anyOf": [{"title": "x" * json_schema.SMALL}]}

    async def one(n: int) -> Any:
        headers = {"Idempotency-Key": f"k{n}"}
        if n % 2:
            return await run.api.post("tasks/", {"json_schema": schema}, headers=headers)
        body = {"output": "aaa"}
        return await run.api.request("PATCH", run.path("set_output/"), json=body, headers=headers)

    at_once: list[int] = []
    slow = asyncio.create_task(asyncio.wait({asyncio.create_task(one(n)) for n in range(16)}))
    while not slow.done():
        rows = await yard.database.fetch(
            "SELECT count(*) AS n FROM pg_stat_activity WHERE datname = current_database()"
            " AND state = 'idle in transaction'"
        )
        at_once.append(rows[0]["n"])
    done, _ = await slow
    assert sorted(task.result().status_code for task in done) == [200] * 8 + [201] * 8
    assert 0 < max(at_once) <= idempotency.SLOW_AT_ONCE
