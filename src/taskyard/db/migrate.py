"""Bring a database's schema up to this program's, under a lock, forward only.

Old code must run on the new schema: a migration only adds, or removes what no released version uses.
"""

from __future__ import annotations

from pathlib import Path

import psycopg
from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import create_engine, make_url, text
from sqlalchemy.exc import DBAPIError, OperationalError, ProgrammingError
from sqlalchemy.pool import NullPool

from taskyard.errors import SetupError

LOCK_KEY = 7_401_823
"""Advisory lock: two starting servers must not migrate at once."""
MINIMUM_VERSION = 140_000


def upgrade(url: str) -> None:
    """Apply the migrations that are missing at a libpq URL.

    Raises SetupError when the database cannot be reached, is older than PostgreSQL 14, or was
    written by a newer Taskyard.
    """
    config = _config()
    engine = create_engine(
        "postgresql+psycopg://", creator=lambda: psycopg.connect(url, connect_timeout=10), poolclass=NullPool
    )
    try:
        with engine.connect() as connection:
            version = connection.execute(text("SHOW server_version_num")).scalar_one()
            if int(version) < MINIMUM_VERSION:
                raise SetupError(f"PostgreSQL 14 or newer is needed, this server is {int(version) // 10_000}")
            connection.execute(text("SELECT pg_advisory_lock(:key)"), {"key": LOCK_KEY})
            connection.commit()
            try:
                current = MigrationContext.configure(connection).get_current_revision()
                connection.commit()
                known = {script.revision for script in ScriptDirectory.from_config(config).walk_revisions()}
                if current is not None and current not in known:
                    raise SetupError(
                        f"the database has schema {current}, which this version of Taskyard does not know: "
                        "it was written by a newer one. Upgrade Taskyard, or restore a backup."
                    )
                config.attributes["connection"] = connection
                command.upgrade(config, "head")
                connection.commit()
            finally:
                connection.rollback()
                connection.execute(text("SELECT pg_advisory_unlock(:key)"), {"key": LOCK_KEY})
                connection.commit()
    except (OperationalError, ProgrammingError, psycopg.errors.InsufficientPrivilege) as error:
        cause = error.orig if isinstance(error, DBAPIError) else error
        if isinstance(cause, psycopg.errors.InsufficientPrivilege):
            raise SetupError(
                f"cannot make the tables: {str(cause).strip().splitlines()[0]}. The user of TASKYARD_DATABASE_URL "
                "has to own the database (CREATE DATABASE … OWNER …), or have CREATE on its schema public."
            ) from error
        if isinstance(error, OperationalError):
            raise SetupError(f"cannot use the database: {str(cause).strip()}") from error
        raise
    finally:
        engine.dispose()


def heads() -> str | None:
    """The newest revision that this program knows."""
    return ScriptDirectory.from_config(_config()).get_current_head()


def _config() -> Config:
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    return config


def describe(url: str) -> str:
    """Host and database of a URL, for messages; never the password."""
    parsed = make_url(url)
    return f"{parsed.host or 'local socket'}/{parsed.database or ''}"
