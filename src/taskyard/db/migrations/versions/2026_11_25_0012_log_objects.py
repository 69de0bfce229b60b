"""Logs of ended runs as objects."""

from alembic import op

revision = "0012"
down_revision = "0011"

SQL = """
-- The first entries of a run's record, up to last_seq, when they are not in `events` but in object storage.
CREATE TABLE archived_events (
    run_id uuid PRIMARY KEY REFERENCES runs,
    key text NOT NULL,
    last_seq bigint NOT NULL,
    last_ms bigint NOT NULL,      -- when the last of them was written
    log_entries bigint NOT NULL,  -- how many of them the log shows
    talked boolean NOT NULL,      -- a person and an agent have talked in them
    -- Its blocks, each of which can be read alone: the number of the last entry, and the byte behind it.
    block_seqs bigint[] NOT NULL,
    block_ends bigint[] NOT NULL
);
CREATE INDEX archived_events_age ON archived_events (last_ms);
"""


def upgrade() -> None:
    connection = op.get_bind().connection.driver_connection
    assert connection is not None
    connection.execute(SQL)
