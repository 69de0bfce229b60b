"""Attacks from inside of whole runs: what an agent tries, as an agent of a run, and what came of it."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import socket
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from taskyard.db.engine import Database
from taskyard.sandbox import disk
from taskyard.settings import ModelSettings, NetworkSettings, RateLimitSettings, Upstream
from taskyard.settings.sandboxes import SandboxSettings
from tests.conftest import make_settings
from tests.support import attacks
from tests.support.attacks import HELD
from tests.support.docker import docker_settings
from tests.support.repositories import make_repository, run_git
from tests.support.sandboxes import BOMB, gone, processes_with
from tests.support.yard import Json, Yard, eventually, of_method, ok, open_yard, updates

CANARY = ("c4n4ry-5ea1ed", "-8b1d-e2e")
SCRIPTED = {"agent": "scripted"}
NAP = "86399.125"


@pytest.fixture(params=["bubblewrap", "docker"])
def sandboxes(request: pytest.FixtureRequest) -> SandboxSettings:
    found = SandboxSettings()
    if request.param == "docker":
        found = docker_settings(request.getfixturevalue("docker_host"))
    limits = {"memory_mb": 1024, "pids": 150, "cpus": 2, "tmp_mb": 64, "disk_mb": 256, "output_mb": 8}
    return found.model_copy(update=limits)


@pytest.fixture
async def live(
    tmp_path: Path,
    database_url: str,
    database: Database,
    sandboxes: SandboxSettings,
    monkeypatch: pytest.MonkeyPatch,
) -> AsyncIterator[Yard]:
    monkeypatch.setenv("SERVER_SECRET", "".join(CANARY))
    for name in ("REST_S", "FAR_REST_S"):
        monkeypatch.setattr(disk, name, 2.0)
    key: Any = "sk-of-the-site"
    settings = make_settings(
        tmp_path / "data",
        database_url,
        sandbox=sandboxes,
        rate_limits=RateLimitSettings(enabled=False),
        network=NetworkSettings(internal_hosts=["listed.localhost"]),
        models=ModelSettings(anthropic=Upstream(base_url="http://127.0.0.1:9", api_key=key)),
    )
    settings.data_dir.mkdir(mode=0o700)
    async with open_yard(settings, database, worker=True) as yard:
        yield yard


@pytest.fixture
def shop(tmp_path: Path) -> Path:
    """A repository with the attacks in it."""
    path = make_repository(tmp_path / "shop")
    shutil.copy(attacks.__file__, path / "attacks.py")
    run_git(path, "add", "attacks.py")
    run_git(path, "commit", "--quiet", "--message", "attacks")
    return path


@pytest.fixture
async def repository(live: Yard, shop: Path) -> str:
    return str(ok(await live.api().post("repositories/", {"origin": str(shop)}), 201)["name"])


@pytest.fixture
def abstract() -> Iterator[str]:
    name = f"taskyard-test-{os.getpid()}-{time.monotonic_ns()}"
    with socket.socket(socket.AF_UNIX) as one:
        one.bind("\0" + name)
        one.listen()
        yield name


def printed(log: list[Json]) -> str:
    """What the agent's commands printed."""
    return json.dumps(updates(log, "tool_call_update"))


def result_of(log: list[Json]) -> Json:
    """The JSON object that a command printed."""
    for update in updates(log, "tool_call_update"):
        text = json.dumps(update.get("content") or "")
        if "kernel_settings" in text:
            [found] = [part["content"]["text"] for part in update["content"] if "content" in part]
            return dict(json.loads(found[found.index("{") : found.rindex("}") + 1]))
    raise AssertionError(f"no result: {log[-5:]}")


async def test_everything_that_a_program_can_try(
    live: Yard, repository: str, tmp_path: Path, abstract: str
) -> None:
    """Attacks 1 to 7, 9 and 15 of the list, and some more, in a run beside which another one lives."""
    api = live.api()
    environment = ok(
        await api.post(
            "sandbox_environments/",
            {
                "name": "Listed",
                "network_access_level": "custom",
                "allowed_domains": ["listed.localhost", "metadata.google.internal", "localtest.invalid"],
            },
        ),
        201,
    )["id"]
    neighbour = await api.start(
        f"WRITE neighbours-own-file x\nSHELL cp neighbours-own-file ~ ; sleep {NAP}", **SCRIPTED
    )
    await eventually(_running, bool, lambda _: "neighbour")
    targets = [
        "unlisted.example:443",
        "listed.localhost:2222",
        "evil-listed.localhost:443",
        "listed.localhost.evil.example:443",
        "127.0.0.1:443",
        "169.254.169.254:80",
        "[::1]:443",
        "metadata.google.internal:80",
        "localhost:443",
    ]
    facts = {
        "canary": CANARY,
        "abstract": abstract,
        "port": int(live.url.rpartition(":")[2]),
        "targets": targets,
        "host_files": [
            str(tmp_path),
            str(live.settings.data_dir),
            "/etc/passwd-",
            "/var/lib",
            "/proc/kcore",
        ],
        "nap": NAP,
        "neighbour_file": "neighbours-own-file",
    }
    run = await api.start(
        f"SHELL python3 attacks.py '{json.dumps(facts)}'\nSAY done",
        repository=repository,
        sandbox_environment_id=environment,
        **SCRIPTED,
    )
    body = await run.status("completed", "failed")
    log = await run.log()
    assert body["status"] == "completed", body["error_message"]
    found = result_of(log)
    answers = found.pop("through_the_proxy")
    assert found == dict.fromkeys(found, HELD)
    assert found.keys() == attacks.ATTACKS.keys() - {"through_the_proxy"}
    # 502 is a listed name that leads nowhere.
    assert {target: status for target, status in answers.items() if status != "403"} in (
        {},
        {"metadata.google.internal:80": "502"},
    )
    refusals = json.dumps(of_method(log, "_posthog/console"))
    assert all(f"refused CONNECT {target}" in refusals for target in targets if answers[target] == "403")
    assert (await neighbour.fetch())["status"] == "in_progress"
    await neighbour.cancel()
    await gone(NAP)


async def _running() -> list[int]:
    return processes_with(NAP)


async def test_a_fork_bomb_does_not_reach_the_neighbour(live: Yard) -> None:
    """Attack 8."""
    api = live.api()
    neighbour = await api.start("SAY ready", mode="interactive", **SCRIPTED)
    await neighbour.turns(1)
    bomb = await api.start(f"SHELL python3 -c {shlex.quote(f'exec({BOMB!r})')} 86398.5", **SCRIPTED)
    await eventually(lambda: _count("86398.5"), lambda n: n > 100, lambda n: f"bomb, {n} processes")
    began = time.monotonic()
    await neighbour.command("user_message", content="SHELL echo $((6*7))\nSAY fine")
    await neighbour.turns(2)
    took = time.monotonic() - began
    assert "42" in printed(await neighbour.log())
    assert took < 20, "the neighbour hardly gets on"
    await bomb.cancel()
    await neighbour.cancel()
    await gone("86398.5")


async def _count(word: str) -> int:
    return len(processes_with(word))


async def test_a_flood_and_a_full_disk(live: Yard) -> None:
    """Attack 10: a full disk ends the run with its own reason; a flood of output reaches the record cut short."""
    flood = await live.api().start("SHELL timeout 3 yes\nSAY done", **SCRIPTED)
    full = await live.api().start(
        "SHELL dd if=/dev/zero of=x bs=1M count=400; sleep 120\nSAY done", **SCRIPTED
    )
    body = await flood.status("completed", "failed")
    size = len(json.dumps(await flood.log()))
    assert (body["status"], body["state"].get("error_type")) in [("completed", None), ("failed", "output")]
    assert size < 12_000_000
    body = await full.status("completed", "failed")
    assert (body["status"], body["state"]["error_type"]) == ("failed", "disk"), body["error_message"]


async def test_what_does_not_want_to_end(live: Yard) -> None:
    """Attack 11, and a program that kills whatever it can."""
    script = "trap '' TERM INT HUP; setsid sleep 86397.25 & kill -9 -1; sleep 86397.25"
    run = await live.api().start(f"IGNORE_SIGTERM\nSHELL {script}", **SCRIPTED)
    await run.logged("86397.25")
    await run.cancel()
    await gone("86397.25")
    await eventually(lambda: _folders(live), lambda names: names == [], lambda names: f"end of {names}")


async def _folders(live: Yard) -> list[str]:
    return sorted(path.name for path in (live.settings.data_dir / "sandboxes").iterdir())


HOSTILE = """
ln -s /etc/shadow link; ln -s /etc folder; mkfifo pipe; truncate -s 100M sparse; touch "$(printf 'new\\nline')";
i=0; while [ $i -lt 300 ]; do : > many-$i; i=$((i+1)); done;
marker=$(cat marker-name);
{ printf '[core]\\nfsmonitor = touch %s\\nhooksPath = hooks\\n' $marker;
printf '[diff]\\nexternal = touch %s\\n[filter "x"]\\nclean = touch %s\\n' $marker $marker; } >> .git/config;
echo '* filter=x' > .gitattributes; mkdir -p hooks .git/hooks;
for hook in pre-commit post-commit pre-push update post-receive; do
printf '#!/bin/sh\\ntouch %s\\n' $marker > hooks/$hook; chmod 755 hooks/$hook; cp hooks/$hook .git/hooks; done;
printf '[submodule "s"]\\npath = s\\nurl = ext::sh -c touch% $marker\\n' > .gitmodules;
echo planted
"""


async def test_planted_files_and_configuration(
    live: Yard, repository: str, shop: Path, tmp_path: Path
) -> None:
    """Attacks 12 and 13: nothing of it runs, or is opened, on the host; the work arrives."""
    outside = tmp_path / "outside"
    outside.mkdir(mode=0o777)
    marker = outside / "marker"
    script = " ".join(HOSTILE.split("\n")).strip()
    run = await live.api().start(
        f"SHELL echo {marker} > marker-name\nSHELL {script}\nWRITE work.txt done\nSAY done",
        repository=repository,
        **SCRIPTED,
    )
    body = await run.status("completed", "failed")
    assert "planted" in printed(await run.log())
    assert body["status"] == "completed", body["error_message"]
    assert run_git(shop, "show", f"{body['branch']}:work.txt") == "done"
    # A link is a link, whatever it leads to.
    assert run_git(shop, "show", f"{body['branch']}:link") == "/etc/shadow"
    assert list(outside.iterdir()) == []


async def test_a_git_folder_that_is_a_link(live: Yard, repository: str, tmp_path: Path) -> None:
    """Attack 14: the next turn works in the same clone."""
    outside = tmp_path / "outside"
    outside.mkdir(mode=0o777)
    run = await live.api().start("WRITE a.txt one", repository=repository, mode="interactive", **SCRIPTED)
    await run.turns(1)
    await run.command(
        "user_message", content=f"SHELL mv .git g; ln -s /oldroot{outside} .git; ls -la; echo moved"
    )
    await run.turns(2)
    await run.command("user_message", content="WRITE b.txt two")
    await run.turns(3)
    assert "moved" in printed(await run.log())
    assert list(outside.iterdir()) == []
    assert (await run.fetch())["status"] == "in_progress"
    await run.cancel()
