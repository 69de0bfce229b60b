"""`taskyard admin`: users, projects, memberships, keys, secrets and workers. Works beside a running server."""

from __future__ import annotations

import json
import sys
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from taskyard.cli.options import AsJson, DataDir, load_settings

if TYPE_CHECKING:
    from taskyard.db.engine import Database

Json = dict[str, Any]
T = TypeVar("T")
Email = Annotated[str, typer.Argument(metavar="EMAIL")]
ProjectId = Annotated[int, typer.Argument(metavar="PROJECT_ID")]

app = typer.Typer(no_args_is_help=True, help="Manage users, projects and keys; see the workers.")


@app.command()
def create_user(email: Email, data_dir: DataDir = None, as_json: AsJson = False) -> None:
    """Add a user. The very first one administers the site."""
    from taskyard.accounts import admin

    made = _do(data_dir, lambda database: admin.create_user(database, email))
    _tell(made, as_json, "user {id}: {email}")


@app.command()
def create_project(
    name: Annotated[str, typer.Argument(metavar="NAME")], data_dir: DataDir = None, as_json: AsJson = False
) -> None:
    """Add a project."""
    from taskyard.accounts import admin

    made = _do(data_dir, lambda database: admin.create_project(database, name))
    _tell(made, as_json, "project {id}: {name}")


@app.command()
def add_member(
    email: Email,
    project: ProjectId,
    role: Annotated[
        str, typer.Option("--role", help="member or admin; admins manage the members.")
    ] = "member",
    data_dir: DataDir = None,
    as_json: AsJson = False,
) -> None:
    """Let a user into a project, or change their role there."""
    from taskyard.accounts import admin

    made = _do(data_dir, lambda database: admin.add_member(database, email, project, role))
    _tell(made, as_json, "{email} is in project {project_id} as {role}")


@app.command()
def remove_member(
    email: Email, project: ProjectId, data_dir: DataDir = None, as_json: AsJson = False
) -> None:
    """Take a user out of a project: their keys, tokens and automations do nothing there any more."""
    from taskyard.accounts import admin

    made = _do(data_dir, lambda database: admin.remove_member(database, email, project))
    _tell(made, as_json, "{email} is not in project {project_id} any more")


@app.command()
def create_key(
    email: Email,
    scopes: Annotated[
        list[str], typer.Option("--scope", metavar="SCOPE", help="task:read, task:write or *; repeatable.")
    ],
    projects: Annotated[
        list[int] | None,
        typer.Option("--project", metavar="ID", help="Only for this project; repeatable; default: all."),
    ] = None,
    label: Annotated[str, typer.Option("--label", help="What the key is for.")] = "command line",
    data_dir: DataDir = None,
    as_json: AsJson = False,
) -> None:
    """Make an API key for a user and print it, once."""
    from taskyard.accounts import admin

    made = _do(data_dir, lambda database: admin.create_key(database, email, scopes, projects, label))
    _tell(made, as_json, "key {id} (shown only now):\n{key}")


@app.command()
def list_keys(
    email: Annotated[str | None, typer.Argument(metavar="[EMAIL]")] = None,
    data_dir: DataDir = None,
    as_json: AsJson = False,
) -> None:
    """Show the keys that were not revoked, of one user or of all."""
    from taskyard.accounts import admin

    _list(_do(data_dir, lambda database: admin.list_keys(database, email)), as_json, _key_line)


@app.command()
def list_users(data_dir: DataDir = None, as_json: AsJson = False) -> None:
    """Show all users."""
    from taskyard.accounts import admin

    _list(_do(data_dir, admin.list_users), as_json, _user_line)


@app.command()
def set_password(
    email: Email,
    link: Annotated[
        bool, typer.Option("--link", help="Print a link where the user sets it, once, within a day.")
    ] = False,
    data_dir: DataDir = None,
    as_json: AsJson = False,
) -> None:
    """Set the password with which a user signs in: asked for, or the first line of standard input."""
    from taskyard.accounts import admin

    if not link:
        password = _new_password()
        made = _do(data_dir, lambda database: admin.set_password(database, email, password))
        _tell(made, as_json, "the password of {email} is set")
        return
    from taskyard.cli.local import server_url

    made = _do(data_dir, lambda database: admin.password_link(database, email))
    settings = load_settings(data_dir)
    # Without an address the person knows the server's: only the path is printed.
    base = settings.base_url or server_url(settings.data_dir) or ""
    _tell({**made, "link": base.rstrip("/") + made["path"]}, as_json, "{link}")


def _new_password() -> str:
    if sys.stdin.isatty():
        return str(typer.prompt("New password", hide_input=True, confirmation_prompt=True))
    return sys.stdin.readline().rstrip("\r\n")


@app.command()
def revoke_key(
    key_id: Annotated[str, typer.Argument(metavar="KEY_ID")],
    data_dir: DataDir = None,
    as_json: AsJson = False,
) -> None:
    """Make an API key useless."""
    from taskyard.accounts import admin

    made = _do(data_dir, lambda database: admin.revoke_key(database, key_id))
    _tell(made, as_json, "key {id} is revoked")


@app.command()
def workers(data_dir: DataDir = None, as_json: AsJson = False) -> None:
    """Show the workers of the site: their pools, how many runs they drive, when they were last seen."""
    from taskyard.runs import workers

    _list(_do(data_dir, workers.listed), as_json, _worker_line)


@app.command()
def rotate_secrets(
    drop_unreadable: Annotated[
        bool, typer.Option("--drop-unreadable", help="Remove secrets whose key is lost, instead of stopping.")
    ] = False,
    data_dir: DataDir = None,
    as_json: AsJson = False,
) -> None:
    """Encrypt all stored secrets anew.

    With TASKYARD_SECRET_KEYS its first key is used: put a new key after the old one on every machine, then
    before it, then run this, then remove the old one. Without it the data folder gets a new key file.
    """
    from taskyard.environments import secrets

    settings = load_settings(data_dir)
    made = _do(data_dir, lambda database: secrets.rotate(database, settings, drop_unreadable=drop_unreadable))
    _tell(made, as_json, "secrets encrypted anew: {rotated}")
    for what in [] if as_json else made["dropped"]:
        typer.echo(f"removed: {what}")


def _do(data_dir: Path | None, action: Callable[[Database], Awaitable[T]]) -> T:
    import asyncio

    settings = load_settings(data_dir)
    from taskyard.db.engine import open_database

    async def go() -> T:
        async with open_database(settings, max_connections=2) as database:
            return await action(database)

    return asyncio.run(go())


def _tell(made: Json, as_json: bool, sentence: str) -> None:
    typer.echo(json.dumps(made) if as_json else sentence.format_map(made))


def _list(entries: Sequence[Json], as_json: bool, line: Callable[[Json], str]) -> None:
    for text in [json.dumps(entries)] if as_json else map(line, entries):
        typer.echo(text)


def _worker_line(worker: Json) -> str:
    return (
        f"{worker['name']}  {worker['status']}, seen {worker['seen_s_ago']:g} s ago  "
        f"{worker['running']} of {worker['capacity']} runs  pools: {', '.join(worker['pools'])}  "
        f"agents: {', '.join(worker['agents']) or 'none'}  version {worker['version']}"
    )


def _user_line(user: Json) -> str:
    marks = [
        name
        for name, there in (("staff", user["is_staff"]), ("no password", not user["has_password"]))
        if there
    ]
    return f"{user['id']:>4}  {user['email']}  ({', '.join([*user['projects'], *marks]) or 'no project'})"


def _key_line(key: Json) -> str:
    used = key["last_used_at"] or "never"
    return f"{key['id']}  {key['mask_value']}  {key['email']}  {' '.join(key['scopes'])}  {key['label']}  used: {used}"
