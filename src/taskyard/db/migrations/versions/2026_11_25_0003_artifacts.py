"""Artifacts, and what is kept in object storage until when."""

from alembic import op

revision = "0003"
down_revision = "0002"

TABLES = """
INSERT INTO signing_keys (name) VALUES ('objects');

-- Finalized uploads that wait for the run that takes them.
CREATE TABLE staged_artifacts (
    task_id uuid NOT NULL REFERENCES tasks,
    id text NOT NULL,
    entry jsonb NOT NULL,
    expires_at timestamptz NOT NULL,
    PRIMARY KEY (task_id, id)
);
CREATE INDEX staged_artifacts_expired ON staged_artifacts (expires_at);

-- Every key that may be in object storage, from before its upload until after its removal.
CREATE TABLE stored_objects (
    key text PRIMARY KEY,
    task_id uuid NOT NULL REFERENCES tasks,
    keep_until timestamptz NOT NULL
);
CREATE INDEX stored_objects_due ON stored_objects (keep_until);
"""


def upgrade() -> None:
    connection = op.get_bind().connection.driver_connection
    assert connection is not None
    connection.execute(TABLES)
