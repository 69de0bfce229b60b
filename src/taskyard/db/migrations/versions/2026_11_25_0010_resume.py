"""Runs that outlive their worker: what is needed to drive one again, and runs that wait without a worker."""

from alembic import op

revision = "0010"
down_revision = "0009"

SQL = """
ALTER TABLE run_cursors
    -- The data folder of the worker that drove the run last: its sandbox folder may still be there.
    ADD COLUMN place text,
    -- When the run was suspended: it is going on, and nothing drives it until a command comes.
    ADD COLUMN suspended_at timestamptz,
    -- When a suspended run completes by inactivity.
    ADD COLUMN due_at timestamptz,
    -- When a worker drove it first since it was started: what the wall clock counts from.
    ADD COLUMN driven_since timestamptz,
    -- Takeovers in a row without progress.
    ADD COLUMN resumes integer NOT NULL DEFAULT 0,
    -- What the agent is working on: the message of the turn, and a permission it waits for.
    ADD COLUMN turn jsonb;
CREATE INDEX run_cursors_due ON run_cursors (due_at) WHERE suspended_at IS NOT NULL;

-- The newest checkpoint of each run, as objects in object storage.
CREATE TABLE checkpoints (
    run_id uuid PRIMARY KEY REFERENCES runs,
    generation integer NOT NULL,
    at timestamptz NOT NULL DEFAULT clock_timestamp(),
    -- {key, hash, bytes} of each part: `workspace` and `session`; and how to restore them.
    parts jsonb NOT NULL,
    session_id text,
    agent text
);
"""


def upgrade() -> None:
    connection = op.get_bind().connection.driver_connection
    assert connection is not None
    connection.execute(SQL)
