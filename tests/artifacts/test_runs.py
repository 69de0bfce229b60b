"""Artifacts of runs over HTTP: inline, prepare, finalize, presign, download (tasks-api §7)."""

from __future__ import annotations

import asyncio
import base64
import uuid
from typing import Any

import httpx
import pytest

from taskyard.artifacts import service
from taskyard.serve import listening
from taskyard.settings import ObjectSettings, S3Settings
from tests.support.artifacts import MIB, OfRun, Staged, item, named, send
from tests.support.yard import Api, Run, Yard, error, ok


async def of_run(yard: Yard) -> OfRun:
    """A run that nothing drives."""
    api = yard.api()
    task = await api.create_task(title="A task")
    run = ok(await api.post(f"tasks/{task['id']}/runs/", {}), 201)
    return OfRun(Run(api, task["id"], run["id"]))


NOT_FOUND = {"error": "Artifact not found on this run"}


async def test_inline_text(yard: Yard) -> None:
    run = await of_run(yard)
    before = await run.run.fetch()
    text = "  # Plan é\n"
    manifest = await run.upload({"name": "plan.md", "type": "plan", "content": text})
    entry = manifest[0]
    assert set(entry) == {
        "id", "name", "type", "source", "size", "content_type", "storage_path", "uploaded_at",
    }  # fmt: skip
    prefix = f"tasks/artifacts/team_{yard.project}/task_{run.run.task_id}/run_{run.run.id}"
    assert entry["storage_path"] == f"{prefix}/{entry['id'][:8]}_plan.md"
    assert (entry["name"], entry["type"], entry["source"], entry["content_type"]) == (
        "plan.md",
        "plan",
        "",
        "",
    )
    assert entry["size"] == len(text.encode())
    after = await run.run.fetch()
    assert after["artifacts"] == [entry]
    assert after["updated_at"] > before["updated_at"]
    response = await run.download(entry["storage_path"])
    assert (response.status_code, response.content) == (200, text.encode())
    assert response.headers["content-type"] == "application/octet-stream"
    assert response.headers["cache-control"] == "no-cache"


async def test_base64_is_decoded_only_when_it_says_so(yard: Yard) -> None:
    run = await of_run(yard)
    data = bytes(range(256))
    text = base64.b64encode(data).decode()
    pack = await run.add("handoff/1.pack", text)
    assert (await run.download(pack["storage_path"])).content == text.encode()
    assert (pack["name"], pack["size"]) == ("1.pack", len(text))
    wrapped = "\n".join([text[:100], text[100:], ""])
    decoded = await run.add("x", wrapped, content_encoding="base64", content_type="application/x-thing")
    assert (decoded["size"], decoded["content_type"]) == (256, "application/x-thing")
    response = await run.download(decoded["storage_path"])
    assert response.content == data
    assert response.headers["content-type"] == "application/x-thing"


@pytest.mark.parametrize(
    ("changed", "code", "attr", "detail"),
    [
        (
            {"content": "%%%", "content_encoding": "base64"},
            "invalid_input",
            "content",
            "Invalid base64 content",
        ),
        (
            {"content": "YQ=", "content_encoding": "base64"},
            "invalid_input",
            "content",
            "Invalid base64 content",
        ),
        (
            {"content": "é", "content_encoding": "base64"},
            "invalid_input",
            "content",
            "Invalid base64 content",
        ),
        ({"content": 5}, "invalid_input", "content", "Not a valid string."),
        ({"content": None}, "null", "content", "This field may not be null."),
        (
            {"content_encoding": "latin-1"},
            "invalid_choice",
            "content_encoding",
            '"latin-1" is not a valid choice.',
        ),
        ({"type": "treasure"}, "invalid_choice", "type", '"treasure" is not a valid choice.'),
        ({"name": " "}, "blank", "name", "This field may not be blank."),
        (
            {"name": "a.pdf", "type": "user_attachment", "content": "x" * (10 * MIB + 1)},
            "invalid_input",
            "content",
            "a.pdf exceeds the 10MB attachment limit for PDFs in cloud runs",
        ),
    ],
    ids=lambda value: str(value)[:40],
)
async def test_inline_checks(yard: Yard, changed: dict[str, Any], code: str, attr: str, detail: str) -> None:
    good = {"name": "x", "type": "output", "content": "x"}
    path = f"tasks/{uuid.uuid4()}/runs/{uuid.uuid4()}/artifacts/"
    response = await yard.api().post(path, {"artifacts": [good, good | changed]})
    assert error(response, 400, code, f"artifacts__1__{attr}")["detail"] == detail


async def test_inline_needs_content(yard: Yard) -> None:
    path = f"tasks/{uuid.uuid4()}/runs/{uuid.uuid4()}/artifacts/"
    sent = await yard.api().post(path, {"artifacts": [{"name": "x", "type": "output"}]})
    error(sent, 400, "required", "artifacts__0__content")
    empty = error(await yard.api().post(path, {"artifacts": []}), 400, "invalid_input", "artifacts")
    assert empty["detail"] == "At least one artifact is required"


async def test_inline_of_full_size(yard: Yard) -> None:
    """30 MiB in base64 is more than other requests may have."""
    run = await of_run(yard)
    text = base64.b64encode(bytes(30 * MIB)).decode()
    assert (await run.add("big", text, content_encoding="base64"))["size"] == 30 * MIB
    over = base64.b64encode(bytes(30 * MIB + 1)).decode()
    body = {"artifacts": [{"name": "big", "type": "output", "content": over, "content_encoding": "base64"}]}
    refused = error(await run.call("", body), 400, "invalid_input", "artifacts__0__content")
    assert refused["detail"] == "big exceeds the 30MB attachment limit"


async def test_inline_answers_the_whole_manifest(yard: Yard) -> None:
    run = await of_run(yard)
    first = await run.upload({"name": "same", "type": "output", "content": ""})
    two = [{"name": "same", "type": "output", "content": text} for text in "23"]
    manifest = await run.upload(*two)
    assert manifest[:1] == first
    assert len({entry["storage_path"] for entry in manifest}) == 3
    assert [(await run.download(entry["storage_path"])).text for entry in manifest] == ["", "2", "3"]


async def test_no_upload_is_lost(yard: Yard) -> None:
    run = await of_run(yard)
    prepared = await run.prepare(*(item(f"p{n}") for n in range(50)))
    for entry in prepared:
        await send(run.run.api, entry)
    before, streamed = await run.run.fetch(), await run.run.stream_text()
    await asyncio.gather(
        *(run.add(f"i{n}") for n in range(10)),
        *(run.finalize(entry) for entry in prepared),
        *(run.run.patch(state={f"k{n}": n}) for n in range(10)),
    )
    final = await run.run.fetch()
    names = {entry["name"] for entry in final["artifacts"]}
    assert names == {f"p{n}" for n in range(50)} | {f"i{n}" for n in range(10)}
    assert len({entry["id"] for entry in final["artifacts"]}) == len(final["artifacts"]) == 60
    assert len([key for key in final["state"] if key.startswith("k")]) == 10
    assert final["updated_at"] > before["updated_at"]
    # Uploads do not go to the stream (the changes of the state do).
    after = await run.run.stream_text()
    assert after.count("task_run_state") == streamed.count("task_run_state") + 10
    assert "p1" not in after


async def test_prepare_and_finalize(yard: Yard) -> None:
    run = await of_run(yard)
    entries = await run.prepare(item("a/b.txt", type="output", size=50), item("c.txt"))
    first = entries[0]
    prefix = f"tasks/artifacts/team_{yard.project}/task_{run.run.task_id}/run_{run.run.id}/"
    assert first["storage_path"] == f"{prefix}{first['id'][:8]}_b.txt"
    assert (first["name"], first["size"], first["expires_in"]) == ("b.txt", 50, 3600)
    for entry in entries:
        await send(run.run.api, entry)
    older = await run.add("older")
    final = await run.finalize(*entries)
    assert [entry["id"] for entry in final] == [entry["id"] for entry in entries]
    assert [entry["size"] for entry in final] == [5, 5]
    assert final[0]["uploaded_at"].endswith("+00:00")
    assert (await run.run.fetch())["artifacts"] == [older, *final]


async def test_finalize_is_idempotent(yard: Yard) -> None:
    run = await of_run(yard)
    entry = (await run.prepare(item()))[0]
    await send(run.run.api, entry)
    final = await run.finalize(entry)
    before = await run.run.fetch()
    assert await run.finalize(entry) == final
    assert await run.finalize(entry, entry) == final * 2
    # The manifest knows it by its path, too; nothing is looked at or written again.
    by_path = {**entry, "id": entry["id"][:8] + "0" * 24, "name": "other"}
    assert await run.finalize(by_path) == final
    await yard.database.execute("DELETE FROM stored_objects")
    assert await run.finalize(entry) == final
    assert await run.run.fetch() == before


async def test_finalized_at_once_is_there_once(yard: Yard) -> None:
    run = await of_run(yard)
    entries = await run.prepare(item("a"), item("b"))
    for entry in entries:
        await send(run.run.api, entry)
    answers = await asyncio.gather(
        *(run.finalize(*order) for order in (entries, entries[::-1]) for _ in range(4))
    )
    manifest = (await run.run.fetch())["artifacts"]
    assert len(manifest) == 2
    for answer in answers:
        assert sorted(answer, key=lambda entry: entry["id"]) == sorted(
            manifest, key=lambda entry: entry["id"]
        )


async def test_finalize_checks(yard: Yard) -> None:
    run, other = await of_run(yard), await of_run(yard)
    entry, second = await run.prepare(item("a.pdf", size=10 * MIB), item())
    foreign = (await other.prepare(item()))[0]
    await send(run.run.api, second)
    await send(other.run.api, foreign)

    async def answer(*items: dict[str, Any]) -> Any:
        response = await run.call("finalize_upload", {"artifacts": list(items)})
        assert response.status_code == 400
        return response.json()["error"]

    invalid = "Artifact storage path is invalid for this run"
    missing = "Artifact upload not found in object storage"
    assert await answer(named(second), named(foreign)) == invalid
    assert await answer(named(second) | {"id": entry["id"]}) == invalid
    assert await answer(named(second), named(entry), named(foreign)) == missing
    await send(run.run.api, entry, bytes(10 * MIB + 1))
    too_large = "a.pdf exceeds the 10MB attachment limit for PDFs in cloud runs"
    assert await answer(named(second), named(entry)) == too_large
    assert (await run.run.fetch())["artifacts"] == []


async def test_presign(yard: Yard) -> None:
    run = await of_run(yard)
    entry = await run.add('a "ü".md', "hello", content_type="text/markdown")
    answer = ok(await run.call("presign", {"storage_path": entry["storage_path"]}))
    assert list(answer) == ["url", "expires_in"]
    assert answer["expires_in"] == 3600
    response = await yard.client.get(answer["url"])
    assert (response.status_code, response.content) == (200, b"hello")
    assert response.headers["content-type"] == "text/markdown"
    assert "filename*=UTF-8''a%20%22%C3%BC%22.md" in response.headers["content-disposition"]


async def test_download_headers(yard: Yard) -> None:
    run = await of_run(yard)
    entry = await run.add("a.md", "hello", content_type="text/markdown")
    response = await run.download(entry["storage_path"])
    assert response.headers["content-type"] == "text/markdown"
    assert response.headers["content-disposition"] == "attachment; filename=\"a.md\"; filename*=UTF-8''a.md"
    assert response.headers["content-length"] == "5"
    bad = await run.add("b", "x", content_type="text/html\r\nX-Evil: 1")
    response = await run.download(bad["storage_path"])
    assert response.headers["content-type"] == "application/octet-stream"
    assert "x-evil" not in response.headers


async def test_unknown_paths(yard: Yard) -> None:
    run, other = await of_run(yard), await of_run(yard)
    foreign = await other.add()
    prepared = (await run.prepare(item()))[0]
    await send(run.run.api, prepared)
    for action in ("presign", "download"):
        for path in ("none", foreign["storage_path"], prepared["storage_path"]):
            response = await run.call(action, {"storage_path": path})
            assert (response.status_code, response.json()) == (404, NOT_FOUND)
        error(await run.call(action, {}), 400, "required", "storage_path")
        error(await run.call(action, {"storage_path": "x" * 501}), 400, "max_length", "storage_path")
        error(await run.call(action, {"storage_path": ""}), 400, "blank", "storage_path")


async def resumed(run: OfRun, source: str) -> OfRun:
    api, task = run.run.api, run.run.task_id
    started = ok(await api.post(f"tasks/{task}/run/", {"resume_from_run_id": source}))
    return OfRun(Run(api, task, started["latest_run"]["id"]))


async def test_download_along_the_resume_chain(yard: Yard) -> None:
    first = await of_run(yard)
    entry = await first.add()
    run, chain = first, [first]
    for _ in range(11):
        run = await resumed(run, run.run.id)
        chain.append(run)
    # Ten hops reach the first one, eleven do not.
    assert (await chain[10].download(entry["storage_path"])).text == "hello"
    assert (await chain[11].download(entry["storage_path"])).json() == NOT_FOUND
    # What follows is not reached, and presign looks at its own run only.
    later = await chain[3].add()
    assert (await chain[2].download(later["storage_path"])).json() == NOT_FOUND
    assert (await chain[4].download(later["storage_path"])).status_code == 200
    response = await chain[4].call("presign", {"storage_path": later["storage_path"]})
    assert (response.status_code, response.json()) == (404, NOT_FOUND)


async def test_chain_ends_at_circles_foreign_tasks_and_nonsense(yard: Yard) -> None:
    run, other = await of_run(yard), await of_run(yard)
    foreign = await other.add()
    second = await resumed(run, run.run.id)
    own = await second.add()

    async def link(target: Any) -> None:
        ok(await run.run.api.patch(run.run.path(), {"state": {"resume_from_run_id": target}}))

    await link(second.run.id)
    assert (await run.download(own["storage_path"])).status_code == 200
    assert (await run.download("none")).json() == NOT_FOUND
    for nonsense in (other.run.id, "x", 7, None, {"a": 1}):
        await link(nonsense)
        assert (await run.download(foreign["storage_path"])).json() == NOT_FOUND


async def test_content_that_has_gone(yard: Yard) -> None:
    run = await of_run(yard)
    entry = await run.add()
    for path in (yard.settings.data_dir / "objects").rglob("*"):
        if path.is_file():
            path.write_bytes(b"")
    response = await run.download(entry["storage_path"])
    assert (response.status_code, response.json()) == (400, {"error": "Unable to read artifact"})
    for path in (yard.settings.data_dir / "objects").rglob("*"):
        if path.is_file():
            path.unlink()
    response = await run.download(entry["storage_path"])
    assert (response.status_code, response.json()) == (404, {"error": "Artifact content not found"})


async def test_storage_that_fails(yard: Yard, monkeypatch: pytest.MonkeyPatch) -> None:
    """S3 without credentials, where nobody listens."""
    run = await of_run(yard)
    entry = await run.add()
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nonexistent")
    s3 = S3Settings(bucket="b", endpoint_url="http://127.0.0.1:9", path_style=True)
    broken = yard.settings.model_copy(update={"objects": ObjectSettings(s3=s3)})
    async with (
        listening(broken, yard.database, "127.0.0.1", 0) as url,
        httpx.AsyncClient(base_url=url, timeout=60.0, trust_env=False) as client,
    ):
        api = Api(client, yard.database, yard.project, yard.keys["ada"])
        away = OfRun(Run(api, run.run.task_id, run.run.id))
        response = await away.call("prepare_upload", {"artifacts": [item()]})
        assert (response.status_code, response.json()) == (400, {"error": "Unable to generate upload URL"})
        response = await away.call("presign", {"storage_path": entry["storage_path"]})
        assert (response.status_code, response.json()) == (400, {"error": "Unable to generate download URL"})
        response = await away.download(entry["storage_path"])
        assert (response.status_code, response.json()) == (400, {"error": "Unable to read artifact"})
        body = {"artifacts": [{"name": "x", "type": "output", "content": "x"}]}
        error(await away.call("", body), 503, "unavailable")
        error(await client.post("/api/objects"), 404, "not_found")
    assert (await run.run.fetch())["artifacts"] == [entry]


async def test_who_may(yard: Yard) -> None:
    run = await of_run(yard)
    entry = await run.add()
    prepared = (await run.prepare(item()))[0]
    await send(run.run.api, prepared)
    bodies = {
        "": {"artifacts": [{"name": "x", "type": "output", "content": "x"}]},
        "prepare_upload": {"artifacts": [item()]},
        "finalize_upload": {"artifacts": [named(prepared)]},
        "presign": {"storage_path": entry["storage_path"]},
        "download": {"storage_path": entry["storage_path"]},
    }
    nobody = OfRun(Run(run.run.api, run.run.task_id, str(uuid.uuid4())))
    other_task = OfRun(Run(run.run.api, (await yard.api().create_task(title="t"))["id"], run.run.id))
    malformed = OfRun(Run(run.run.api, "x", run.run.id))
    for action, body in bodies.items():
        reads = action in ("presign", "download")
        assert (await run.call(action, body, api=yard.api("bob"))).status_code == 200
        assert (await run.call(action, body, api=yard.api("task:write"))).status_code == 200
        response = await run.call(action, body, api=yard.api("task:read"))
        assert response.status_code == (200 if reads else 403)
        error(await run.call(action, body, api=yard.api(None)), 401, "not_authenticated")
        error(await run.call(action, body, api=yard.api("eve")), 403, "permission_denied")
        error(await run.call(action, body, api=yard.api("eve", yard.other_project)), 404, "not_found")
        for other in (nobody, other_task, malformed):
            error(await other.call(action, body), 404, "not_found")


async def test_paths_without_a_slash_and_other_methods(yard: Yard) -> None:
    run = await of_run(yard)
    body = {"artifacts": [{"name": "x", "type": "output", "content": "x"}]}
    ok(await run.run.api.post(run.run.path("artifacts"), body))
    ok(await run.run.api.post(run.run.path("artifacts/prepare_upload"), {"artifacts": [item()]}))
    error(await run.run.api.get(run.run.path("artifacts/")), 405, "method_not_allowed")
    error(await run.run.api.request("DELETE", run.run.path("artifacts/")), 405, "method_not_allowed")


async def test_artifacts_of_a_deleted_task(yard: Yard) -> None:
    """Runs of a deleted task stay readable (§4.5), and so do their artifacts."""
    run = await of_run(yard)
    entry = await run.add()
    await run.run.api.request("DELETE", f"tasks/{run.run.task_id}/")
    assert (await run.download(entry["storage_path"])).text == "hello"


async def test_messages_and_starts_name_artifacts_of_the_run(yard: Yard) -> None:
    api = yard.api()
    task = Staged(api, (await api.create_task(title="t"))["id"])
    one = await task.add("a")
    run = Run(api, task.task_id, ok(await task.run(one["id"]))["latest_run"]["id"])
    two = await OfRun(run).add("b")
    ok(await api.post(run.path("command/"), command(two["id"], one["id"])))
    response = await api.post(run.path("command/"), command(one["id"], "nothing"))
    assert (response.status_code, response.json()) == (
        400,
        {"error": "Some artifact_ids are invalid for this run", "missing_artifact_ids": ["nothing"]},
    )
    found, missing = service.entries_of(await run.fetch(), [two["id"], "x", one["id"]])
    assert ([entry["id"] for entry in found], missing) == ([two["id"], one["id"]], ["x"])


def command(*ids: str) -> dict[str, Any]:
    return {"jsonrpc": "2.0", "method": "user_message", "params": {"artifact_ids": list(ids)}}
