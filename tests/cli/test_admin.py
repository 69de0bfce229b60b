"""`taskyard admin` on a real database, as scripts use it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from taskyard.accounts import passwords
from taskyard.db.engine import Database
from taskyard.runs.workers import Worker, beat
from taskyard.security import hash_api_key
from tests.support.command import taskyard

Cli = Any


@pytest.fixture
def admin(tmp_path: Path, database_url: str) -> Cli:
    def call(*words: str, code: int = 0, stdin: str | None = None) -> Any:
        done = taskyard("admin", *words, cwd=tmp_path, stdin=stdin, TASKYARD_DATABASE_URL=database_url)
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


async def test_members_come_and_go(admin: Cli, database: Database) -> None:
    admin("create-user", "ada@example.org")
    project = str(json.loads(admin("create-project", "Yard", "--json"))["id"])
    added = admin("add-member", "ada@example.org", project, "--role", "admin")
    assert added == f"ada@example.org is in project {project} as admin\n"
    assert "king" in admin("add-member", "ada@example.org", project, "--role", "king", code=1)
    removed = admin("remove-member", "ada@example.org", project)
    assert removed == f"ada@example.org is not in project {project} any more\n"
    assert "is not a member of project" in admin("remove-member", "ada@example.org", project, code=1)
    row = await database.fetch_one("SELECT current_project_id FROM users")
    assert row == {"current_project_id": None}


def test_sentences_for_people(admin: Cli) -> None:
    assert admin("create-user", "eve@example.org").startswith("user ")
    assert admin("create-project", "Yard two").strip().endswith(": Yard two")
    first, key = admin("create-key", "eve@example.org", "--scope", "*").splitlines()
    assert "(shown only now)" in first
    assert len(key) > 20


async def test_passwords_from_standard_input(admin: Cli, database: Database) -> None:
    admin("create-user", "ada@example.org")
    said = admin("set-password", "ada@example.org", stdin="correct horse battery\n")
    assert said.strip() == "the password of ada@example.org is set"
    row = await database.fetch_one("SELECT password_hash FROM users")
    assert row is not None
    assert await passwords.verify(row["password_hash"], "correct horse battery")
    (line,) = admin("set-password", "ada@example.org", stdin="short\n", code=1).splitlines()
    assert line.startswith("error: This password is too short.")


def test_password_link_without_a_server_is_a_path(admin: Cli) -> None:
    admin("create-user", "ada@example.org")
    assert admin("set-password", "ada@example.org", "--link").startswith("/set-password?token=")


def test_lists(admin: Cli) -> None:
    admin("create-user", "ada@example.org")
    admin("create-user", "eve@example.org")
    yard = json.loads(admin("create-project", "Yard", "--json"))
    admin("add-member", "eve@example.org", str(yard["id"]))
    first, second = admin("list-users").splitlines()
    assert first.endswith("ada@example.org  (staff, no password)")
    assert second.endswith("eve@example.org  (Yard, no password)")
    assert [user["projects"] for user in json.loads(admin("list-users", "--json"))] == [[], ["Yard"]]
    made = json.loads(
        admin("create-key", "eve@example.org", "--scope", "task:read", "--label", "ci", "--json")
    )
    (line,) = admin("list-keys").splitlines()
    assert line.startswith(made["id"])
    assert line.endswith("eve@example.org  task:read  ci  used: never")
    assert made["key"] not in admin("list-keys", "--json")
    assert admin("list-keys", "ada@example.org") == ""
    admin("revoke-key", made["id"])
    assert admin("list-keys", "eve@example.org") == ""


async def test_workers(admin: Cli, database: Database) -> None:
    assert admin("workers") == ""
    here = Worker("desk-1", ["default", "large"], 4, ["bubblewrap"], ["claude", "scripted"])
    await beat(database, here)
    (line,) = admin("workers").splitlines()
    assert line.startswith("desk-1  ")
    assert "0 of 4 runs  pools: default, large  agents: claude, scripted  version " in line
    (found,) = json.loads(admin("workers", "--json"))
    assert (found["name"], found["running"], found["capacity"]) == ("desk-1", 0, 4)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("create-user", "nobody"), "error: 'nobody' is not an e-mail address"),
        (("add-member", "no@example.org", "1"), "error: there is no user no@example.org"),
        (("create-key", "no@example.org", "--scope", "x"), "error: 'x' is not a scope"),
        (("set-password", "no@example.org", "--link"), "error: there is no user no@example.org"),
        (("list-keys", "no@example.org"), "error: there is no user no@example.org"),
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
