"""append_log, logs, session_logs, relay_message (tasks-api §6.1-6.3, §6.7)."""

from __future__ import annotations

import json
import uuid
from typing import Any

import httpx
import pytest

from tests.support.yard import Json, Run, Yard, error, ok


def update(kind: str, **extra: Any) -> Json:
    params = {"sessionId": "s", "update": {"sessionUpdate": kind, **extra}}
    return note("session/update", params)


def note(method: str, params: Json | None = None, timestamp: str = "2026-05-20T10:00:00.000Z") -> Json:
    message = {"jsonrpc": "2.0", "method": method, "params": params or {}}
    return {"type": "notification", "timestamp": timestamp, "notification": message}


async def session(run: Run, **query: Any) -> httpx.Response:
    response = await run.api.get(run.path("session_logs/"), params=query)
    assert response.status_code == 200, response.text
    return response


def counts(response: httpx.Response) -> tuple[int, int, int, bool]:
    names = ("X-Total-Count", "X-Filtered-Count", "X-Matching-Count")
    total, filtered, matching = (int(response.headers[name]) for name in names)
    return total, filtered, matching, {"true": True, "false": False}[response.headers["X-Has-More"]]


class TestAppend:
    async def test_entries_come_back_as_they_were(self, yard: Yard) -> None:
        run = await yard.api().create_run()
        entry = {
            " z ": " 1 ", "type": "info", "a": {"y": [None, True, 1.5, 10**30, "ü\u2028\0", ""], "b": {}},
            "timestamp": 7, "notification": "none",
        }  # fmt: skip
        response = await run.api.post(run.path("append_log/"), {"entries": [entry, {}, note("x")]})
        assert ok(response) == await run.fetch()
        assert response.headers["server-timing"].startswith("append;dur=")
        text = (await run.api.get(run.path("logs/"))).text
        assert text == "\n".join(json.dumps(item) for item in (entry, {}, note("x")))
        assert (await session(run)).text == f"[{json.dumps(entry)}, {{}}, {json.dumps(note('x'))}]"

    async def test_half_a_surrogate_pair_survives(self, yard: Yard) -> None:
        run = await yard.api().create_run()
        raw = b'{"entries": [{"notification": {"method": "m\\ud83d\\u0000"}, "text": "\\ud83d", "n": 1e999}]}'
        headers = {"Content-Type": "application/json"}
        ok(await run.api.request("POST", run.path("append_log/"), content=raw, headers=headers))
        text = (await run.api.get(run.path("logs"))).text
        assert text == '{"notification": {"method": "m\\ud83d\\u0000"}, "text": "\\ud83d", "n": null}'
        assert counts(await session(run, event_types="m"))[1] == 1

    async def test_infinity_is_null_however_deep(self, yard: Yard) -> None:
        run = await yard.api().create_run()
        before, after = '{"a": ' * 700, "}" * 700
        raw = f'{{"entries": [{before}[1e999, -1e999]{after}]}}'
        headers = {"Content-Type": "application/json"}
        ok(await run.api.request("POST", run.path("append_log/"), content=raw, headers=headers))
        assert (await run.api.get(run.path("logs"))).text == f"{before}[null, null]{after}"

    async def test_chunks_are_dropped(self, yard: Yard) -> None:
        run = await yard.api().create_run()
        chunk = update("agent_message_chunk")
        await run.append(chunk, update("agent_message"), chunk, update("agent_thought_chunk"))
        await run.append(chunk)
        other = note("agent_message_chunk")
        await run.append(other)
        assert await run.log() == [update("agent_message"), update("agent_thought_chunk"), other]

    async def test_nothing_is_on_the_stream(self, yard: Yard) -> None:
        run = await yard.api().create_run()
        await run.append(note("quiet"))
        await run.patch(status="completed")
        assert {event["type"] for _, event in await run.stream()} == {"task_run_state"}

    @pytest.mark.parametrize(
        ("body", "code", "attr", "detail"),
        [
            ({}, "required", "entries", "This field is required."),
            ({"entries": []}, "invalid_input", "entries", "At least one log entry is required"),
            ({"entries": None}, "null", "entries", None),
            ({"entries": {}}, "not_a_list", "entries", None),
            ({"entries": [{}, "x"]}, "not_a_dict", "entries__1", None),
            ({"entries": [None]}, "null", "entries__0", None),
        ],
    )
    async def test_bad_bodies(self, yard: Yard, body: Json, code: str, attr: str, detail: str | None) -> None:
        run = await yard.api().create_run()
        refused = error(await run.api.post(run.path("append_log/"), body), 400, code, attr)
        assert detail in (None, refused["detail"])
        missing = run.path("append_log/").replace(run.id, str(uuid.uuid4()))
        error(await run.api.post(missing, body), 400, code, attr)
        error(await run.api.post(missing, {"entries": [{}]}), 404, "not_found")
        assert await run.log() == []

    async def test_large_entries(self, yard: Yard) -> None:
        run = await yard.api().create_run()
        await run.append(*({"n": n, "text": "x" * 200_000} for n in range(20)))
        assert [entry["n"] for entry in await run.log()] == list(range(20))


class TestChain:
    async def test_logs_of_resumed_runs_come_first(self, yard: Yard) -> None:
        api = yard.api()
        task = await api.create_task()
        previous: Run | None = None
        runs = []
        for n in range(13):
            body = {} if previous is None else {"resume_from_run_id": previous.id}
            made = ok(await api.post(f"tasks/{task['id']}/run/", body))["latest_run"]
            previous = Run(api, task["id"], made["id"])
            runs.append(previous)
            if n != 5:
                await previous.append({"n": n}, {"n": n})
        response = await runs[3].api.get(runs[3].path("logs/"))
        assert response.headers["content-type"].startswith("application/jsonl")
        assert response.headers["cache-control"] == "no-cache"
        assert response.headers["server-timing"]
        assert [json.loads(line)["n"] for line in response.text.split("\n")] == [0, 0, 1, 1, 2, 2, 3, 3]
        # Ten hops, and the one without a log leaves no gap.
        wanted = [n for n in range(2, 13) if n != 5 for _ in range(2)]
        assert [entry["n"] for entry in await runs[12].log()] == wanted
        assert (await session(runs[12])).json() == [{"n": 12}, {"n": 12}]

    async def test_circles_and_nonsense(self, yard: Yard) -> None:
        api = yard.api()
        task = await api.create_task()
        one, two = await api.create_run(task), await api.create_run(task)
        foreign = await api.create_run()
        for run in (one, two, foreign):
            await run.append({"of": run.id})
        await one.patch(state={"resume_from_run_id": two.id.upper()})
        await two.patch(state={"resume_from_run_id": one.id})
        assert [entry["of"] for entry in await one.log()] == [two.id, one.id]
        for wrong in (foreign.id, "x", 7, None, {"a": 1}, one.id):
            await one.patch(state={"resume_from_run_id": wrong})
            assert [entry["of"] for entry in await one.log()] == [one.id]


class TestSession:
    async def fill(self, yard: Yard) -> Run:
        run = await yard.api().create_run()
        await run.append(
            update("agent_message"), update("plan"), note("_posthog/console"), {"type": "info"},
            {"notification": {"id": 1, "result": {}}},
        )  # fmt: skip
        return run

    @pytest.mark.parametrize(
        ("query", "expected"),
        [
            ({"event_types": "agent_message"}, [0]),
            ({"event_types": " agent_message , plan,"}, [0, 1]),
            ({"event_types": "session/update"}, []),
            ({"event_types": "_posthog/console"}, [2]),
            ({"exclude_types": "_posthog/console,plan"}, [0, 3, 4]),
            ({"event_types": "agent_message,plan", "exclude_types": "plan"}, [0]),
            ({"event_types": ""}, [0, 1, 2, 3, 4]),
            ({"event_types": "\0"}, [0, 1, 2, 3, 4]),
            ({"unknown": "x"}, [0, 1, 2, 3, 4]),
        ],
    )
    async def test_types(self, yard: Yard, query: dict[str, str], expected: list[int]) -> None:
        run = await self.fill(yard)
        log = await run.log()
        response = await session(run, **query)
        assert response.json() == [log[n] for n in expected]
        assert counts(response) == (5, len(expected), len(expected), False)
        assert response.headers["content-type"].startswith("application/json")
        assert response.headers["cache-control"] == "no-cache"
        assert response.headers["server-timing"]

    async def test_after_compares_times(self, yard: Yard) -> None:
        run = await yard.api().create_run()
        stamps = [
            "2026-05-20T10:00:00Z", "2026-05-20T12:00:00.500+02:00", "2026-05-20T10:00:01", "2026-05-20T05:30:02-04:30",
            "soon", "",
        ]  # fmt: skip
        await run.append(
            *(note(str(n), timestamp=stamp) for n, stamp in enumerate(stamps)), {"timestamp": 5}, {}
        )

        async def later(after: str) -> list[str]:
            return [entry["notification"]["method"] for entry in (await session(run, after=after)).json()]

        assert await later("2026-05-20T10:00:00+00:00") == ["1", "2", "3"]
        assert await later("2026-05-20T10:00:00.500Z") == ["2", "3"]
        assert await later("2026-05-20T12:00:01+02:00") == ["3"]
        response = await run.api.get(run.path("session_logs/") + "?after=2026-05-20T10:00:01+00:00")
        assert counts(response)[:2] == (8, 1)
        assert len((await session(run)).json()) == 8

    async def test_times_that_the_database_cannot_read(self, yard: Yard) -> None:
        run = await yard.api().create_run()
        odd = ["2026-05-20T10:00:00+23:59", "2026-05-20T10:00:00+01:02:03.5", "0001-01-01T00:00:00+10:00"]
        await run.append(*(note(str(n), timestamp=stamp) for n, stamp in enumerate(odd)))
        assert len((await session(run)).json()) == 3
        found = (await session(run, after="2026-05-19T12:00:00+23:59")).json()
        assert [entry["notification"]["method"] for entry in found] == ["0", "1"]
        response = await run.api.get(run.path("session_logs/"), params={"after": odd[2]})
        error(response, 400, "invalid_input", "after")

    async def test_pages(self, yard: Yard) -> None:
        run = await yard.api().create_run()
        for start in (0, 600):
            await run.append(*({"n": n} for n in range(start, start + 600)))
        response = await session(run)
        assert [entry["n"] for entry in response.json()] == list(range(1000))
        assert counts(response) == (1200, 1200, 1200, True)
        response = await session(run, limit=5000)
        assert ([entry["n"] for entry in response.json()], counts(response)[3]) == (list(range(1200)), False)
        response = await session(run, limit=700, offset=300)
        assert ([entry["n"] for entry in response.json()], counts(response)[3]) == (
            list(range(300, 1000)),
            True,
        )
        response = await session(run, limit=1, offset=1199)
        assert (response.json(), counts(response)[3]) == ([{"n": 1199}], False)
        response = await session(run, offset=10**18)
        assert (response.text, counts(response)) == ("[]", (1200, 1200, 1200, False))

    async def test_nothing(self, yard: Yard) -> None:
        response = await session(await yard.api().create_run())
        assert (response.text, counts(response)) == ("[]", (0, 0, 0, False))

    @pytest.mark.parametrize(
        ("query", "code", "attr"),
        [
            ({"limit": "0"}, "min_value", "limit"),
            ({"limit": "5001"}, "max_value", "limit"),
            ({"limit": "many"}, "invalid_input", "limit"),
            ({"limit": ""}, "invalid_input", "limit"),
            ({"offset": "-1"}, "min_value", "offset"),
            ({"after": "yesterday"}, "invalid_input", "after"),
        ],
    )
    async def test_bad_queries(self, yard: Yard, query: dict[str, str], code: str, attr: str) -> None:
        run = await yard.api().create_run()
        missing = run.path("session_logs/").replace(run.id, str(uuid.uuid4()))
        error(await run.api.get(missing, params=query), 400, code, attr)
        error(await run.api.get(missing), 404, "not_found")


class TestRelay:
    async def test_skipped(self, yard: Yard) -> None:
        run = await yard.api().create_run()
        body = {"text": "x" * 10_000, "text_parts": ["x"], "message_id": "m"}
        assert ok(await run.api.post(run.path("relay_message/"), body)) == {"status": "skipped"}

    @pytest.mark.parametrize(
        ("body", "code"),
        [
            ({}, "required"),
            ({"text": " "}, "blank"),
            ({"text": None}, "null"),
            ({"text": "x" * 10_001}, "max_length"),
        ],
    )
    async def test_bad_text(self, yard: Yard, body: Json, code: str) -> None:
        run = await yard.api().create_run()
        path = run.path("relay_message/").replace(run.id, str(uuid.uuid4()))
        error(await run.api.post(path, body), 400, code, "text")
        error(await run.api.post(path, {"text": "x"}), 404, "not_found")


@pytest.mark.parametrize(
    ("method", "rest", "body"),
    [
        ("POST", "append_log/", {"entries": [{}]}),
        ("GET", "logs/", None),
        ("GET", "session_logs/", None),
        ("POST", "relay_message/", {"text": "x"}),
        ("GET", "connection_token/", None),
    ],
)
async def test_other_keys(yard: Yard, method: str, rest: str, body: Json | None) -> None:
    run = await yard.api().create_run()
    options = {} if body is None else {"json": body}
    error(
        await yard.api("eve", yard.other_project).request(method, run.path(rest), **options), 404, "not_found"
    )
    error(await yard.api("eve").request(method, run.path(rest), **options), 403, "permission_denied")
    error(await yard.api(None).request(method, run.path(rest), **options), 401, "not_authenticated")
    reading = (await yard.api("task:read").request(method, run.path(rest), **options)).status_code
    assert reading == (200 if rest in ("logs/", "session_logs/") else 403)


async def test_head_of_a_stream_ends_at_once(yard: Yard) -> None:
    """The run goes on, so its stream does: the connection is free for the next request all the same."""
    run = await yard.api().create_run()
    path, key = f"/api/projects/{yard.project}/{run.path()}", {"Authorization": f"Bearer {run.api.key}"}
    one = httpx.Limits(max_connections=1)
    async with httpx.AsyncClient(
        base_url=yard.url, headers=key, limits=one, timeout=10, trust_env=False
    ) as client:
        for rest in ("stream/", "stream/?start=latest", "logs/", ""):
            response = await client.head(path + rest)
            assert (response.status_code, response.content) == (200, b"")
        assert (await client.get(path)).json()["id"] == run.id
