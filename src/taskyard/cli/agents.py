"""`taskyard agents`: which agents there are, and installing those that come from npm."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from taskyard.cli.options import AsJson, DataDir, load_settings
from taskyard.errors import InvalidInputError

if TYPE_CHECKING:
    from taskyard.agents.install import InstallInfo

app = typer.Typer(no_args_is_help=True, help="List and install agents.")


@app.command("list")
def list_agents(data_dir: DataDir = None, as_json: AsJson = False) -> None:
    """Show the agents and whether they are installed."""
    settings = load_settings(data_dir)
    from taskyard.agents.adapters import adapters
    from taskyard.agents.install import describe

    found = [describe(adapter) for adapter in adapters(settings).values()]
    if as_json:
        typer.echo(json.dumps([asdict(info) for info in found], indent=2, default=str))
        return
    for info in found:
        state = "" if info.package is None else ", installed" if info.installed else ", not installed"
        typer.echo(f"{info.name}: {info.title}{state}")
        if info.package:
            typer.echo(f"    {_package(info)}")
        if not info.installed:
            typer.echo(f"    taskyard agents install {info.name}")


@app.command()
def install(
    names: Annotated[list[str], typer.Argument(metavar="NAME...", help="claude, codex")],
    data_dir: DataDir = None,
) -> None:
    """Install agents from npm, at the versions this release was tested with."""
    settings = load_settings(data_dir)
    from taskyard.agents.adapters import adapters
    from taskyard.agents.install import describe
    from taskyard.agents.install import install as install_one

    known = adapters(settings)
    if unknown := [name for name in names if name not in known]:
        raise InvalidInputError(f"there is no agent {', '.join(unknown)}; known: {', '.join(known)}")
    for name in names:
        info = describe(known[name])
        if info.installed and info.package:
            typer.echo(f"✓ {name} is installed: {info.package} {info.version}")
            continue
        if info.package:
            typer.echo(f"Installing {info.title}:\n    {_package(info)}")
        done = install_one(known[name])
        typer.echo(f"✓ {name} is installed in {done.folder}")


def _package(info: InstallInfo) -> str:
    return f"{info.package} {info.version}, {info.size_mb} MB\n    licence: {info.licence}"
