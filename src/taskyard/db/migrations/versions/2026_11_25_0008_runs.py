"""Runs driven from outside: filters of the log, upload of events, hand-off, cached user tokens."""

from alembic import op

revision = "0008"
down_revision = "0007"

TABLES = """
-- What session_logs filters by, found once when an entry is written; null for entries that the log does not show.
ALTER TABLE events ADD COLUMN kind text, ADD COLUMN stamp timestamptz;

ALTER TABLE run_cursors
    ADD COLUMN ingest_seq bigint NOT NULL DEFAULT 0,  -- last number of an uploaded event
    ADD COLUMN ingest_done boolean NOT NULL DEFAULT false,
    ADD COLUMN heartbeat_at timestamptz,              -- last sign of life from outside
    ADD COLUMN completing boolean NOT NULL DEFAULT false,  -- the worker is asked to complete the run
    ADD COLUMN held_generation integer,               -- generation of whoever has the lease, or had it last
    ADD COLUMN started_generation integer NOT NULL DEFAULT 0;  -- generation at the latest start

-- Tokens of people for one run, encrypted, for a few hours.
CREATE TABLE run_user_tokens (
    run_id uuid PRIMARY KEY REFERENCES runs,
    token bytea NOT NULL,
    expires_at timestamptz NOT NULL
);
CREATE INDEX run_user_tokens_expiry ON run_user_tokens (expires_at);
"""


def upgrade() -> None:
    connection = op.get_bind().connection.driver_connection
    assert connection is not None
    connection.execute(TABLES)
