"""connection_token and event_stream (tasks-api §6.5, §6.8)."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from typing import Any

import httpx
import jwt
import pytest

from taskyard.events import ingest
from taskyard.runs.tokens import INGEST, RunTokens
from tests.support.yard import Json, Run, Yard, error, eventually, ok


async def token_of(run: Run, **query: str) -> str:
    return str(ok(await run.api.get(run.path("connection_token/"), params=query))["token"])


async def test_connection_token(yard: Yard) -> None:
    run = await yard.api().create_run(mode="interactive")
    token = await token_of(run)
    tokens = await RunTokens.load(yard.database)
    claims = jwt.decode(token, tokens._public, algorithms=["RS256"], audience="posthog:sandbox_connection")
    assert abs(claims.pop("exp") - time.time() - 24 * 3600) < 60
    assert claims.pop("iat") <= time.time()
    row = await yard.database.fetch_one(
        "SELECT distinct_id FROM users WHERE id = %(id)s", id=yard.users["ada"]
    )
    assert row is not None
    assert claims == {
        "aud": "posthog:sandbox_connection", "run_id": run.id, "task_id": run.task_id, "team_id": yard.project,
        "user_id": yard.users["ada"], "distinct_id": row["distinct_id"], "mode": "interactive",
    }  # fmt: skip
    assert jwt.get_unverified_header(token)["alg"] == "RS256"


async def test_processes_that_start_together_share_one_key(yard: Yard) -> None:
    await yard.database.execute("DELETE FROM signing_keys WHERE name = 'runs'")
    all_tokens = await asyncio.gather(*(RunTokens.load(yard.database) for _ in range(4)))
    assert len({tokens._public.public_numbers().n for tokens in all_tokens}) == 1


class Sender:
    """Uploads to one run under its token."""

    def __init__(self, run: Run, token: str | None, url: str | None = None) -> None:
        self.run = run
        self.headers = {"Content-Type": "application/x-ndjson"}
        if token is not None:
            self.headers["Authorization"] = f"Bearer {token}"
        self.url = url or f"/api/projects/@current/{run.path('event_stream/')}"

    async def raw(self, content: Any) -> httpx.Response:
        return await self.run.api.client.post(self.url, content=content, headers=self.headers)

    async def __call__(self, *lines: Json) -> httpx.Response:
        return await self.raw("\n".join(json.dumps(line) for line in lines).encode())


@pytest.fixture
async def run(yard: Yard) -> Run:
    return await yard.api().create_run()


@pytest.fixture
async def send(run: Run) -> Sender:
    return Sender(run, await token_of(run, audience=INGEST))


def event(seq: int, **extra: Any) -> Json:
    return {"seq": seq, "event": {"type": "notification", "n": seq, **extra}}


def refusal(response: httpx.Response, status: int, last: int) -> str:
    body = response.json()
    assert response.status_code == status, response.text
    assert set(body) == {"error", "last_accepted_seq"}
    assert body["last_accepted_seq"] == last
    return str(body["error"])


async def streamed(run: Run) -> list[int]:
    """The numbers of the events on the stream, after ending the run."""
    await run.patch(status="completed")
    return [item["n"] for _, item in await run.stream() if "n" in item]


async def test_accepted_once_and_in_order(run: Run, send: Sender) -> None:
    assert ok(await send.raw(b"")) == {"accepted": 0, "duplicate": 0, "last_accepted_seq": 0}
    assert ok(await send(event(1), event(2))) == {"accepted": 2, "duplicate": 0, "last_accepted_seq": 2}
    assert ok(await send(event(1), event(2), event(3))) == {
        "accepted": 1,
        "duplicate": 2,
        "last_accepted_seq": 3,
    }
    assert ok(await send.raw(b"\n\n  \n")) == {"accepted": 0, "duplicate": 0, "last_accepted_seq": 3}
    assert await run.log() == []
    assert await streamed(run) == [1, 2, 3]


async def test_text_is_the_event(run: Run, send: Sender) -> None:
    await send({"event": {"z": 1, "a": "ü\0"}, "seq": 1})
    await run.cancel()
    assert (await run.stream())[1][1] == {"z": 1, "a": "ü\0"}
    assert '{"z": 1, "a": "\\u00fc\\u0000"}' in await run.stream_text()


async def test_a_gap(run: Run, send: Sender) -> None:
    assert "Expected seq 3" in refusal(await send(event(1), event(2), event(4), event(3)), 409, 2)
    assert await streamed(run) == [1, 2]


async def test_completion(run: Run, send: Sender) -> None:
    done = {"type": ingest.COMPLETE, "final_seq": 2}
    refusal(await send(event(1), done), 409, 1)
    text = refusal(await send(event(2), done, event(3)), 400, 2)
    assert text == "Completion line must be the final event stream line"
    assert ok(await send(event(2), done)) == {"accepted": 0, "duplicate": 1, "last_accepted_seq": 2}
    refusal(await send(event(3)), 409, 2)
    # A repetition of what was accepted is harmless.
    assert ok(await send(event(1), event(2), done))["duplicate"] == 2
    refusal(await send({"type": ingest.COMPLETE, "final_seq": 3}), 409, 2)
    assert await streamed(run) == [1, 2]


async def test_completion_of_nothing(send: Sender) -> None:
    ok(await send({"type": ingest.COMPLETE, "final_seq": 0}))
    refusal(await send(event(1)), 409, 0)


@pytest.mark.parametrize(
    "line",
    [
        b"{", b"[]", b"1", b"\xff", b'{"seq": 2}', b'{"seq": 2, "event": []}', b'{"seq": "2", "event": {}}',
        b'{"seq": 0, "event": {}}', b'{"seq": true, "event": {}}', b'{"seq": 2.0, "event": {}}',
        b'{"seq": 99999999999999999999, "event": {}}', b'{"seq": 2, "event": {"a": NaN}}', b"[" * 20_000,
        b'{"type": "_posthog/stream_complete"}', b'{"type": "_posthog/stream_complete", "final_seq": -1}',
    ],
)  # fmt: skip
async def test_bad_lines(run: Run, send: Sender, line: bytes) -> None:
    good = json.dumps(event(1)).encode()
    refusal(await send.raw(good + b"\n" + line + b"\n" + json.dumps(event(2)).encode()), 400, 1)
    assert await streamed(run) == [1]


async def test_limits(run: Run, send: Sender) -> None:
    refusal(await send(event(1), event(2, text="x" * ingest.LINE_BYTES)), 413, 1)
    refusal(await send.raw(json.dumps(event(2, text="x" * ingest.LINE_BYTES)).encode()[:-2]), 413, 1)
    refusal(await send(*(event(n) for n in range(2, 1003))), 413, 1001)
    big = [event(n, text="x" * 900_000) for n in range(1002, 1009)]
    refusal(await send(*big), 413, 1006)
    fits = ingest.LINE_BYTES - len(json.dumps(event(1007, text="")))
    assert ok(await send(event(1007, text="x" * fits)))["accepted"] == 1


async def test_a_chunked_upload_arrives_as_it_is_sent(run: Run, send: Sender) -> None:
    sent = [json.dumps(event(n)).encode() + b"\n" for n in (1, 2, 3)]

    async def seen(text: str) -> None:
        await eventually(run.stream_text, lambda found: text in found, lambda found: f"{text} in {found}")

    async def body() -> AsyncIterator[bytes]:
        yield sent[0] + sent[1][:10]
        await seen('"n": 1')
        yield sent[1][10:]
        await seen('"n": 2')
        yield sent[2].rstrip()

    assert ok(await send.raw(body())) == {"accepted": 3, "duplicate": 0, "last_accepted_seq": 3}
    assert await streamed(run) == [1, 2, 3]


async def test_a_client_that_leaves_keeps_what_it_sent(
    yard: Yard, run: Run, send: Sender, capsys: pytest.CaptureFixture[str]
) -> None:
    host, _, port = yard.url.removeprefix("http://").partition(":")
    _, writer = await asyncio.open_connection(host, int(port))
    line = json.dumps(event(1)).encode() + b"\n"
    head = f"POST {send.url} HTTP/1.1\r\nHost: x\r\nAuthorization: {send.headers['Authorization']}\r\n"
    writer.write(f"{head}Transfer-Encoding: chunked\r\n\r\n{len(line):x}\r\n".encode() + line + b"\r\n")
    await eventually(run.stream_text, lambda found: '"n": 1' in found, lambda found: f"the event in {found}")
    writer.close()
    await writer.wait_closed()
    assert ok(await send(event(1), event(2))) == {"accepted": 1, "duplicate": 1, "last_accepted_seq": 2}
    assert await streamed(run) == [1, 2]
    assert "request failed" not in capsys.readouterr().out


async def test_two_uploads_at_once_accept_each_event_once(run: Run, send: Sender) -> None:
    answers = await asyncio.gather(*(send(*(event(n) for n in range(1, 201))) for _ in range(6)))
    bodies = [ok(answer) for answer in answers]
    assert sum(body["accepted"] for body in bodies) == 200
    assert all(body["accepted"] + body["duplicate"] == 200 for body in bodies)
    assert await streamed(run) == list(range(1, 201))


async def test_who_may(yard: Yard, run: Run, send: Sender) -> None:
    tokens = await RunTokens.load(yard.database)
    row = {"id": run.id, "task_id": run.task_id, "project_id": yard.project}
    error(await Sender(run, None)(), 401, "not_authenticated")
    error(await Sender(run, yard.keys["ada"])(), 401, "invalid_token")
    error(await Sender(run, await token_of(run))(), 401, "invalid_token")
    error(await Sender(run, tokens.ingest(row, -1))(), 401, "expired")
    head, body, mark = tokens.ingest(row, 60).split(".")
    forged = f"{head}.{body}.{mark[:-8]}{mark[-8:].swapcase()}"
    assert error_code(await Sender(run, forged)()) in ("invalid_signature", "invalid_token")
    error(await Sender(run, jwt.encode({"aud": INGEST}, "", algorithm="none"))(), 401, "invalid_token")
    other = await yard.api().create_run()
    error(await Sender(other, send.headers["Authorization"].split()[1])(), 403, "permission_denied")
    for project, status in ((yard.project, 200), (yard.other_project, 403), ("x", 403)):
        sender = Sender(run, tokens.ingest(row, 60), f"/api/projects/{project}/{run.path('event_stream/')}")
        assert (await sender()).status_code == status
    ghost = {**row, "project_id": yard.other_project}
    error(await Sender(run, tokens.ingest(ghost, 60))(), 404, "not_found")
    error(await yard.client.get(send.url, headers=send.headers), 405, "method_not_allowed")


def error_code(response: httpx.Response) -> str:
    assert response.status_code == 401, response.text
    return str(response.json()["code"])
