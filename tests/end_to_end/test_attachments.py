"""Files that come with messages reach the agent (tasks-api §4.8.2, §6.6; run-lifecycle §5.2)."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import pytest

from taskyard.drive import attachments
from taskyard.drive.attachments import AttachmentError, deliver
from taskyard.objects.interface import Content
from tests.support.repositories import run_git
from tests.support.sandboxes import Hut, shell
from tests.support.yard import Api, Json, Run, Yard, ok, updates

SCRIPTED = {"agent": "scripted"}


async def stage(api: Api, task: Json, name: str, data: bytes) -> str:
    """Upload a file for the next run of a task, as clients do; its id."""
    item = {"name": name, "type": "user_attachment", "size": len(data), "content_type": "text/plain"}
    path = f"tasks/{task['id']}/staged_artifacts/"
    prepared = ok(await api.post(f"{path}prepare_upload/", {"artifacts": [item]}))["artifacts"][0]
    form = prepared["presigned_post"]
    uploaded = await api.client.post(form["url"], data=form["fields"], files={"file": (name, data)})
    assert uploaded.status_code == 204, uploaded.text
    entry = {key: prepared[key] for key in ("id", "name", "type", "source", "content_type", "storage_path")}
    ok(await api.post(f"{path}finalize_upload/", {"artifacts": [entry]}))
    return str(prepared["id"])


async def test_staged_files_come_with_the_first_message(live: Yard, shop: Path, repository: str) -> None:
    api = live.api()
    task = await api.create_task(repository=repository)
    found = await stage(api, task, "what to do.txt", b"attached text")
    script = "SHELL cat .posthog/attachments/*/*/'what to do.txt' > copy.txt; cat copy.txt"
    sent = {**SCRIPTED, "pending_user_message": script, "pending_user_artifact_ids": [found, found]}
    started = ok(await api.post(f"tasks/{task['id']}/run/", sent))["latest_run"]
    assert [entry["id"] for entry in started["artifacts"]] == [found]
    run = Run(api, task["id"], started["id"])
    body = await run.status("completed", "failed")
    assert (body["status"], body["error_message"]) == ("completed", None)
    assert "pending_user_artifact_ids" not in body["state"]
    assert run_git(shop, "ls-tree", "-r", "--name-only", body["branch"]).split() == ["README.md", "copy.txt"]
    assert run_git(shop, "show", f"{body['branch']}:copy.txt") == "attached text"
    [text, link] = [update["content"] for update in updates(await run.log(), "user_message_chunk")]
    assert text == {"type": "text", "text": script}
    assert (link["type"], link["name"], link["mimeType"], link["size"]) == (
        "resource_link", "what to do.txt", "text/plain", 13,
    )  # fmt: skip
    assert link["uri"].endswith(f"/.posthog/attachments/{run.id}/{found}/what%20to%20do.txt")
    # They can be taken once.
    again = await api.post(f"tasks/{task['id']}/run/", {"pending_user_artifact_ids": [found]})
    assert (again.status_code, again.json()) == (
        400,
        {"detail": "Some pending_user_artifact_ids are invalid or expired", "missing_artifact_ids": [found]},
    )
    assert ok(await api.get(f"tasks/{task['id']}/runs/"))["count"] == 1


async def test_files_of_the_run_come_with_a_command(live: Yard) -> None:
    api = live.api()
    run = await api.start("SAY ready", mode="interactive", **SCRIPTED)
    await run.turns(1)
    item = {"name": "notes.txt", "type": "user_attachment", "content": "from the command"}
    [entry] = ok(await api.post(run.path("artifacts/"), {"artifacts": [item]}))["artifacts"]
    assert await run.command("user_message", artifact_ids=[entry["id"]]) == {
        "jsonrpc": "2.0", "id": 1, "result": {"queued": True},
    }  # fmt: skip
    await run.turns(2)
    await run.command("user_message", content="SHELL cat .posthog/attachments/*/*/notes.txt")
    await run.logged("from the command")
    params = {"content": "x", "artifact_ids": [entry["id"], "0" * 32]}
    response = await api.post(
        run.path("command/"), {"jsonrpc": "2.0", "method": "user_message", "params": params}
    )
    assert (response.status_code, response.json()) == (
        400, {"error": "Some artifact_ids are invalid for this run", "missing_artifact_ids": ["0" * 32]},
    )  # fmt: skip
    await run.cancel()


async def test_a_file_that_is_gone_fails_the_run(live: Yard) -> None:
    api = live.api()
    run = await api.create_run(await api.create_task(description="SAY hi"), environment="cloud", **SCRIPTED)
    item = {"name": "notes.txt", "type": "user_attachment", "content": "x"}
    [entry] = ok(await api.post(run.path("artifacts/"), {"artifacts": [item]}))["artifacts"]
    for path in (live.settings.data_dir / "objects").rglob("*"):
        if path.is_file():
            path.unlink()
    ok(await api.post(run.path("start/"), {"pending_user_artifact_ids": [entry["id"]]}))
    body = await run.status("failed", "completed")
    assert body["state"]["error_type"] == "follow_up_failed"
    assert body["error_message"] == (
        "Follow-up delivery failed: The attachment 'notes.txt' is not in the object storage any more."
    )
    assert json.dumps(str(live.settings.data_dir)) not in json.dumps(await run.log())


class OneObject:
    """A storage in which everything is the same."""

    async def open(self, _: str) -> Content:
        async def chunks() -> AsyncGenerator[bytes, None]:
            yield b"attached"

        return Content(8, chunks())


async def test_what_an_agent_has_put_in_their_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pipe that nobody reads holds nothing up; a folder, and a sandbox that does not answer, are told."""
    hut = Hut(tmp_path / "data")
    entry = {"id": "f1", "name": "a.txt", "storage_path": "x"}
    store: Any = OneObject()
    try:
        sandbox = await hut.sandbox()
        folder = f"{sandbox.workspace}/.posthog/attachments"
        planted = f"mkdir -p {folder}/run/f1 && cd {folder} && mkfifo .gitignore run/f1/a.txt"
        assert (await shell(sandbox, planted)).end.code == 0
        async with asyncio.timeout(60):
            await deliver(store, sandbox, sandbox.workspace, "run", [entry])
        shown = await shell(sandbox, f"cd {folder}; timeout 5 cat .gitignore run/f1/a.txt; ls -A . run/f1")
        assert shown.output == "*\nattached.:\n.gitignore\nrun\n\nrun/f1:\na.txt\n"
        assert (await shell(sandbox, f"cd {folder}/run/f1; rm a.txt; mkdir a.txt")).end.code == 0
        with pytest.raises(
            AttachmentError, match=r"'a\.txt' cannot be written in the sandbox: mv: .*directory"
        ):
            await deliver(store, sandbox, sandbox.workspace, "run", [entry])
        assert (await shell(sandbox, f"ls -A {folder}/run/f1")).output == "a.txt\n"
        monkeypatch.setattr(attachments, "WRITE", "exec sleep 600")
        monkeypatch.setattr(attachments, "WRITE_S", 0.5)
        with pytest.raises(AttachmentError, match="took longer than"):
            await deliver(store, sandbox, sandbox.workspace, "run", [entry])
    finally:
        await hut.close()
