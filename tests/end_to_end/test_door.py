"""The one door in real runs: budgets, network levels, git with a token. Real sandboxes; the scripted agent knocks."""

from __future__ import annotations

import base64
import json
import shlex
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from taskyard.settings import BudgetSettings, GitSettings, ModelSettings, NetworkSettings, Settings, Upstream
from tests.conftest import make_settings
from tests.support.door import Exchange, open_upstream
from tests.support.git_http import GitServer, git_server
from tests.support.model_endpoint import (
    CACHE_READ_TOKENS,
    CACHE_WRITE_TOKENS,
    INPUT_TOKENS,
    OUTPUT_TOKENS,
    Endpoint,
    model_endpoint,
)
from tests.support.repositories import heads, make_bare, make_repository, run_git
from tests.support.yard import Json, Run, Yard, of_method, ok, said, updates

SCRIPTED = {"agent": "scripted"}
KEY, TOKEN = "sk-key-that-stays-outside", "ghs_token-that-stays-outside"
BASIC = base64.b64encode(f"x-access-token:{TOKEN}".encode()).decode()
A_CALL = INPUT_TOKENS + OUTPUT_TOKENS + CACHE_WRITE_TOKENS
"""What one call takes of a budget of tokens."""


def python(code: str) -> str:
    """A directive that runs Python in the sandbox: the agent's own, which is sure to be there."""
    return f'SHELL "$(readlink /proc/$PPID/exe)" -c {shlex.quote(f"exec({json.dumps(code)})")}'


def ask_model(prompt: str = "[[text:hi]]", stream: bool = False, model: str = "claude-sonnet-4-5") -> str:
    """A directive that calls the model, as agents do."""
    body = {"model": model, "stream": stream, "messages": [{"role": "user", "content": prompt}]}
    return python(
        "import http.client as h\nc = h.HTTPConnection('127.0.0.1', 3128)\n"
        f"c.request('POST', '/anthropic/v1/messages', {json.dumps(body)!r})\n"
        "r = c.getresponse(); print('MODEL', r.status, r.read().decode())"
    )


def knock(host: str, port: int) -> str:
    """A directive that asks for a host in both ways."""
    here = f"{host}:{port}"
    return python(
        "import http.client as h\n"
        "c = h.HTTPConnection('127.0.0.1', 3128)\n"
        f"c.request('GET', 'http://{here}/')\n"
        f"r = c.getresponse(); print('PLAIN {here}', r.status, r.read().decode())\n"
        "c = h.HTTPConnection('127.0.0.1', 3128)\n"
        f"c.set_tunnel('{host}', {port})\n"
        "try:\n"
        f"    c.request('GET', '/'); r = c.getresponse(); print('TUNNEL {here}', r.status, r.read().decode())\n"
        "except OSError as e:\n"
        f"    print('TUNNEL {here} refused', e)\n"
    )


def direct(port: int) -> str:
    """A directive that goes past the door."""
    return python(
        "import socket\n"
        "try:\n"
        f"    socket.create_connection(('127.0.0.1', {port})); print('DIRECT reached')\n"
        "except OSError:\n"
        "    print('DIRECT refused')"
    )


def outputs(log: list[Json]) -> str:
    """What the commands of the agent printed."""
    return "\n".join(
        update["rawOutput"].get("output", "")
        for update in updates(log, "tool_call_update")
        if "rawOutput" in update
    )


def warnings(log: list[Json]) -> list[str]:
    return [line["message"] for line in of_method(log, "_posthog/console") if line["level"] == "warn"]


@pytest.fixture
async def endpoint() -> AsyncIterator[Endpoint]:
    async with model_endpoint() as endpoint:
        yield endpoint


@pytest.fixture
def areas() -> dict[str, Any]:
    """Settings that a class of tests adds."""
    return {}


@pytest.fixture
def settings(tmp_path: Path, database_url: str, endpoint: Endpoint, areas: dict[str, Any]) -> Settings:
    upstream = Upstream(base_url=endpoint.url, api_key=KEY)
    models = ModelSettings(anthropic=upstream, openai=upstream)
    return make_settings(tmp_path / "data", database_url, models=models, **areas)


class TestBudget:
    @pytest.fixture(params=["failed", "completed"])
    def areas(self, request: pytest.FixtureRequest) -> dict[str, Any]:
        return {"budget": BudgetSettings(end=request.param)}

    async def test_a_used_up_budget_takes_no_result_away(self, live: Yard) -> None:
        task = await live.api().create_task(
            description="\n".join(['SUBMIT {"answer": 7}', ask_model(), ask_model(), "SLEEP 60"]),
            json_schema={"type": "object"},
        )
        asked = {"budget_tokens": A_CALL + 1, **SCRIPTED}
        started = ok(await live.api().post(f"tasks/{task['id']}/run/", asked))["latest_run"]
        run = Run(live.api(), task["id"], started["id"])
        body = await run.status("failed", "completed")
        assert (body["status"], body["error_message"], body["output"]) == ("completed", None, {"answer": 7})
        assert any("is used up" in warning for warning in warnings(await run.log()))

    async def test_a_used_up_budget_ends_the_run_and_keeps_its_work(
        self, live: Yard, settings: Settings, shop: Path, repository: str
    ) -> None:
        text = "\n".join(
            [
                "WRITE a.txt one",
                "COMMIT kept",
                "WRITE b.txt two",
                ask_model(),
                ask_model(),
                ask_model(),
                "SLEEP 60",
                "SAY never",
            ]
        )
        run = await live.api().start(text, repository=repository, budget_tokens=A_CALL + 1, **SCRIPTED)
        body = await run.status("failed", "completed")
        log = await run.log()
        assert body["status"] == settings.budget.end
        message = f"This run's budget of {A_CALL + 1} tokens is used up ({2 * A_CALL} were used). What was done so far"
        assert body["error_message"].startswith(message)
        if settings.budget.end == "failed":
            assert body["state"]["error_type"] == "budget_exceeded"
        else:
            assert body["state"]["budget_exceeded"] is True
            assert "error_type" not in body["state"]
            assert body["error_message"] in warnings(log)
        assert "never" not in said(log)
        branch = body["output"]["head_branch"]
        assert run_git(shop, "show", f"{branch}:a.txt") == "one"
        assert run_git(shop, "show", f"{branch}:b.txt") == "two"
        used = body["state"]["token_usage"]
        assert used["model_calls"] == 2, "the third did not go out"
        assert used["models"]["claude-sonnet-4-5"]["output_tokens"] == 2 * OUTPUT_TOKENS
        dollars = (
            INPUT_TOKENS * 3 + OUTPUT_TOKENS * 15 + CACHE_READ_TOKENS * 0.3 + CACHE_WRITE_TOKENS * 3.75
        ) / 1e6
        assert body["state"]["cost"] == pytest.approx(2 * dollars, abs=1e-6)
        await run.stream()

        # Another run goes on with it; it has a budget of its own, as large as it is told.
        message = "\n".join(["SHELL cat a.txt b.txt", ask_model(), ask_model(), "SAY two"])
        again = {"resume_from_run_id": run.id, "pending_user_message": message, "budget_tokens": 10 * A_CALL}
        started = ok(await live.api().post(f"tasks/{run.task_id}/run/", again | SCRIPTED))
        second = Run(live.api(), run.task_id, started["latest_run"]["id"])
        body = await second.status("completed", "failed")
        assert (body["status"], body["error_message"]) == ("completed", None)
        log = await second.log()
        assert said(log).endswith("two")
        assert body["state"]["token_usage"]["model_calls"] == 2

    async def test_an_answer_is_cut_in_the_middle(self, live: Yard, endpoint: Endpoint) -> None:
        text = f"{ask_model('[[slow:60]]', stream=True)}\nSLEEP 60"
        run = await live.api().start(text, budget_tokens=INPUT_TOKENS + 20, **SCRIPTED)
        body = await run.status("failed", "completed")
        assert f"budget of {INPUT_TOKENS + 20} tokens is used up" in body["error_message"]
        used = body["state"]["token_usage"]
        assert (used["model_calls"], used["input_tokens"]) == (1, INPUT_TOKENS)
        assert 10 <= used["output_tokens"] < 60
        assert not endpoint.requests[0].answered, "the model was told to stop"


async def test_usage_is_counted_over_a_restart_of_the_agent(live: Yard) -> None:
    again = "SHELL [ -e mark ] || { touch mark; kill -9 -1; }"
    run = await live.api().start(f"{ask_model()}\n{again}\n{ask_model()}\nSAY done", **SCRIPTED)
    body = await run.status("completed", "failed")
    assert body["status"] == "completed", body["error_message"]
    assert body["state"]["token_usage"]["model_calls"] == 2
    assert any("goes on with a new process" in text for text in warnings(await run.log()))
    # And so is a budget.
    text = f"{ask_model()}\n{again}\n{ask_model()}\nSLEEP 60"
    run = await live.api().start(text, budget_tokens=A_CALL + 1, **SCRIPTED)
    body = await run.status("completed", "failed")
    assert body["state"].get("error_type") == "budget_exceeded", body
    assert body["state"]["token_usage"]["model_calls"] == 2


async def test_allowed_models(live: Yard, endpoint: Endpoint) -> None:
    run = await live.api().start(f"{ask_model()}\nSAY done", allowed_models=["claude-haiku-*"], **SCRIPTED)
    body = await run.status("completed", "failed")
    assert body["status"] == "completed"
    log = await run.log()
    assert "MODEL 403" in outputs(log)
    assert "may not use the model 'claude-sonnet-4-5'. Allowed: claude-haiku-*" in outputs(log)
    assert any("may not use the model" in text for text in warnings(log))
    assert not endpoint.requests


@pytest.mark.parametrize(("model", "shown"), [("a\0b", "a\ufffdb"), ("a\ud800b", "a?b")])
async def test_a_model_whose_name_cannot_be_stored(live: Yard, model: str, shown: str) -> None:
    """Some upstreams take any name, and give it back."""
    run = await live.api().start(f"{ask_model(model=model)}\nSAY done", **SCRIPTED)
    body = await run.status("completed", "failed")
    assert body["status"] == "completed", body["error_message"]
    assert list(body["state"]["token_usage"]["models"]) == [shown]
    rows = await live.database.fetch("SELECT model FROM model_calls")
    assert [row["model"] for row in rows] == [shown]


class TestNetwork:
    """Two hosts of this machine, which its operator lets sandboxes reach: `localhost` and 127.0.0.2."""

    @pytest.fixture
    async def port(self) -> AsyncIterator[int]:
        async def handler(exchange: Exchange) -> None:
            await exchange.answer(f"hello {exchange.headers['host'][0]}".encode())

        async with open_upstream(handler) as (url, _):
            yield int(url.rpartition(":")[2])

    @pytest.fixture
    def areas(self, port: int) -> dict[str, Any]:
        network = NetworkSettings(default="none", internal_hosts=["localhost", "127.0.0.1"])
        return {"network": network, "trusted_domains": [f"localhost:{port}"]}

    @pytest.mark.parametrize(
        ("environment", "name", "address"),
        [
            (None, "no access to the network", "no access to the network"),
            ({"network_access_level": "full"}, None, None),
            ({"network_access_level": "trusted"}, None, "add '127.0.0.1:{port}' to allowed_domains"),
            (
                {"network_access_level": "custom"},
                "add 'localhost:{port}' to allowed_domains",
                "add '127.0.0.1:{port}' to allowed_domains",
            ),
            (
                {"network_access_level": "custom", "allowed_domains": ["127.0.0.1:{port}"]},
                "add 'localhost:{port}' to allowed_domains",
                None,
            ),
            (
                {
                    "network_access_level": "custom",
                    "allowed_domains": ["127.0.0.1:{port}"],
                    "include_default_domains": True,
                },
                None,
                None,
            ),
        ],
        ids=["none", "full", "trusted", "custom, empty", "custom", "custom with the default list"],
    )
    async def test_levels(
        self, live: Yard, port: int, environment: Json | None, name: str | None, address: str | None
    ) -> None:
        fields: Json = {}
        if environment is not None:
            asked = json.loads(json.dumps(environment).replace("{port}", str(port)))
            made = ok(await live.api().post("sandbox_environments/", {"name": "Net", **asked}), 201)
            fields["sandbox_environment_id"] = made["id"]
        text = "\n".join(
            [
                knock("localhost", port),
                knock("127.0.0.1", port),
                knock("127.0.0.3", port),
                direct(port),
                ask_model(),
            ]
        )
        run = await live.api().start(text, **SCRIPTED, **fields)
        body = await run.status("completed", "failed")
        assert body["status"] == "completed", body["error_message"]
        log = await run.log()
        printed = outputs(log)
        for host, reason in (("localhost", name), ("127.0.0.1", address)):
            here = f"{host}:{port}"
            if reason is None:
                assert f"PLAIN {here} 200 hello {here}" in printed
                assert f"TUNNEL {here} 200 hello {here}" in printed
                continue
            wanted = reason.replace("{port}", str(port))
            assert f"PLAIN {here} 403" in printed
            assert f"TUNNEL {here} refused" in printed
            for what in (f"GET http://{here}/", f"CONNECT {here}"):
                [told] = [text for text in warnings(log) if text.startswith(f"Network: refused {what}: ")]
                assert wanted in told
        # What nobody named is on no list, and internal.
        assert f"PLAIN 127.0.0.3:{port} 403" in printed
        assert "DIRECT refused" in printed
        assert "MODEL 200" in printed, "the model is reached whatever the level"


class TestGit:
    @pytest.fixture
    def server(self, tmp_path: Path) -> Iterator[GitServer]:
        source = make_repository(tmp_path / "source")
        (tmp_path / "served" / "acme").mkdir(parents=True)
        make_bare(tmp_path / "served" / "acme" / "shop.git", source)
        with git_server(tmp_path / "served") as server:
            server.authorization = f"Basic {BASIC}"
            yield server

    @pytest.fixture
    def areas(self, server: GitServer) -> dict[str, Any]:
        tokens = {server.url.removeprefix("http://"): TOKEN}
        return {"git": GitSettings(tokens=tokens), "network": NetworkSettings(default="none")}

    async def test_fetch_and_push_without_a_token_inside(
        self, live: Yard, server: GitServer, tmp_path: Path
    ) -> None:
        bare = tmp_path / "served" / "acme" / "shop.git"
        origin = f"{server.url}/acme/shop.git"
        name = ok(await live.api().post("repositories/", {"origin": origin}), 201)["name"]
        branch = "taskyard/tes-0-$(echo $POSTHOG_TASK_RUN_ID | cut -c1-8)"
        # In pieces, so that what looks for the secrets is not what it finds.
        pattern = "|".join(f"{secret[:9]}''{secret[9:]}" for secret in (TOKEN, BASIC)).join("''")
        text = "\n".join(
            [
                "SHELL git remote get-url --all origin; git ls-remote origin",
                "WRITE a.txt one",
                "COMMIT first",
                f'SHELL git push origin "HEAD:refs/heads/{branch}" && echo PUSHED',
                "SHELL git push origin HEAD:refs/heads/main || echo NOT PUSHED",
                "SHELL git fetch origin && git log --oneline --all",
                "SHELL env; cat .git/config ~/.gitconfig ~/.git-credentials; git config --list --show-origin",
                f"SHELL grep -rlE {pattern} / --exclude-dir=proc --exclude-dir=sys --exclude-dir=usr | sed s/^/FOUND/",
                "SHELL cat /proc/*/environ /proc/*/cmdline > /tmp/processes",
                f"SHELL tr '\\0' '\\n' < /tmp/processes | grep -E {pattern} | sed s/^/FOUND/",
                # A commit that was pushed and then rewritten: the end of the run publishes what is there.
                "WRITE b.txt two",
                "SHELL git add --all && git commit --quiet --amend --message again",
                "SAY done",
            ]
        )
        run = await live.api().start(text, repository=name, **SCRIPTED)
        body = await run.status("completed", "failed")
        assert body["status"] == "completed", body["error_message"]
        log = await run.log()
        printed = outputs(log)
        assert f"{origin}\n" in printed
        assert "refs/heads/main" in printed
        assert "PUSHED" in printed.replace("NOT PUSHED", "")
        assert "NOT PUSHED" in printed
        assert "this run may push to taskyard/tes-0-" in printed
        assert any(
            "POST /git/acme/shop.git/git-receive-pack: this run may push to" in text for text in warnings(log)
        )
        published = body["output"]["head_branch"]
        assert heads(bare) == {"main": heads(bare)["main"], published: body["output"]["commit_sha"]}
        assert run_git(bare, "log", "--format=%s", f"main..{published}") == "again"
        assert run_git(bare, "show", f"{published}:b.txt") == "two"
        # The token went to the server, and nowhere else.
        assert {header for _, header in server.seen if header} == {f"Basic {BASIC}"}
        everything = json.dumps([log, await run.stream(), body])
        at = everything.find(TOKEN)
        assert at < 0, everything[max(at - 200, 0) : at + 200]
        assert BASIC not in everything
        assert "FOUND" not in printed
