"""Runs in containers of a real engine, through the whole server; the scripted agent stands in for a real one."""

from __future__ import annotations

import signal
from contextlib import ExitStack
from pathlib import Path

import pytest

from taskyard.db.engine import Database
from taskyard.errors import SetupError
from taskyard.settings import AgentSettings, RateLimitSettings, RunSettings, Settings
from taskyard.worker import checked_provider
from tests.conftest import make_settings
from tests.support import docker_keeper
from tests.support.docker import docker_settings
from tests.support.processes import agents_of
from tests.support.repositories import heads, make_repository, run_git
from tests.support.site import running_worker_process
from tests.support.yard import Yard, eventually, of_method, ok, open_yard, said

SCRIPTED = {"agent": "scripted"}
UNLIMITED = RateLimitSettings(enabled=False)


@pytest.fixture
def settings(tmp_path: Path, database_url: str, run_settings: RunSettings, docker_host: str) -> Settings:
    return make_settings(
        tmp_path / "data",
        database_url,
        runs=run_settings,
        rate_limits=UNLIMITED,
        sandbox=docker_settings(docker_host),
    )


async def test_work_arrives_as_a_branch_and_goes_on_in_another_run(
    live: Yard, shop: Path, repository: str
) -> None:
    before = heads(shop)
    run = await live.api().start("WRITE notes/a.txt one\nSAY done", repository=repository, **SCRIPTED)
    body = await run.status("completed", "failed")
    assert (body["status"], body["error_message"]) == ("completed", None)
    branch = body["output"]["head_branch"]
    assert heads(shop) == before | {branch: body["output"]["commit_sha"]}
    assert run_git(shop, "show", f"{branch}:notes/a.txt") == "one"

    text = "SHELL cat notes/a.txt\nWRITE notes/b.txt two"
    again = {"resume_from_run_id": run.id, "pending_user_message": text}
    started = ok(await live.api().post(f"tasks/{run.task_id}/run/", again | SCRIPTED))
    follow = type(run)(run.api, run.task_id, started["latest_run"]["id"])
    body = await follow.status("completed", "failed")
    assert (body["status"], body["error_message"]) == ("completed", None)
    assert run_git(shop, "show", f"{body['output']['head_branch']}:notes/a.txt") == "one"
    assert run_git(shop, "show", f"{body['output']['head_branch']}:notes/b.txt") == "two"

    async def left() -> list[str]:
        return [path.name for path in (live.settings.data_dir / "sandboxes").iterdir()]

    await eventually(left, lambda names: names == [], lambda names: f"end of {names}")
    assert agents_of(follow.id) == []


async def test_the_image_of_the_environment(live: Yard) -> None:
    api = live.api()
    made = ok(await api.post("sandbox_environments/", {"name": "e", "image": "no-such-image:3"}), 201)
    wanted = {"sandbox_environment_id": made["id"], **SCRIPTED}
    body = await (await api.start("SAY hi", **wanted)).status("failed")
    assert body["state"]["error_type"] == "sandbox_failed"
    assert "no image 'no-such-image:3'" in body["error_message"]
    ok(await api.patch(f"sandbox_environments/{made['id']}/", {"image": docker_keeper.IMAGE}))
    assert (await (await api.start("SAY hi", **wanted)).status("completed", "failed"))[
        "status"
    ] == "completed"


class TestMemory:
    @pytest.fixture
    def settings(self, tmp_path: Path, database_url: str, docker_host: str) -> Settings:
        eater = AgentSettings(command=["python3", "-c", "x = bytearray(400_000_000)"])
        sandbox = docker_settings(docker_host).model_copy(update={"memory_mb": 128})
        return make_settings(tmp_path / "data", database_url, agents={"eater": eater}, sandbox=sandbox)

    async def test_a_run_that_needs_too_much_memory_says_so(self, live: Yard) -> None:
        run = await live.api().start("anything", agent="eater")
        body = await run.status("failed")
        assert body["state"]["error_type"] == "oom"
        assert "TASKYARD_SANDBOX__MEMORY_MB" in body["error_message"]


class TestImage:
    @pytest.fixture
    def settings(self, tmp_path: Path, database_url: str, docker_host: str) -> Settings:
        other = docker_settings(docker_host, image="taskyard-none")
        return make_settings(tmp_path / "data", database_url, sandbox=other)

    async def test_a_worker_without_its_image_does_not_start(self, settings: Settings) -> None:
        with pytest.raises(SetupError, match=r"no image 'taskyard-none'(.|\n)*docker build"):
            await checked_provider(settings)


async def test_a_killed_worker_leaves_a_sandbox_that_the_next_goes_on_with(
    tmp_path: Path, database_url: str, database: Database, docker_host: str
) -> None:
    shop = make_repository(tmp_path / "shop")
    env = {
        "TASKYARD_DATABASE_URL": database_url,
        "TASKYARD_RUNS__CHECKPOINT_S": "0.5",
        "TASKYARD_SANDBOX__PROVIDER": "docker",
        "TASKYARD_SANDBOX__DOCKER__HOST": docker_host,
        "TASKYARD_SANDBOX__DOCKER__IMAGE": docker_keeper.IMAGE,
    }
    settings = make_settings(tmp_path / "api", database_url, rate_limits=UNLIMITED)
    async with open_yard(settings, database) as yard:
        name = ok(await yard.api().post("repositories/", {"origin": str(shop)}), 201)["name"]
        worker_folder = tmp_path / "worker"
        worker_folder.mkdir()
        objects = tmp_path / "api" / "objects"
        objects.mkdir(parents=True, exist_ok=True)
        (worker_folder / "objects").symlink_to(objects)
        text = "WRITE first.txt one\nSHELL touch ~/kept\nSLEEP 6\nSHELL ls ~\nWRITE second.txt two\nSAY Done."
        with ExitStack() as stack:
            first = stack.enter_context(running_worker_process(worker_folder, **env))
            run = await yard.api().start(text, repository=name, **SCRIPTED)
            await eventually(
                lambda: database.fetch("SELECT 1 FROM checkpoints WHERE parts ? 'workspace'"),
                bool,
                lambda _: "checkpoint",
            )
            await run.shown("touch")
            first.send_signal(signal.SIGKILL)
            first.wait(60)
            stack.enter_context(running_worker_process(worker_folder, **env))
            body = await run.status("completed", "failed")
        assert (body["status"], body["error_message"]) == ("completed", None)
        for file, content in (("first.txt", "one"), ("second.txt", "two")):
            assert run_git(shop, "show", f"{body['output']['head_branch']}:{file}").strip() == content
        log = await run.log()
        assert "Done." in said(log)
        assert len(of_method(log, "_posthog/session/resume")) == 1
        # No checkpoint has it: it is the same home.
        assert "kept" in await run.stream_text()
        assert agents_of(run.id) == []


class TestEngine:
    """With an engine of its own, since it is ended."""

    @pytest.fixture
    def settings(self, tmp_path: Path, database_url: str, own_docker_folder: Path) -> Settings:
        host = f"unix://{own_docker_folder}/docker.sock"
        return make_settings(
            tmp_path / "data", database_url, rate_limits=UNLIMITED, sandbox=docker_settings(host)
        )

    async def test_an_engine_that_restarts_in_mid_run(
        self, live: Yard, shop: Path, repository: str, own_docker_folder: Path
    ) -> None:
        text = "WRITE first.txt one\nSLEEP 4\nWRITE second.txt two\nSAY Done."
        run = await live.api().start(text, repository=repository, **SCRIPTED)
        await run.shown("first.txt")
        docker_keeper.end_engine(own_docker_folder)
        docker_keeper.start(own_docker_folder)
        body = await run.status("completed", "failed")
        assert (body["status"], body["error_message"]) == ("completed", None)
        for file, content in (("first.txt", "one"), ("second.txt", "two")):
            assert run_git(shop, "show", f"{body['output']['head_branch']}:{file}").strip() == content

    async def test_an_engine_that_is_away(self, live: Yard, own_docker_folder: Path) -> None:
        docker_keeper.end_engine(own_docker_folder)
        run = await live.api().start("SAY x", **SCRIPTED)
        body = await run.status("failed")
        assert body["state"]["error_type"] == "sandbox_failed"
        assert "does not answer" in body["error_message"]
        docker_keeper.start(own_docker_folder)
        run = await live.api().start("SAY x", **SCRIPTED)
        assert (await run.status("completed", "failed"))["status"] == "completed"
