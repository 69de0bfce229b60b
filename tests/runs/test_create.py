"""`POST T/runs/`, and what `POST T/run/` inherits and checks (tasks-api §4.8.2, §5.2)."""

from __future__ import annotations

import asyncio
import uuid
from typing import Any

import pytest

from taskyard.environments.secrets import opening_box
from tests.support.yard import Api, Json, Run, Yard, error, ok

CLAUDE = {"runtime_adapter": "claude", "model": "claude-sonnet-4-6"}


async def run_task(api: Api, task: Json, **body: Any) -> Json:
    return dict(ok(await api.post(f"tasks/{task['id']}/run/", body))["latest_run"])


async def refused(api: Api, task: Json, body: Json, rest: str = "run/") -> Json:
    """The body of a 400; nothing must have been made."""
    before = ok(await api.get(f"tasks/{task['id']}/runs/"))["count"]
    response = await api.post(f"tasks/{task['id']}/{rest}", body)
    assert response.status_code == 400, response.text
    assert ok(await api.get(f"tasks/{task['id']}/runs/"))["count"] == before
    return dict(response.json())


async def jobs(yard: Yard, run_id: str) -> int:
    row = await yard.database.fetch_one(
        "SELECT count(*) AS n FROM run_queue WHERE run_id = %(run)s", run=run_id
    )
    assert row is not None
    return int(row["n"])


async def test_created_not_started(yard: Yard) -> None:
    api = yard.api()
    task = await api.create_task()
    made = ok(await api.post(f"tasks/{task['id']}/runs/"), 201)
    assert (made["task"], made["status"], made["environment"], made["state"], made["completed_at"]) == (
        task["id"], "queued", "local", {"mode": "background"}, None,
    )  # fmt: skip
    assert ok(await api.get(f"tasks/{task['id']}/"))["latest_run"] == made
    assert await jobs(yard, made["id"]) == 0
    run = Run(api, task["id"], made["id"])
    await run.cancel()
    assert [event["status"] for _, event in await run.stream()] == ["queued", "cancelled"]


async def test_all_fields(yard: Yard) -> None:
    api = yard.api()
    task = await api.create_task()
    sent = {
        **CLAUDE, "reasoning_effort": "low", "mode": "interactive", "run_source": "manual", "signal_report_id": "s",
        "initial_permission_mode": "plan", "pr_authorship_mode": "bot",
    }  # fmt: skip
    body = {**sent, "environment": "cloud", "branch": " main ", "resume_from_run_id": "ignored"}
    made = ok(await api.post(f"tasks/{task['id']}/runs/", body), 201)
    assert made["state"] == {**sent, "provider": "anthropic", "pr_base_branch": "main"}
    assert (made["environment"], made["branch"], made["provider"]) == ("cloud", "main", "anthropic")


async def test_missing_and_deleted_tasks(yard: Yard) -> None:
    api = yard.api()
    run = await api.create_run()
    assert (await api.request("DELETE", f"tasks/{run.task_id}/")).status_code == 204
    for task_id in (uuid.uuid4(), run.task_id):
        path = f"tasks/{task_id}/runs/"
        assert error(await api.post(path, {}), 404, "not_found")["detail"] == "Task not found"
        error(await api.post(path, {"model": "m"}), 400, "invalid_input", "runtime_adapter")
        error(await api.post(f"tasks/{task_id}/run/", {}), 404, "not_found")
        for rest in ("run/", "runs/"):
            error(
                await api.post(f"tasks/{task_id}/{rest}", {"agent": "nobody"}), 400, "invalid_input", "agent"
            )
    # Its agent may finish what it does.
    assert (await run.patch(status="completed"))["status"] == "completed"
    error(await api.post(run.path("resume_in_cloud/")), 404, "not_found")


async def test_other_keys(yard: Yard) -> None:
    run = await yard.api().create_run()
    error(await yard.api("eve", yard.other_project).post(f"tasks/{run.task_id}/runs/", {}), 404, "not_found")
    error(await yard.api("task:read").post(f"tasks/{run.task_id}/runs/", {}), 403, "permission_denied")
    error(await yard.api(None).post(f"tasks/{run.task_id}/runs/", {}), 401, "not_authenticated")


async def test_many_at_once_are_each_answered_with_their_own_run(yard: Yard) -> None:
    api = yard.api()
    task = await api.create_task()
    answers = await asyncio.gather(*(run_task(api, task, branch=f"b{n}") for n in range(20)))
    # Whose row comes first into the table is not who comes first to the task.
    assert [run["branch"] for run in answers] == [f"b{n}" for n in range(20)]
    newest = ok(await api.get(f"tasks/{task['id']}/runs/?limit=1"))["results"][0]
    assert ok(await api.get(f"tasks/{task['id']}/"))["latest_run"] == newest


class TestResume:
    async def test_what_is_inherited(self, yard: Yard) -> None:
        api = yard.api()
        task = await api.create_task()
        first = {
            **CLAUDE, "reasoning_effort": "high", "run_source": "manual", "signal_report_id": "r1",
            "pr_authorship_mode": "bot",
        }  # fmt: skip
        old = await run_task(
            api, task, **first, branch="dev", mode="interactive", initial_permission_mode="plan"
        )
        await yard.database.execute(
            'UPDATE runs SET state = state || \'{"snapshot_external_id": "snap"}\' WHERE id = %(run)s',
            run=old["id"],
        )
        new = await run_task(api, task, resume_from_run_id=old["id"])
        assert new["state"] == {
            **first, "mode": "background", "provider": "anthropic", "pr_base_branch": "dev",
            "resume_from_run_id": old["id"], "snapshot_external_id": "snap",
        }  # fmt: skip
        assert new["branch"] == "dev"

    async def test_limits_of_spending_are_inherited(self, yard: Yard) -> None:
        """A run that resumes is no way around them; whoever starts it may say otherwise."""
        api = yard.api()
        task = await api.create_task()
        limits = {"budget_cost": 0.5, "budget_tokens": 1000, "allowed_models": ["claude-*"]}
        old = await run_task(api, task, **limits)
        assert {key: old["state"][key] for key in limits} == limits
        patched = await Run(api, task["id"], old["id"]).patch(
            state={"budget_cost": 9, "allowed_models": ["*"]}, state_remove_keys=["budget_tokens"]
        )
        assert patched["state"] == old["state"]
        new = await run_task(api, task, resume_from_run_id=old["id"], budget_cost=2)
        assert {key: new["state"][key] for key in limits} == limits | {"budget_cost": 2}

    async def test_the_request_wins(self, yard: Yard) -> None:
        api = yard.api()
        task = await api.create_task()
        old = await run_task(api, task, **CLAUDE, branch="dev", run_source="manual")
        asked = {
            "runtime_adapter": "codex",
            "model": "gpt-5.4",
            "branch": "main",
            "run_source": "signal_report",
        }
        new = await run_task(api, task, resume_from_run_id=old["id"], **asked)
        assert (new["runtime_adapter"], new["model"], new["provider"], new["branch"]) == (
            "codex", "gpt-5.4", "openai", "main",
        )  # fmt: skip
        assert (new["state"]["run_source"], new["state"]["pr_authorship_mode"]) == ("signal_report", "bot")

    async def test_the_effort_is_checked_again(self, yard: Yard) -> None:
        api = yard.api()
        task = await api.create_task()
        old = await run_task(
            api, task, runtime_adapter="claude", model="claude-opus-4-7", reasoning_effort="max"
        )
        body = {"resume_from_run_id": old["id"], "runtime_adapter": "codex", "model": "gpt-5.4"}
        answer = await refused(api, task, body)
        assert (answer["attr"], answer["code"]) == ("reasoning_effort", "invalid_input")
        assert answer["detail"] == (
            "Reasoning effort 'max' is not supported for runtime_adapter 'codex' and model 'gpt-5.4'. "
            "Supported values: low, medium, high."
        )

    async def test_only_runs_of_the_task(self, yard: Yard) -> None:
        api = yard.api()
        task, other = await api.create_task(), await api.create_run()
        for wanted in (other.id, str(uuid.uuid4())):
            assert await refused(api, task, {"resume_from_run_id": wanted}) == {
                "detail": "Invalid resume_from_run_id"
            }

    async def test_nonsense_in_the_old_state_is_left_out(self, yard: Yard) -> None:
        api = yard.api()
        task = await api.create_task()
        old = await api.create_run(task)
        await old.patch(
            state={
                "runtime_adapter": 7, "model": {"x": 1}, "reasoning_effort": "heroic", "run_source": [],
                "pr_base_branch": " ", "signal_report_id": None, "agent": 3,
            }
        )  # fmt: skip
        new = await run_task(api, task, resume_from_run_id=old.id)
        assert new["state"] == {"mode": "background", "resume_from_run_id": old.id}
        await old.patch(state=[1, 2])
        assert (await run_task(api, task, resume_from_run_id=old.id))["state"] == new["state"]


class TestAuthorship:
    async def test_user_needs_github(self, yard: Yard) -> None:
        api = yard.api()
        task = await api.create_task(repository="acme/shop")
        for rest in ("run/", "runs/"):
            answer = await refused(api, task, {"pr_authorship_mode": "user"}, rest)
            assert (answer["type"], answer["code"], answer["attr"]) == (
                "validation_error", "github_authorization_required", "pr_authorship_mode",
            )  # fmt: skip

    async def test_what_passes(self, yard: Yard) -> None:
        api = yard.api()
        task = await api.create_task(repository="acme/shop")
        token = {"pr_authorship_mode": "user", "github_user_token": "ghu_secret"}
        for body in ({}, {"pr_authorship_mode": "bot"}, token):
            run = await run_task(api, task, **body)
            assert "ghu_secret" not in str(run)
        bare = await api.create_task()
        assert (await run_task(api, bare, pr_authorship_mode="user"))["state"]["pr_authorship_mode"] == "user"

    async def test_a_registered_repository_needs_no_github(self, yard: Yard) -> None:
        api = yard.api()
        await yard.database.execute(
            "INSERT INTO repositories (project_id, name, origin) VALUES (%(project)s, 'acme/shop', 'https://x.test/s')",
            project=yard.project,
        )
        task = await api.create_task(repository="acme/shop")
        assert (await run_task(api, task, pr_authorship_mode="user"))["state"]["pr_authorship_mode"] == "user"

    async def test_inherited_user_is_checked_too(self, yard: Yard) -> None:
        api = yard.api()
        task = await api.create_task(repository="acme/shop")
        old = await run_task(api, task, pr_authorship_mode="user", github_user_token="ghu_secret")
        assert (await refused(api, task, {"resume_from_run_id": old["id"]}))[
            "code"
        ] == "github_authorization_required"

    async def test_a_return_to_the_cloud_is_checked_too(self, yard: Yard) -> None:
        api = yard.api()
        task = await api.create_task(repository="acme/shop")
        asked = {"pr_authorship_mode": "user", "github_user_token": "ghu_secret"}
        run = Run(api, task["id"], (await run_task(api, task, **asked))["id"])
        await run.patch(environment="local", status="in_progress")
        await yard.database.execute("UPDATE run_user_tokens SET expires_at = expires_at - interval '1 day'")
        answer = error(
            await api.post(run.path("resume_in_cloud/")),
            400,
            "github_authorization_required",
            "pr_authorship_mode",
        )
        assert answer["type"] == "validation_error"
        assert (await run.fetch())["environment"] == "local"
        await yard.database.execute("UPDATE run_user_tokens SET expires_at = expires_at + interval '1 day'")
        assert ok(await api.post(run.path("resume_in_cloud/")))["environment"] == "cloud"

    async def test_the_token_is_kept_encrypted_for_user_work_only(self, yard: Yard) -> None:
        api = yard.api()
        task = await api.create_task(repository="acme/shop")
        by_default = await run_task(api, task, github_user_token="ghu_one")
        await run_task(api, task, github_user_token="ghu_two", pr_authorship_mode="bot")
        [row] = await yard.database.fetch(
            "SELECT *, extract(epoch FROM expires_at - clock_timestamp()) AS left FROM run_user_tokens"
        )
        assert str(row["run_id"]) == by_default["id"]
        assert b"ghu_one" not in bytes(row["token"])
        assert (await opening_box(yard.settings)).open(bytes(row["token"])) == "ghu_one"
        assert 5.9 * 3600 < row["left"] <= 6 * 3600
        events = await yard.database.fetch("SELECT data FROM events WHERE data LIKE '%%ghu_%%'")
        assert events == []
        await yard.database.execute(
            "UPDATE run_user_tokens SET expires_at = clock_timestamp() - interval '1 s'"
        )
        await run_task(api, task, github_user_token="ghu_three")
        assert len(await yard.database.fetch("SELECT 1 FROM run_user_tokens")) == 1


class TestEnvironments:
    async def make(self, api: Api, **body: Any) -> str:
        return str(ok(await api.post("sandbox_environments/", {"name": "env", **body}), 201)["id"])

    async def test_of_whom(self, yard: Yard) -> None:
        ada, bob = yard.api(), yard.api("bob")
        task = await ada.create_task()
        mine, public = await self.make(ada), await self.make(bob, private=False)
        for environment in (mine, public):
            run = await run_task(ada, task, sandbox_environment_id=environment)
            assert run["state"]["sandbox_environment_id"] == environment
        # The task's creator decides, whoever starts the run.
        assert (await run_task(bob, task, sandbox_environment_id=mine))["state"][
            "sandbox_environment_id"
        ] == mine
        theirs = await self.make(bob)
        foreign = await self.make(yard.api("eve", yard.other_project), private=False)
        for environment in (theirs, foreign, str(uuid.uuid4())):
            for rest in ("run/", "runs/"):
                answer = await refused(ada, task, {"sandbox_environment_id": environment}, rest)
                assert answer == {"detail": "Invalid sandbox_environment_id"}

    async def test_an_inherited_one_that_is_gone_is_dropped(self, yard: Yard) -> None:
        api = yard.api()
        task = await api.create_task()
        environment = await self.make(api)
        old = await run_task(api, task, sandbox_environment_id=environment)
        new = await run_task(api, task, resume_from_run_id=old["id"])
        assert new["state"]["sandbox_environment_id"] == environment
        assert (await api.request("DELETE", f"sandbox_environments/{environment}/")).status_code == 204
        assert (
            "sandbox_environment_id" not in (await run_task(api, task, resume_from_run_id=old["id"]))["state"]
        )


@pytest.mark.parametrize(
    ("body", "code", "attr"),
    [
        ({"environment": "moon"}, "invalid_choice", "environment"),
        ({"environment": None}, "null", "environment"),
        ({"github_user_token": " "}, "blank", "github_user_token"),
        ({"run_source": "elsewhere"}, "invalid_choice", "run_source"),
        ({"signal_report_id": ""}, "blank", "signal_report_id"),
        ({"agent": "nobody"}, "invalid_input", "agent"),
        ({"branch": "a\0b"}, "null_characters_not_allowed", "branch"),
        ({"priority": 101}, "max_value", "priority"),
        ({"priority": "first"}, "invalid_input", "priority"),
        ({"priority": None}, "null", "priority"),
        ({"budget_cost": 0}, "min_value", "budget_cost"),
        ({"budget_cost": "much"}, "invalid_input", "budget_cost"),
        ({"budget_cost": 1_000_001}, "max_value", "budget_cost"),
        ({"budget_cost": None}, "null", "budget_cost"),
        ({"budget_tokens": 1.5}, "invalid_input", "budget_tokens"),
        ({"allowed_models": []}, "empty", "allowed_models"),
        ({"allowed_models": "claude"}, "not_a_list", "allowed_models"),
        ({"allowed_models": [" "]}, "blank", "allowed_models__0"),
    ],
)
async def test_bad_fields(yard: Yard, body: Json, code: str, attr: str) -> None:
    api = yard.api()
    task = await api.create_task()
    answer = await refused(api, task, body, "runs/")
    assert (answer["code"], answer["attr"]) == (code, attr)
    assert "Input should" not in answer["detail"], "the words of the library, not of the contract"


async def test_bad_artifact_ids(yard: Yard) -> None:
    api = yard.api()
    task = await api.create_task()
    for ids, code, attr in (
        (["a" * 129], "max_length", "pending_user_artifact_ids__0"),
        (["ok", " "], "blank", "pending_user_artifact_ids__1"),
        (None, "null", "pending_user_artifact_ids"),
    ):
        answer = await refused(api, task, {"pending_user_artifact_ids": ids})
        assert (answer["code"], answer["attr"]) == (code, attr)
