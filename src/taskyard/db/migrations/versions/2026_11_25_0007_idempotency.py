"""Answers that an Idempotency-Key repeats."""

from alembic import op

revision = "0007"
down_revision = "0006"

TABLES = """
CREATE TABLE idempotency_keys (
    project_id integer NOT NULL REFERENCES projects,
    user_id integer NOT NULL REFERENCES users,
    key text NOT NULL,
    request_hash bytea NOT NULL,
    created_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    status smallint,
    content_type text,
    body bytea,
    PRIMARY KEY (project_id, user_id, key)
);
CREATE INDEX idempotency_keys_age ON idempotency_keys (created_at);
"""


def upgrade() -> None:
    connection = op.get_bind().connection.driver_connection
    assert connection is not None
    connection.execute(TABLES)
