"""`POST R/command/` without a worker: what is refused, what waits (tasks-api §6.6)."""

from __future__ import annotations

import asyncio

import pytest

from tests.support.yard import Yard, error, eventually, ok

MESSAGE = "user_message requires a non-empty content string, artifact_ids, or both"


@pytest.mark.parametrize(
    ("body", "code", "attr", "detail"),
    [
        ({"method": "cancel"}, "required", "jsonrpc", "This field is required."),
        ({"jsonrpc": "1.0", "method": "cancel"}, "invalid_choice", "jsonrpc", '"1.0" is not a valid choice.'),
        ({"jsonrpc": "2.0"}, "required", "method", "This field is required."),
        ({"jsonrpc": "2.0", "method": "_posthog/cancel"}, "invalid_choice", "method", None),
        ({"jsonrpc": "2.0", "method": "cancel", "params": []}, "not_a_dict", "params", None),
        ({"jsonrpc": "2.0", "method": "cancel", "id": True}, "invalid_input", "id", "id must be a string or number"),
        ({"jsonrpc": "2.0", "method": "user_message"}, "invalid_input", "params", MESSAGE),
        ({"jsonrpc": "2.0", "method": "user_message", "params": {"content": " "}}, "invalid_input", "params", MESSAGE),
        ({"jsonrpc": "2.0", "method": "user_message", "params": {"content": 1}}, "invalid_input", "params",
         "content must be a string when provided"),
        ({"jsonrpc": "2.0", "method": "user_message", "params": {"artifact_ids": [""]}}, "invalid_input", "params",
         "artifact_ids must be a list of non-empty strings"),
        ({"jsonrpc": "2.0", "method": "permission_response", "params": {"optionId": "x"}}, "invalid_input", "params",
         "requestId is required and must be a non-empty string"),
        ({"jsonrpc": "2.0", "method": "set_config_option", "params": {"configId": "x"}}, "invalid_input", "params",
         "value is required and must be a non-empty string"),
    ],
)  # fmt: skip
async def test_bad_commands(
    yard: Yard, body: dict[str, object], code: str, attr: str, detail: str | None
) -> None:
    run = await yard.api().start()
    refused = error(await yard.api().post(run.path("command/"), body), 400, code, attr)
    if detail is not None:
        assert refused["detail"] == detail


@pytest.mark.parametrize("number", [0, 7, "seven", None])
async def test_a_message_to_a_queued_run_waits(yard: Yard, number: int | str | None) -> None:
    run = await yard.api().start()
    body = {"jsonrpc": "2.0", "method": "user_message", "params": {"content": " hello "}, "id": number}
    answer = ok(await yard.api().post(run.path("command/"), body))
    expected = {"jsonrpc": "2.0", "result": {"queued": True}}
    assert answer == (expected if number is None else expected | {"id": number})
    [row] = await yard.database.fetch("SELECT seq, method, params, delivered_at FROM commands")
    assert (row["seq"], row["method"], row["params"]["content"]) == (1, "user_message", "hello")
    assert row["delivered_at"] is None


async def test_no_agent_to_talk_to(yard: Yard) -> None:
    run = await yard.api().start()
    await run.cancel()
    body = {"jsonrpc": "2.0", "method": "cancel"}
    response = await yard.api().post(run.path("command/"), body)
    assert (response.status_code, response.json()) == (400, {"error": "No active sandbox for this task run"})


async def test_unknown_artifacts(yard: Yard) -> None:
    run = await yard.api().start()
    body = {
        "jsonrpc": "2.0",
        "method": "user_message",
        "params": {"content": "x", "artifact_ids": ["0" * 32]},
    }
    response = await yard.api().post(run.path("command/"), body)
    assert (response.status_code, response.json()) == (
        400,
        {"error": "Some artifact_ids are invalid for this run", "missing_artifact_ids": ["0" * 32]},
    )
    assert await yard.database.fetch("SELECT 1 FROM commands") == []


@pytest.mark.parametrize("ids", [5, [["x"]], ["0" * 32]])
async def test_artifacts_are_for_messages_only(yard: Yard, ids: object) -> None:
    """Beside other commands they mean nothing, as everything else that stands there."""
    run = await yard.api().create_run(environment="cloud")
    body = {"jsonrpc": "2.0", "method": "cancel", "params": {"artifact_ids": ids}}
    response = await yard.api().post(run.path("command/"), body)
    assert (response.status_code, response.json()) == (400, {"error": "No active sandbox for this task run"})


async def test_a_message_carries_nothing_but_its_text_and_artifacts_of_the_run(yard: Yard) -> None:
    """What stands beside them is trusted by the driver: paths of objects, and what comes first."""
    run = await yard.api().start()
    item = {"name": "a.txt", "type": "user_attachment", "content": "hello"}
    [entry] = ok(await run.api.post(run.path("artifacts/"), {"artifacts": [item]}))["artifacts"]
    foreign = {"id": "x", "name": "x", "storage_path": "tasks/artifacts/team_2/secret"}
    await run.command("user_message", content="one", artifacts=[foreign], steer=True)
    await run.command("user_message", artifact_ids=[entry["id"]], artifacts=7)
    rows = await yard.database.fetch("SELECT params FROM commands ORDER BY seq")
    assert [row["params"] for row in rows] == [{"content": "one"}, {"content": "", "artifacts": [entry]}]


async def test_a_steering_message_interrupts_and_comes_first(yard: Yard) -> None:
    run = await yard.api().start()
    await run.command("user_message", content="later")
    assert (await run.command("steer", content=" now "))["result"] == {"queued": True}
    rows = await yard.database.fetch("SELECT method, params FROM commands ORDER BY seq")
    assert [(row["method"], row["params"]) for row in rows] == [
        ("user_message", {"content": "later"}),
        ("user_message", {"content": "now", "steer": True}),
        ("cancel", {}),
    ]
    refused = error(await yard.api().post(run.path("command/"), {"jsonrpc": "2.0", "method": "steer"}), 400,
                    "invalid_input", "params")  # fmt: skip
    assert refused["detail"] == MESSAGE.replace("user_message", "steer")


async def test_runs_that_nobody_drives_take_no_commands(yard: Yard) -> None:
    api = yard.api()
    for run in (await api.create_run(), await api.create_run(environment="cloud")):
        for method, params in (("cancel", {}), ("user_message", {"content": "x"}), ("close", {})):
            response = await api.post(
                run.path("command/"), {"jsonrpc": "2.0", "method": method, "params": params}
            )
            assert (response.status_code, response.json()) == (
                400, {"error": "No active sandbox for this task run"},
            )  # fmt: skip
    assert await yard.database.fetch("SELECT 1 FROM commands") == []


async def test_a_run_that_was_ended_and_revived_by_a_client_has_no_agent(yard: Yard) -> None:
    run = await yard.api().start()
    await run.cancel()
    await run.patch(status="in_progress")
    response = await yard.api().post(run.path("command/"), {"jsonrpc": "2.0", "method": "cancel"})
    assert response.status_code == 400


async def test_a_queued_run_has_no_agent_that_could_be_told_something(yard: Yard) -> None:
    """A message is for its beginning; for everything else nobody is there, so nobody waits for an answer."""
    run = await yard.api().start()
    for method in ("cancel", "close"):
        response = await yard.api().post(run.path("command/"), {"jsonrpc": "2.0", "method": method})
        assert (response.status_code, response.json()) == (
            400,
            {"error": "No active sandbox for this task run"},
        )
    assert await yard.database.fetch("SELECT 1 FROM commands") == []


async def test_the_end_of_the_run_ends_the_wait(yard: Yard) -> None:
    run = await yard.api().start()
    await run.patch(status="in_progress")
    waiting = asyncio.ensure_future(
        yard.api().post(run.path("command/"), {"jsonrpc": "2.0", "method": "cancel"})
    )

    async def queued() -> int:
        return len(await yard.database.fetch("SELECT 1 FROM commands"))

    await eventually(queued, lambda count: count == 1, lambda _: "command in the mailbox")
    await run.cancel()
    response = await waiting
    assert (response.status_code, response.json()) == (502, {"error": "Agent server is not reachable"})


async def test_other_keys(yard: Yard) -> None:
    run = await yard.api().start()
    body = {"jsonrpc": "2.0", "method": "user_message", "params": {"content": "x"}}
    path = run.path("command/")
    error(await yard.api("eve", yard.other_project).post(path, body), 404, "not_found")
    error(await yard.api("task:read").post(path, body), 403, "permission_denied")
    error(await yard.api(None).post(path, body), 401, "not_authenticated")
    error(await yard.api().post(path.replace(run.id, run.task_id), body), 404, "not_found")
