"""`taskyard admin`: users, projects, memberships and keys. Works beside a running server."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from taskyard.cli.options import AsJson, DataDir, load_settings

if TYPE_CHECKING:
    from taskyard.db.engine import Database

Json = dict[str, Any]
Email = Annotated[str, typer.Argument(metavar="EMAIL")]

app = typer.Typer(no_args_is_help=True, help="Manage users, projects and keys.")


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
    project: Annotated[int, typer.Argument(metavar="PROJECT_ID")],
    data_dir: DataDir = None,
    as_json: AsJson = False,
) -> None:
    """Let a user into a project."""
    from taskyard.accounts import admin

    made = _do(data_dir, lambda database: admin.add_member(database, email, project))
    _tell(made, as_json, f"{{email}} is a member of project {project}")


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
def revoke_key(
    key_id: Annotated[str, typer.Argument(metavar="KEY_ID")],
    data_dir: DataDir = None,
    as_json: AsJson = False,
) -> None:
    """Make an API key useless."""
    from taskyard.accounts import admin

    made = _do(data_dir, lambda database: admin.revoke_key(database, key_id))
    _tell(made, as_json, "key {id} is revoked")


def _do(data_dir: Path | None, action: Callable[[Database], Awaitable[Json]]) -> Json:
    import asyncio

    settings = load_settings(data_dir)
    from taskyard.db.engine import open_database

    async def go() -> Json:
        async with open_database(settings, max_connections=2) as database:
            return await action(database)

    return asyncio.run(go())


def _tell(made: Json, as_json: bool, sentence: str) -> None:
    typer.echo(json.dumps(made) if as_json else sentence.format_map(made))
