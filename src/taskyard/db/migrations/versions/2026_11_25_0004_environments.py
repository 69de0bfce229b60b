"""Sandbox environments, and which key encrypts the site's secrets."""

from alembic import op

revision = "0004"
down_revision = "0003"

TABLES = """
CREATE TABLE sandbox_environments (
    id uuid PRIMARY KEY DEFAULT gen_random_uuid(),
    project_id integer NOT NULL REFERENCES projects,
    name varchar(255) NOT NULL,
    network_access_level text NOT NULL DEFAULT 'full' CHECK (network_access_level IN ('trusted', 'full', 'custom')),
    allowed_domains text[] NOT NULL DEFAULT '{}',
    include_default_domains boolean NOT NULL DEFAULT false,
    repositories text[] NOT NULL DEFAULT '{}',
    variables bytea,  -- a JSON object, encrypted; null when there are none
    private boolean NOT NULL DEFAULT true,
    internal boolean NOT NULL DEFAULT false,
    created_by_id integer REFERENCES users,
    created_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    updated_at timestamptz NOT NULL DEFAULT clock_timestamp()
);
CREATE INDEX sandbox_environments_list ON sandbox_environments (project_id, created_at DESC);

-- One row: a machine that lacks this key must not encrypt, since nobody else could read what it writes.
CREATE TABLE secret_key (
    only_row boolean PRIMARY KEY DEFAULT true CHECK (only_row),
    fingerprint text
);
INSERT INTO secret_key DEFAULT VALUES;
"""


def upgrade() -> None:
    connection = op.get_bind().connection.driver_connection
    assert connection is not None
    connection.execute(TABLES)
