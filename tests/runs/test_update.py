"""`PATCH R/` and `PATCH R/set_output/` (tasks-api §5.4, §5.5)."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest

from tests.support.yard import Json, Run, Yard, error, ok

SCHEMA = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}


async def set_output(run: Run, output: Any) -> Json:
    return ok(await run.api.patch(run.path("set_output/"), {"output": output}))


async def test_fields_are_replaced(yard: Yard) -> None:
    run = await yard.api().create_run()
    sent = {"status": "in_progress", "stage": " build ", "branch": "b", "error_message": ""}
    body = await run.patch(**sent)
    assert {name: body[name] for name in sent} == sent | {"stage": "build"}
    body = await run.patch(stage=None, branch=None, error_message=None)
    assert (body["stage"], body["branch"], body["error_message"], body["status"]) == (
        None,
        None,
        None,
        "in_progress",
    )


async def test_each_patch_is_one_event(yard: Yard) -> None:
    run = await yard.api().create_run()
    await run.patch()
    body = await run.patch(status="failed", error_message="oops", output={"a": 1}, stage="s", branch="b")
    (_, first), (_, empty), (_, last) = await run.stream()
    assert (first["status"], empty["status"]) == ("queued", "queued")
    keys = ("status", "stage", "output", "branch", "error_message", "updated_at", "completed_at")
    assert {key: last[key] for key in keys} == {key: body[key] for key in keys}
    assert first["updated_at"] < empty["updated_at"] < last["updated_at"]


@pytest.mark.parametrize(
    ("before", "sent", "after"),
    [
        (None, {"a": 1}, {"a": 1}),
        ({"a": 1, "d": {"x": 1}}, {"b": 2, "d": {"y": 1}}, {"a": 1, "b": 2, "d": {"y": 1}}),
        ({"a": 1}, {}, {"a": 1}),
        (None, {}, {}),
        ({"a": 1}, [1], [1]),
        ([1], {"a": 1}, {"a": 1}),
        ({"a": 1}, None, None),
        ({"a": 1}, "text", "text"),
        (5, False, False),
        ({"big": 10**30}, {"float": 0.1}, {"big": 10**30, "float": 0.1}),
    ],
)
async def test_output_merges(yard: Yard, before: Any, sent: Any, after: Any) -> None:
    run = await yard.api().create_run()
    await run.patch(output=before)
    assert (await run.patch(output=sent))["output"] == after
    assert (await run.fetch())["output"] == after


async def test_state_merges_after_the_removal(yard: Yard) -> None:
    run = await yard.api().create_run()
    await run.patch(state={"one": 1, "two": 2, "three": {"x": 1}})
    body = await run.patch(state={"two": "new", "four": 4}, state_remove_keys=["one", "two", "unknown"])
    assert body["state"] == {"mode": "background", "two": "new", "three": {"x": 1}, "four": 4}


async def test_state_that_is_no_object(yard: Yard) -> None:
    run = await yard.api().create_run()
    body = await run.patch(state=[1])
    assert (body["state"], body["model"]) == ([1], None)
    assert ok(await run.api.get(f"tasks/{run.task_id}/"))["latest_run"]["state"] == [1]
    assert (await run.patch(state_remove_keys=["mode"]))["state"] == [1]
    assert (await run.patch(state={"a": 1}))["state"] == {"a": 1}


async def test_protected_keys_are_ignored(yard: Yard) -> None:
    run = await yard.api().create_run(pr_authorship_mode="bot")
    sent = {
        "pr_authorship_mode": "user", "github_credential_source": "x", "sandbox_id": "x", "sandbox_url": "http://x",
        "sandbox_environment_id": "x", "snapshot_external_id": "x", "inactivity_timeout_seconds": 1,
        "wizard_mode": 1, "use_modal_vm": True, "mine": 1,
    }  # fmt: skip
    kept = {"mode": "background", "pr_authorship_mode": "bot", "mine": 1}
    assert (await run.patch(state=sent))["state"] == kept
    assert (await run.patch(state_remove_keys=["pr_authorship_mode"]))["state"] == kept
    assert (await run.patch(state="gone"))["state"] == {"pr_authorship_mode": "bot"}


@pytest.mark.parametrize(
    ("body", "code", "attr"),
    [
        ({"status": "lost"}, "invalid_choice", "status"),
        ({"stage": "s" * 101}, "max_length", "stage"),
        ({"branch": "b" * 256}, "max_length", "branch"),
        ({"branch": " "}, "blank", "branch"),
        ({"environment": "cloud"}, "invalid_choice", "environment"),
        ({"environment": None}, "null", "environment"),
        ({"state": None}, "null", "state"),
        ({"state_remove_keys": []}, "empty", "state_remove_keys"),
        ({"state_remove_keys": "x"}, "not_a_list", "state_remove_keys"),
        ({"state_remove_keys": [None]}, "null", "state_remove_keys__0"),
        ({"output": {"text": "a\0b"}}, "null_characters_not_allowed", "output__text"),
    ],
)
async def test_bad_patches(yard: Yard, body: Json, code: str, attr: str) -> None:
    run = await yard.api().create_run()
    error(await run.api.patch(run.path(), body), 400, code, attr)


@pytest.mark.parametrize(
    "raw", [b'{"output": NaN}', b'{"output": "\xed\xa0\xbd"}', b"{", b'{"output": ' + b"[" * 9000]
)
async def test_what_is_not_json(yard: Yard, raw: bytes) -> None:
    run = await yard.api().create_run()
    response = await run.api.request(
        "PATCH", run.path(), content=raw, headers={"Content-Type": "application/json"}
    )
    error(response, 400, "parse_error")


async def test_half_a_surrogate_pair(yard: Yard) -> None:
    run = await yard.api().create_run()
    response = await run.api.request(
        "PATCH", run.path(), content=b'{"output": ["\\ud83d"]}', headers={"Content-Type": "application/json"}
    )
    error(response, 400, "invalid_input", "output__0")
    assert (await run.patch(output="\U0001f600"))["output"] == "\U0001f600"


async def test_completed_at_is_set_once(yard: Yard) -> None:
    run = await yard.api().create_run()
    ended = (await run.patch(status="completed"))["completed_at"]
    assert ended
    for status in ("in_progress", "failed", "cancelled"):
        assert (await run.patch(status=status))["completed_at"] == ended


async def test_a_run_driven_from_outside(yard: Yard) -> None:
    """A local client does everything by these calls, and the stream ends with the run."""
    run = await yard.api().create_run()
    await run.patch(status="in_progress")
    streaming = asyncio.ensure_future(run.stream())
    await run.append({"type": "notification", "n": 1})
    await run.patch(branch="work", output={"head_branch": "work"})
    await run.patch(status="completed")
    events = [event for _, event in await streaming]
    assert [event["status"] for event in events] == ["queued", "in_progress", "in_progress", "completed"]
    assert await run.log() == [{"type": "notification", "n": 1}]


async def test_everything_at_once_loses_nothing(yard: Yard) -> None:
    """Merges, appends, replacements: each keeps its part, and none waits for another for ever."""
    api = yard.api()
    task = await api.create_task(json_schema={"type": "object"})
    run = await api.create_run(task)
    number = 50

    async def append(n: int) -> None:
        await run.append({"n": n})

    await asyncio.gather(
        *(run.patch(state={f"s{n}": n}) for n in range(number)),
        *(run.patch(output={f"o{n}": n}) for n in range(number)),
        *(run.patch(state_remove_keys=[f"r{n}"], state={f"t{n}": n}) for n in range(number)),
        *(append(n) for n in range(number)),
    )
    body = await run.fetch()
    assert {key: body["state"][key] for key in body["state"] if key != "mode"} == {
        f"{letter}{n}": n for letter in "st" for n in range(number)
    }
    assert body["output"] == {f"o{n}": n for n in range(number)}
    assert sorted(entry["n"] for entry in await run.log()) == list(range(number))
    answers = await asyncio.gather(
        *(set_output(run, {"whole": n}) for n in range(number)),
        *(run.patch(state={f"u{n}": n}) for n in range(number)),
        *(append(n) for n in range(number)),
    )
    assert len(answers) == 3 * number
    body = await run.fetch()
    assert set(body["output"]) == {"whole"}
    assert all(body["state"][f"u{n}"] == n for n in range(number))
    assert len(await run.log()) == 2 * number
    stamps = [event["updated_at"] for _, event in await run.stream()]
    assert stamps == sorted(set(stamps))


class TestSetOutput:
    async def test_without_a_schema_it_is_stored(self, yard: Yard) -> None:
        run = await yard.api().create_run()
        await run.patch(output={"old": True})
        for value in ({"new": [1, None, "x"]}, 0, None, "text"):
            body = await set_output(run, value)
            assert (body["output"], body["status"]) == (value, "queued")
        error(await run.api.patch(run.path("set_output/"), {}), 400, "required", "output")

    async def test_with_a_schema_it_completes_the_run(self, yard: Yard) -> None:
        run = await yard.api().create_run(await yard.api().create_task(json_schema=SCHEMA))
        await run.patch(status="in_progress")
        for bad, text in (
            ({}, "'n' is a required property"),
            ({"n": "one"}, "'one' is not of type 'integer'"),
        ):
            response = await run.api.patch(run.path("set_output/"), {"output": bad})
            assert (response.status_code, response.json()) == (
                400,
                {"error": f"Output validation error: {text}"},
            )
        assert (await run.fetch())["output"] is None
        assert (await set_output(run, {"n": 1}))["status"] == "in_progress"
        body = await run.fetch()
        assert (body["status"], body["output"], body["error_message"]) == ("completed", {"n": 1}, None)
        assert body["completed_at"]
        events = [event for _, event in await run.stream()]
        assert [(event["status"], event["output"]) for event in events[-2:]] == [
            ("in_progress", {"n": 1}), ("completed", {"n": 1}),
        ]  # fmt: skip

    @pytest.mark.parametrize("status", ["completed", "failed", "cancelled"])
    async def test_a_run_that_has_ended_stays_as_it_ended(self, yard: Yard, status: str) -> None:
        """The agent of a run that somebody cancels may still be about to give its answer."""
        run = await yard.api().create_run(await yard.api().create_task(json_schema=SCHEMA))
        before = await run.patch(status=status, error_message="said so")
        await set_output(run, {"n": 1})
        after = await run.fetch()
        assert after["output"] == {"n": 1}
        for name in ("status", "error_message", "completed_at"):
            assert after[name] == before[name]

    @pytest.fixture
    def trap(self) -> Iterator[tuple[str, list[str]]]:
        """A server of a schema, and what was asked of it."""
        asked: list[str] = []

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                asked.append(self.path)
                self.send_response(200)
                self.end_headers()
                self.wfile.write(b"{}")

            def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - named so by the base class
                pass

        server = HTTPServer(("127.0.0.1", 0), Handler)
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/schema.json", asked
        server.shutdown()
        thread.join()
        server.server_close()

    async def test_a_schema_sends_the_server_nowhere(self, yard: Yard, trap: tuple[str, list[str]]) -> None:
        url, asked = trap
        run = await yard.api().create_run(await yard.api().create_task(json_schema={"$ref": url}))
        response = await run.api.patch(run.path("set_output/"), {"output": {}})
        assert response.status_code == 400
        assert response.json()["error"].startswith("Output validation error: json_schema refers to something")
        assert asked == []

    async def test_other_keys(self, yard: Yard) -> None:
        run = await yard.api().create_run()
        path, body = run.path("set_output/"), {"output": 1}
        error(await yard.api("eve", yard.other_project).patch(path, body), 404, "not_found")
        error(await yard.api("task:read").patch(path, body), 403, "permission_denied")
        error(await yard.api(None).patch(path, body), 401, "not_authenticated")
        assert json.dumps((await run.fetch())["output"]) == "null"
