"""People who have runs made and talk to them while the storm goes on. They try again, as clients do."""

from __future__ import annotations

import asyncio
import time
import uuid
from dataclasses import dataclass, field
from random import Random
from typing import Any

import httpx

from tests.faults.site import Site

Json = dict[str, Any]
PATIENCE_S = 300.0
"""For one request, with all its tries."""


class Client:
    """Requests of one person; each POST is sent until it was answered, under one Idempotency-Key."""

    def __init__(self, site: Site) -> None:
        self._site = site
        self._http = httpx.AsyncClient(timeout=20, trust_env=False)

    async def call(self, method: str, path: str, body: Any = None) -> httpx.Response:
        headers = {"Authorization": f"Bearer {self._site.key}"}
        if method == "POST":
            headers["Idempotency-Key"] = uuid.uuid4().hex
        end, problem = time.monotonic() + PATIENCE_S, ""
        while time.monotonic() < end:
            try:
                url = f"{self._site.url}/api/projects/@current/{path}"
                response = await self._http.request(method, url, headers=headers, json=body)
                if response.status_code < 500:
                    return response
                problem = f"{response.status_code} {response.text[:200]}"
            except httpx.TransportError as error:
                problem = repr(error)
            await asyncio.sleep(0.3)
        raise AssertionError(f"no answer to {method} {path} in {PATIENCE_S:g} s: {problem}")

    async def stream(self, path: str, seen: list[tuple[str, str]]) -> None:
        """Follow a stream to its end, by any number of connections; event ids and data as they came."""
        last: str | None = None
        while True:
            headers = {"Authorization": f"Bearer {self._site.key}", "Accept": "text/event-stream"}
            if last is not None:
                headers["Last-Event-ID"] = last
            url = f"{self._site.url}/api/projects/@current/{path}"
            try:
                async with self._http.stream("GET", url, headers=headers, timeout=60) as response:
                    if response.status_code == 200:
                        event, named = "", False
                        async for line in response.aiter_lines():
                            if line.startswith("id: "):
                                event, named = line[4:], True
                            elif line.startswith("data: ") and named:
                                seen.append((event, line[6:]))
                                last, named = event, False
                        return
            except httpx.TransportError:
                pass
            await asyncio.sleep(0.3)

    async def close(self) -> None:
        await self._http.aclose()


@dataclass
class Talk:
    """One run, what was said to it, and what was seen of it."""

    number: int
    interactive: bool
    messages: list[str] = field(default_factory=list)
    """Names of the accepted ones, in order; the first is the description."""
    steps: dict[str, int] = field(default_factory=dict)
    task: str = ""
    run: str = ""
    body: Json = field(default_factory=dict)
    """The run as it was in the end."""
    seen: list[tuple[str, str]] = field(default_factory=list)
    replay: list[tuple[str, str]] = field(default_factory=list)
    log: list[str] = field(default_factory=list)

    @property
    def path(self) -> str:
        return f"tasks/{self.task}/runs/{self.run}/"

    def order(self, random: Random) -> tuple[str, str]:
        name = f"r{self.number}m{len(self.steps)}"
        self.steps[name] = random.randint(2, 6)
        return name, f"MSG {name} STEPS {self.steps[name]} PAUSE {random.choice((0.1, 0.4, 0.8))}"


async def talk(client: Client, number: int, repository: str, random: Random) -> Talk:
    """Have a run made, talk to it, and wait for its end."""
    it = Talk(number, interactive=random.random() < 0.6)
    name, text = it.order(random)
    fields = {"title": f"Run {number}", "description": text, "repository": repository}
    it.task = _ok(await client.call("POST", "tasks/", fields), 201)["id"]
    mode = "interactive" if it.interactive else "background"
    body = {"agent": "claude", "mode": mode}
    it.run = _ok(await client.call("POST", f"tasks/{it.task}/run/", body), 200)["latest_run"]["id"]
    it.messages.append(name)
    watching = asyncio.create_task(client.stream(f"{it.path}stream/", it.seen))
    try:
        for _ in range(random.randint(1, 3)):
            # Some come while the agent works, some while the run sleeps.
            await asyncio.sleep(random.choice((0.5, 3.0, 9.0)))
            name, text = it.order(random)
            command = {"jsonrpc": "2.0", "id": 1, "method": "user_message", "params": {"content": text}}
            answer = await client.call("POST", f"{it.path}command/", command)
            if answer.status_code == 200:
                it.messages.append(name)
            else:
                assert "No active sandbox" in answer.text, answer.text
                break
        if it.interactive:
            await _turns(client, it)
            _ok(await client.call("PATCH", it.path, {"status": "completed"}), 200)
        it.body = await _ended(client, it)
        await asyncio.wait_for(watching, PATIENCE_S)
    finally:
        watching.cancel()
    await client.stream(f"{it.path}stream/", it.replay)
    it.log = (await client.call("GET", f"{it.path}logs/")).text.splitlines()
    return it


async def _turns(client: Client, it: Talk) -> None:
    end, count = time.monotonic() + PATIENCE_S, -1
    while time.monotonic() < end:
        text = (await client.call("GET", f"{it.path}logs/")).text
        new = text.count('"_posthog/turn_complete"')
        if new >= len(it.messages):
            return
        if (body := (await client.call("GET", it.path)).json())["status"] in (
            "failed",
            "completed",
            "cancelled",
        ):
            raise AssertionError(
                f"run {it.number} ended after {new} turns: {body['error_message']} {body['state']}"
            )
        if new != count:  # it gets on
            count, end = new, time.monotonic() + PATIENCE_S
        await asyncio.sleep(0.7)
    raise AssertionError(f"run {it.number} ({it.run}) stands still after {count} of {len(it.messages)} turns")


async def _ended(client: Client, it: Talk) -> Json:
    end = time.monotonic() + PATIENCE_S
    while time.monotonic() < end:
        body = _ok(await client.call("GET", it.path), 200)
        if body["status"] in ("completed", "failed", "cancelled"):
            return body
        await asyncio.sleep(0.7)
    raise AssertionError(f"run {it.number} ({it.run}) did not end: {body['status']} {body['state']}")


def _ok(response: httpx.Response, status: int) -> Json:
    assert response.status_code == status, f"{response.status_code} {response.text}"
    return dict(response.json())
