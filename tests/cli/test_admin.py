"""`taskyard admin` on a real database, as scripts use it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from taskyard.db.engine import Database
from taskyard.security import hash_api_key
from tests.support.command import taskyard

Cli = Any


@pytest.fixture
def admin(tmp_path: Path, database_url: str) -> Cli:
    def call(*words: str, code: int = 0) -> Any:
        done = taskyard("admin", *words, cwd=tmp_path, TASKYARD_DATABASE_URL=database_url)
        assert done.returncode == code, done.stderr
        return done.stderr if code else done.stdout

    return call


async def test_people_projects_and_keys(admin: Cli, database: Database) -> None:
    ada = json.loads(admin("create-user", "ada@example.org", "--json"))
    yard = json.loads(admin("create-project", "Yard one", "--json"))
    json.loads(admin("add-member", "ada@example.org", str(yard["id"]), "--json"))
    words = ("--scope", "task:read", "--scope", "task:write", "--project", str(yard["id"]), "--label", "ci")
    key = json.loads(admin("create-key", "ada@example.org", *words, "--json"))
    assert (ada["email"], yard["name"], key["scopes"]) == (
        "ada@example.org",
        "Yard one",
        ["task:read", "task:write"],
    )
    row = await database.fetch_one("SELECT * FROM api_keys WHERE id = %(id)s", id=key["id"])
    assert row is not None
    assert (row["user_id"], row["label"], row["revoked_at"]) == (ada["id"], "ci", None)
    assert key["key"] not in str(row)
    assert hash_api_key(key["key"]) in row.values()
    assert json.loads(admin("revoke-key", key["id"], "--json"))["id"] == key["id"]
    row = await database.fetch_one("SELECT revoked_at FROM api_keys WHERE id = %(id)s", id=key["id"])
    assert row is not None
    assert row["revoked_at"] is not None


def test_sentences_for_people(admin: Cli) -> None:
    assert admin("create-user", "eve@example.org").startswith("user ")
    assert admin("create-project", "Yard two").strip().endswith(": Yard two")
    first, key = admin("create-key", "eve@example.org", "--scope", "*").splitlines()
    assert "(shown only now)" in first
    assert len(key) > 20


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("create-user", "nobody"), "error: 'nobody' is not an e-mail address"),
        (("add-member", "no@example.org", "1"), "error: there is no user no@example.org"),
        (("create-key", "no@example.org", "--scope", "x"), "error: 'x' is not a scope"),
        (("revoke-key", "x"), "error: 'x' is not the id of a key"),
    ],
)
def test_errors_are_one_line(admin: Cli, words: tuple[str, ...], said: str) -> None:
    (line,) = admin(*words, code=1).splitlines()
    assert line.startswith(said)


def test_a_database_that_is_not_there(tmp_path: Path, unused_tcp_port: int) -> None:
    url = f"postgresql://u:topsecret@127.0.0.1:{unused_tcp_port}/d"
    done = taskyard("admin", "create-user", "a@b.org", cwd=tmp_path, TASKYARD_DATABASE_URL=url)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert "topsecret" not in done.stderr
    assert "Traceback" not in done.stderr
