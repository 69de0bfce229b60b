"""Migrations: applied once, under a lock, never onto a newer schema."""

from __future__ import annotations

import concurrent.futures
import importlib.util
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from taskyard.db import migrate
from taskyard.errors import SetupError


def test_repeated_and_at_once(database_url: str) -> None:
    with psycopg.connect(database_url) as connection:
        connection.execute("DROP SCHEMA public CASCADE")
        connection.execute("CREATE SCHEMA public")
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(migrate.upgrade, database_url) for _ in range(4)]:
            done.result(60)
    with psycopg.connect(database_url) as connection:
        [version] = connection.execute("SELECT version_num FROM alembic_version").fetchall()
        assert version == (migrate.heads(),)
        connection.execute("SELECT 1 FROM tasks, procrastinate_jobs")


def test_a_newer_schema_is_left_alone(database_url: str) -> None:
    with psycopg.connect(database_url) as connection:
        connection.execute("UPDATE alembic_version SET version_num = '9999'")
    with pytest.raises(SetupError, match=r"schema 9999.*newer one. Upgrade Taskyard"):
        migrate.upgrade(database_url)
    with psycopg.connect(database_url) as connection:
        assert connection.execute("SELECT version_num FROM alembic_version").fetchone() == ("9999",)


def test_a_database_that_is_not_there(database_url: str) -> None:
    broken = database_url.replace("user=postgres", "user=nobody_at_all")
    assert broken != database_url
    with pytest.raises(SetupError, match="nobody_at_all"):
        migrate.upgrade(broken)


def test_a_user_who_may_not_make_tables(database_url: str) -> None:
    with psycopg.connect(database_url) as connection:
        connection.execute("DROP SCHEMA public CASCADE")
        connection.execute("CREATE SCHEMA public")
        connection.execute("GRANT USAGE ON SCHEMA public TO public")
        connection.execute("DROP ROLE IF EXISTS a_guest")
        connection.execute("CREATE ROLE a_guest LOGIN")
    try:
        with pytest.raises(SetupError, match=r"permission denied for schema public. The user .* has to own"):
            migrate.upgrade(database_url.replace("user=postgres", "user=a_guest"))
    finally:
        with psycopg.connect(database_url) as connection:
            connection.execute("DROP OWNED BY a_guest")
            connection.execute("DROP ROLE a_guest")


def test_no_value_is_added_to_a_type(database_url: str) -> None:
    """PostgreSQL 14 to 16 refuse to use one in the same transaction."""
    [file] = (Path(migrate.__file__).parent / "migrations/versions").glob("*_0001_first.py")
    spec = importlib.util.spec_from_file_location("first", file)
    assert spec is not None
    assert spec.loader is not None
    first = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(first)
    assert "ADD VALUE" not in "".join(first.job_engine())
    with psycopg.connect(database_url) as connection:
        found = connection.execute(
            "SELECT enum_range(NULL::procrastinate_job_status)::text,"
            " enum_range(NULL::procrastinate_job_event_type)::text"
        ).fetchone()
    assert found == (
        "{todo,doing,succeeded,failed,cancelled,aborting,aborted}",
        "{deferred,started,deferred_for_retry,failed,succeeded,cancelled,abort_requested,aborted,scheduled,retried}",
    )


@pytest.fixture
def old_postgres() -> Iterator[str]:
    """The URL of a server of the system's that is older than 17, on a socket."""
    programs = sorted(Path("/usr/lib/postgresql").glob("1[456]/bin/initdb"))
    if not programs:
        pytest.skip("no PostgreSQL 14, 15 or 16 is installed in /usr/lib/postgresql")
    folder = Path(tempfile.mkdtemp(prefix="taskyard-old-"))
    user = "nobody" if folder.stat().st_uid == 0 else None  # PostgreSQL does not start as root
    if user:
        shutil.chown(folder, user)

    def call(program: str, *words: str) -> None:
        command = [str(programs[0].with_name(program)), "-D", str(folder / "data"), *words]
        subprocess.run(command, user=user, check=True, stdout=subprocess.DEVNULL, cwd=folder)

    try:
        call("initdb", "-U", "postgres", "-A", "trust")
        options = f"-c listen_addresses= -c unix_socket_directories={folder} -c fsync=off"
        call("pg_ctl", "-w", "-l", str(folder / "log"), "-o", options, "start")
        try:
            yield f"host={folder} user=postgres dbname=postgres"
        finally:
            call("pg_ctl", "-w", "-m", "immediate", "stop")
    finally:
        shutil.rmtree(folder)


def test_an_older_server(old_postgres: str) -> None:
    migrate.upgrade(old_postgres)
    with psycopg.connect(old_postgres) as connection:
        assert connection.execute("SELECT version_num FROM alembic_version").fetchone() == (migrate.heads(),)
