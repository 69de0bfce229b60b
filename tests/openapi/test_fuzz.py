"""Generated requests, single and in sequences: no server error, and nothing that the description does not have.

A short run with a fixed seed for each of two people in different projects. TASKYARD_TEST_FUZZ_EXAMPLES makes it
longer: so many requests for each operation (`scripts/fuzz-api`).
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from taskyard.accounts import admin
from taskyard.db.engine import Database
from taskyard.openapi.document import OPERATIONS, document
from tests.conftest import make_settings
from tests.support.yard import Api, Yard, ok, open_yard

EXAMPLES = int(os.environ.get("TASKYARD_TEST_FUZZ_EXAMPLES", "0"))
SEED = os.environ.get("TASKYARD_TEST_FUZZ_SEED", "20261125")
CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
    "use_after_free",
    "ignored_auth",
)
"""Not whether wrong input is refused: the server is tolerant by design, and texts may be numbers."""
LEFT_OUT = "tasks_runs_stream_retrieve"
"""It answers for as long as a run goes on."""


@pytest.fixture
async def yard(tmp_path: Path, database_url: str, database: Database) -> AsyncIterator[Yard]:
    """A server without limits on the rate of requests."""
    settings = make_settings(tmp_path, database_url, rate_limits={"enabled": False})
    async with open_yard(settings, database) as yard:
        yield yard


@pytest.mark.parametrize(
    ("person", "aimed"),
    [
        (person, aimed)
        for person in ("ada", "eve")
        for aimed in (True, False)
        if EXAMPLES or aimed == (person == "ada")
    ],
)
async def test_generated_requests(yard: Yard, tmp_path: Path, person: str, aimed: bool) -> None:
    """`aimed`: at a task and a run that exist. Otherwise ids are made up, or come from earlier answers."""
    api = yard.api(person, yard.project if person == "ada" else yard.other_project)
    await admin.add_member(yard.database, "bob@example.org", int(api.project), "admin")
    schema, config = tmp_path / "openapi.json", tmp_path / "schemathesis.toml"
    schema.write_text(json.dumps(document(closed=True)))
    config.write_text(
        f'hooks = "{Path(__file__).with_name("fuzz_hooks.py")}"\n' + await parameters(api, aimed=aimed)
    )
    command = [sys.executable, "-m", "schemathesis.cli", f"--config-file={config}", "run", str(schema)]
    phases = ["examples", "fuzzing", *(["coverage"] if EXAMPLES else []), *([] if aimed else ["stateful"])]
    options = [
        f"--url={yard.url}",
        f"--header=Authorization: Bearer {api.key}",
        f"--checks={','.join(CHECKS)}",
        f"--exclude-operation-id={LEFT_OUT}",
        f"--phases={','.join(phases)}",
        f"--max-examples={EXAMPLES or 3}",
        f"--seed={SEED}",
        "--generation-database=none",
        "--suppress-health-check=all",
        "--warnings=off",
        "--no-color",
        *([] if EXAMPLES else ["--no-shrink"]),
    ]
    process = await asyncio.create_subprocess_exec(
        *command, *options, cwd=tmp_path, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    output, _ = await process.communicate()
    text = output.decode()
    (Path(os.environ.get("TASKYARD_TEST_FUZZ_REPORTS", tmp_path)) / f"fuzz-{person}-{aimed}.txt").write_text(
        text
    )

    assert process.returncode == 0, text
    generated = re.search(r"(\d+) generated", text)
    assert generated is not None, text
    assert int(generated[1]) > len(OPERATIONS), text
    # A person who has locked themselves out is refused everything, and finds nothing.
    assert (await api.get("members/@me/")).status_code == 200
    if "stateful" in phases:
        followed = re.search(r"(\d+) covered", text)
        assert followed is not None, text
        assert int(followed[1]) >= 3, text


async def parameters(api: Api, *, aimed: bool) -> str:
    """The part of the configuration that says what stands in paths. Nobody takes themselves out of the project."""
    lines = ["[parameters]", f'"path.project_id" = "{api.project}"']
    lines += ["[phases.stateful.inference]", "algorithms = []"]  # the description has the links that matter
    lines += ["[phases.stateful.generation]", f"max-examples = {max(EXAMPLES * 15, 15)}"]
    members = ok(await api.get("members/"))["results"]
    other = next(member["id"] for member in members if member["user"]["email"] == "bob@example.org")
    for name in ("project_members_partial_update", "project_members_destroy"):
        lines += ["[[operations]]", f'include-operation-id = "{name}"', "[operations.parameters]"]
        lines += [f'"path.project_id" = "{api.project}"', f'"path.id" = "{other}"']
    if aimed:
        run = await api.start("Fuzz it.")
        for operation in OPERATIONS:
            if "/tasks/{" in operation.path and operation.method != "DELETE":
                lines += [
                    "[[operations]]",
                    f'include-operation-id = "{operation.id}"',
                    "[operations.parameters]",
                ]
                lines += [f'"path.project_id" = "{api.project}"', f'"path.task_id" = "{run.task_id}"']
                lines += [f'"path.id" = "{run.id if "/runs/{" in operation.path else run.task_id}"']
    return "\n".join(lines) + "\n"
