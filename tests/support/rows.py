"""Rows made directly in the database, for tests below the API."""

from __future__ import annotations

from uuid import UUID

from taskyard.db.engine import Database


async def make_run(database: Database, status: str = "in_progress") -> UUID:
    """A run of a new task in a new project, with its cursor."""
    row = await database.fetch_one(
        """
        WITH o AS (INSERT INTO organizations (name) VALUES ('o') RETURNING id),
        p AS (INSERT INTO projects (organization_id, name) SELECT id, 'p' FROM o RETURNING id),
        t AS (INSERT INTO tasks (project_id, task_number) SELECT id, 0 FROM p RETURNING id, project_id),
        r AS (
            INSERT INTO runs (task_id, project_id, status, environment)
            SELECT id, project_id, %(status)s, 'cloud' FROM t RETURNING id
        )
        INSERT INTO run_cursors (run_id) SELECT id FROM r RETURNING run_id
        """,
        status=status,
    )
    assert row is not None
    return UUID(str(row["run_id"]))
