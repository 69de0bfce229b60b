"""Runs that go to a client and come back, and runs that are completed by their output (run-lifecycle §1.4, §9)."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest

from taskyard.settings import RunSettings
from tests.support.git_http import git_server
from tests.support.repositories import heads, make_bare, make_repository, run_git
from tests.support.yard import Run, Yard, eventually, of_method, ok, said

INTERACTIVE = {"agent": "scripted", "mode": "interactive"}


async def released(run: Run) -> None:
    """Wait until no worker has the run."""

    async def held() -> bool:
        row = await run.api.database.fetch_one(
            "SELECT leased_until FROM run_cursors WHERE run_id = %(run)s", run=run.id
        )
        return row is not None and row["leased_until"] is not None

    await eventually(held, lambda still: not still, lambda _: "end of the lease")


def sandboxes(yard: Yard) -> list[str]:
    folder = yard.settings.data_dir / "sandboxes"
    return [path.name for path in folder.iterdir()] if folder.is_dir() else []


async def test_there_and_back(live: Yard, shop: Path, repository: str) -> None:
    run = await live.api().start(
        "WRITE a.txt from the cloud\nSAY before\nSLEEP 60", repository=repository, **INTERACTIVE
    )
    await eventually(run.stream_text, lambda text: "agent_message_chunk" in text, lambda text: text)
    streaming = asyncio.ensure_future(run.stream())
    body = await run.patch(environment="local")
    assert (body["environment"], body["status"], body["completed_at"]) == ("local", "in_progress", None)
    await released(run)
    assert sandboxes(live) == []
    # The status is the client's now; the work so far is on the branch, where it can fetch it.
    body = await run.fetch()
    assert (body["status"], body["error_message"], body["environment"]) == ("in_progress", None, "local")
    assert run_git(shop, "show", f"{body['output']['head_branch']}:a.txt") == "from the cloud"
    await run.append({"type": "notification", "notification": {"method": "local/step"}})
    assert not streaming.done()

    body = ok(await run.api.post(run.path("resume_in_cloud/")))
    assert (body["environment"], body["status"]) == ("cloud", "queued")
    await eventually(
        run.log,
        lambda log: len(of_method(log, "_posthog/run_started")) == 2,
        lambda log: f"a second start in {log[-3:]}",
    )
    # It was begun before: the description is not worked on again.
    await run.command("user_message", content="SAY after")
    await run.turns(1)
    assert said(await run.log()) == "before\nafter"
    await run.cancel()
    states = [event["status"] for _, event in await streaming if event["type"] == "task_run_state"]
    assert (states[0], states[-1]) == ("queued", "cancelled")


async def test_work_is_published_after_the_way_back(live: Yard, shop: Path, repository: str) -> None:
    """The run's branch has its own commits by then: the run goes on from them, and they are not its base."""
    run = await live.api().start("WRITE a.txt one\nSAY one", repository=repository, **INTERACTIVE)
    await run.turns(1)
    await there_and_back(run)
    await run.command("user_message", content="SHELL cat a.txt\nWRITE b.txt two\nSAY two")
    await run.turns(2)
    published = [
        step for step in of_method(await run.log(), "_posthog/progress") if step["step"] == "publish"
    ]
    assert [(step["status"], step["detail"]) for step in published] == [("completed", "1 commit")] * 2
    body = await run.fetch()
    branch = body["output"]["head_branch"]
    assert heads(shop)[branch] == body["output"]["commit_sha"]
    assert run_git(shop, "ls-tree", "--name-only", branch).split() == ["README.md", "a.txt", "b.txt"]
    assert body["state"]["pr_base_branch"] == "main"
    await run.cancel()


async def test_a_resumed_run_keeps_its_own_work_on_the_way_back(
    live: Yard, shop: Path, repository: str
) -> None:
    first = await live.api().start("WRITE a.txt one\nSAY one", repository=repository, agent="scripted")
    await first.status("completed")
    await released(first)
    body = {"resume_from_run_id": first.id, "pending_user_message": "WRITE b.txt two\nSAY two", **INTERACTIVE}
    task = ok(await live.api().post(f"tasks/{first.task_id}/run/", body))
    run = Run(live.api(), first.task_id, task["latest_run"]["id"])
    await run.turns(2)  # the log begins with that of the other run
    await there_and_back(run)
    await run.command("user_message", content="WRITE c.txt three\nSAY three")
    await run.turns(3)
    branch = (await run.fetch())["output"]["head_branch"]
    files = run_git(shop, "ls-tree", "--name-only", branch).split()
    assert files == ["README.md", "a.txt", "b.txt", "c.txt"]
    await run.cancel()


async def there_and_back(run: Run) -> None:
    await run.patch(environment="local")
    await released(run)
    ok(await run.api.post(run.path("resume_in_cloud/")))


class TestPush:
    @pytest.fixture
    def run_settings(self) -> RunSettings:
        return RunSettings(checkpoint_s=3600)

    async def test_what_the_agent_pushed_before_a_cancel_stays(self, live: Yard, tmp_path: Path) -> None:
        (tmp_path / "served" / "acme").mkdir(parents=True)
        bare = make_bare(tmp_path / "served" / "acme" / "shop.git", make_repository(tmp_path / "source"))
        with git_server(tmp_path / "served") as server:
            origin = {"origin": f"{server.url}/acme/shop.git"}
            name = ok(await live.api().post("repositories/", origin), 201)["name"]
            run = await live.api().start("WRITE a.txt one\nSAY one", repository=name, **INTERACTIVE)
            await run.turns(1)
            branch = f"taskyard/tes-0-{run.id[:8]}"
            one = heads(bare)[branch]
            push = f"WRITE b.txt two\nCOMMIT b\nSHELL git push origin HEAD:refs/heads/{branch}\nSLEEP 60"
            await run.command("user_message", content=push)

            async def tip() -> str:
                return heads(bare)[branch]

            two = await eventually(tip, lambda commit: commit != one, lambda _: "push of the agent")
            await run.cancel()
            await released(run)
            ok(await run.api.post(run.path("resume_in_cloud/")))
            await run.command("user_message", content="WRITE c.txt three\nSAY three")
            await eventually(tip, lambda commit: commit != two, lambda _: "publication")
            await run.cancel()
        assert run_git(bare, "log", "--format=%H", f"main..{branch}").split()[1:] == [two, one]


async def test_a_local_run_begins_in_the_cloud(live: Yard) -> None:
    api = live.api()
    run = await api.create_run(await api.create_task(description="SAY from the start"), agent="scripted")
    ok(await api.post(run.path("resume_in_cloud/")))
    await run.turns(1)
    assert said(await run.log()) == "from the start"
    assert (await run.fetch())["status"] == "in_progress"


async def test_resumed_while_the_old_worker_cleans_up(live: Yard) -> None:
    run = await live.api().start("IGNORE_SIGTERM\nSAY first\nSLEEP 60", **INTERACTIVE)
    await eventually(run.stream_text, lambda text: "agent_message_chunk" in text, lambda text: text)
    await run.cancel()
    # The worker has written what was said; its agent takes its time to end.
    await eventually(run.log, lambda log: said(log) == "first", lambda log: f"'first' in {log[-3:]}")
    ok(await run.api.post(run.path("resume_in_cloud/")))
    await run.command("user_message", content="SAY second")
    await run.turns(1)
    await run.patch(status="completed")
    await run.stream()
    body = await run.fetch()
    assert (body["status"], body["error_message"]) == ("completed", None)
    assert said(await run.log()) == "first\nsecond"
    await released(run)
    assert sandboxes(live) == []


async def test_a_created_run_is_started(live: Yard) -> None:
    api = live.api()
    run = await api.create_run(
        await api.create_task(description="SAY no"), environment="cloud", agent="scripted"
    )
    ok(await api.post(run.path("start/"), {"pending_user_message": "SAY yes"}))
    body = await run.status("completed", "failed")
    assert (body["status"], said(await run.log())) == ("completed", "yes")
    assert "pending_user_message" not in body["state"]


async def test_an_output_completes_a_driven_run(live: Yard, shop: Path, repository: str) -> None:
    api = live.api()
    task = await api.create_task(
        description="WRITE a.txt one\nSAY busy\nSLEEP 60",
        repository=repository,
        json_schema={"type": "object"},
    )
    started = ok(await api.post(f"tasks/{task['id']}/run/", {"agent": "scripted"}))["latest_run"]
    run = Run(api, task["id"], started["id"])
    await eventually(run.stream_text, lambda text: "agent_message_chunk" in text, lambda text: text)
    body = ok(await api.patch(run.path("set_output/"), {"output": {"answer": 42}}))
    assert (body["status"], body["output"]) == ("in_progress", {"answer": 42})
    body = await run.status("completed", "failed")
    assert (body["status"], body["error_message"], body["output"]["answer"]) == ("completed", None, 42)
    # What the agent had done by then is not lost.
    assert heads(shop)[body["branch"]] == body["output"]["commit_sha"]
    assert run_git(shop, "show", f"{body['branch']}:a.txt") == "one"
    assert (await run.stream())[-1][1]["status"] == "completed"


class TestHeartbeat:
    @pytest.fixture
    def run_settings(self) -> RunSettings:
        return RunSettings(inactivity_s=3.0)

    async def test_who_appends_keeps_the_run_alive(self, live: Yard) -> None:
        run = await live.api().start("SAY hi", **INTERACTIVE)
        await run.turns(1)
        end = time.monotonic() + 7
        while time.monotonic() < end:
            await run.append({"type": "info"})
            assert (await run.fetch())["status"] == "in_progress"
            await asyncio.sleep(0.5)
        body = await run.status("completed")
        assert body["state"]["timed_out_inactivity"] is True
        assert body["error_message"] == "Run timed out due to inactivity"
