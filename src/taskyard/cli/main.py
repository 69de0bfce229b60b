"""The command's groups, and how errors reach a person."""

from __future__ import annotations

import errno
import sys
from typing import Annotated

import typer

from taskyard import __version__
from taskyard.cli import admin, agents, config, demo, doctor, runs, sandbox, serve
from taskyard.errors import TaskyardError

app = typer.Typer(
    name="taskyard",
    help="Run coding-agent tasks in locked sandboxes.",
    no_args_is_help=True,
    add_completion=False,
    # Plain help: the decorated one takes three times as long to appear.
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"taskyard {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


for group in (serve, runs, demo, doctor, config):
    group.add_to(app)
app.add_typer(agents.app, name="agents")
app.add_typer(admin.app, name="admin")
app.add_typer(sandbox.app, name="sandbox")


def run() -> None:
    """Entry point. Exit codes: 0 success, 1 the run or the operation failed, 2 wrong usage."""
    for stream in (sys.stdout, sys.stderr):
        # A terminal that cannot show a character shows a question mark instead of ending the program.
        stream.reconfigure(errors="replace")  # type: ignore[union-attr] # these two are text files here
    try:
        app(prog_name="taskyard")
    except Exception as error:
        text = message(error)
        if text is None:
            raise
        from taskyard.cli.text import clean

        typer.echo(f"error: {clean(text)}", err=True)
        sys.exit(1)


def message(error: Exception) -> str | None:
    """What to tell a person about an expected error; None for an unexpected one, which is a bug."""
    if isinstance(error, TaskyardError):
        return error.detail
    client = sys.modules.get("taskyard.client.errors")
    if client is not None and isinstance(error, client.ClientError):
        return str(error)
    psycopg = sys.modules.get("psycopg")
    if psycopg is not None and isinstance(error, psycopg.OperationalError):
        return f"the database does not answer: {str(error).strip()}"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"cannot write {error.filename or 'the output'}: {error.strerror}"
    if isinstance(error, UnicodeEncodeError) and error.reason == "surrogates not allowed":
        return "what was given as an argument or on standard input is not UTF-8 text"
    return None
