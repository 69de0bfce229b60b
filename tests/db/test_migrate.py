"""Migrations: applied once, under a lock, never onto a newer schema."""

from __future__ import annotations

import concurrent.futures

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
