"""Fixtures: one PostgreSQL for the whole test session, a database of its own for each test.

All workers of a session share one server, which runs in memory where that has room. A test's
database is a clone (about 15 ms) of a template to which the migrations were applied once.
"""

from __future__ import annotations

import asyncio
import shutil
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
from psycopg import sql

TEMPLATE = "taskyard_template"
_KEEPER = Path(__file__).with_name("postgres_keeper.py")
_SHARED_MEMORY = Path("/dev/shm")
_ROOM = 2 << 30  # bytes
_LOCK_KEY = 8_154_417


async def create_database(server_url: str, template: str | None = None) -> str:
    """Create a database, empty or as a clone of `template`; returns its libpq URL."""
    return await asyncio.to_thread(_create_database, server_url, template)


async def drop_database(server_url: str, database_url: str) -> None:
    """Drop a database; its open connections are ended."""
    await asyncio.to_thread(_drop_database, server_url, database_url)


def migrated_template(server_url: str) -> str:
    """The name of the template database with the newest schema, made by whoever asks first."""
    from taskyard.db import migrate

    name = sql.Identifier(TEMPLATE)
    with psycopg.connect(server_url, autocommit=True) as connection:
        connection.execute("SELECT pg_advisory_lock(%s)", [_LOCK_KEY])  # ends with the connection
        query = "SELECT datistemplate FROM pg_database WHERE datname = %s"
        if connection.execute(query, [TEMPLATE]).fetchone() != (True,):
            # One that is not marked as a template belongs to a worker that died at work.
            connection.execute(sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(name))
            connection.execute(sql.SQL("CREATE DATABASE {}").format(name))
            migrate.upgrade(_with_database(server_url, TEMPLATE))
            mark = sql.SQL("ALTER DATABASE {} WITH IS_TEMPLATE true ALLOW_CONNECTIONS false")
            connection.execute(mark.format(name))
    return TEMPLATE


def shared_session(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, str]:
    """What all processes of this test run share: a folder, and a name that no other run has."""
    base = tmp_path_factory.getbasetemp()
    worker: dict[str, str] | None = getattr(request.config, "workerinput", None)
    return (base.parent, worker["testrunuid"]) if worker else (base, uuid.uuid4().hex)


@pytest.fixture(scope="session")
def postgres_url(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The libpq URL of the session's server; use `create_database` or `database_url` on it."""
    session, run = shared_session(request, tmp_path_factory)
    name = f"taskyard-tests-{run}"
    in_memory = _SHARED_MEMORY.is_dir() and shutil.disk_usage(_SHARED_MEMORY).free > _ROOM
    folder = (_SHARED_MEMORY if in_memory else Path(tempfile.gettempdir())) / name
    keeper = subprocess.Popen(
        [sys.executable, str(_KEEPER), str(session / "postgres.lock"), str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,  # Ctrl-C is for the tests
    )
    with keeper:  # leaving closes the pipes and waits
        assert keeper.stdout is not None
        url = keeper.stdout.readline().strip()
        assert url, "PostgreSQL did not start: see the traceback above"
        yield url


@pytest.fixture(scope="session")
def database_template(postgres_url: str) -> str:
    """The name of the migrated template database, for `create_database`."""
    return migrated_template(postgres_url)


@pytest.fixture
def database_url(postgres_url: str, database_template: str) -> Iterator[str]:
    """The libpq URL of a migrated, otherwise empty database for one test."""
    url = _create_database(postgres_url, database_template)
    yield url
    _drop_database(postgres_url, url)


def _create_database(server_url: str, template: str | None) -> str:
    name = f"test_{uuid.uuid4().hex}"
    statement = sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name))
    if template is not None:
        statement += sql.SQL(" TEMPLATE {}").format(sql.Identifier(template))
    with psycopg.connect(server_url, autocommit=True) as connection:
        connection.execute(statement)
    return _with_database(server_url, name)


def _drop_database(server_url: str, database_url: str) -> None:
    name = psycopg.conninfo.conninfo_to_dict(database_url)["dbname"]
    assert isinstance(name, str)
    with psycopg.connect(server_url, autocommit=True) as connection:
        connection.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))


def _with_database(server_url: str, name: str) -> str:
    head, options = server_url.split("?", 1)
    return f"{head.rsplit('/', 1)[0]}/{name}?{options}"
