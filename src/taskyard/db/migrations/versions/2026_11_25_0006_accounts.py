"""OAuth, sign-in sessions, rate limits."""

from alembic import op

revision = "0006"
down_revision = "0005"

TABLES = """
ALTER TABLE users ADD COLUMN password_hash text;
ALTER TABLE projects ADD COLUMN uuid uuid NOT NULL UNIQUE DEFAULT gen_random_uuid();
ALTER TABLE api_keys ADD COLUMN organization_ids uuid[];
CREATE INDEX api_keys_of_user ON api_keys (user_id);
CREATE INDEX memberships_of_project ON memberships (project_id);

-- Browsers. `hash` is of the cookie's value.
CREATE TABLE sessions (
    hash bytea PRIMARY KEY,
    user_id integer NOT NULL REFERENCES users,
    created_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    last_used_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    expires_at timestamptz NOT NULL
);
CREATE INDEX sessions_of_user ON sessions (user_id);

-- One-time links with which a person sets a password.
CREATE TABLE password_links (
    hash bytea PRIMARY KEY,
    user_id integer NOT NULL REFERENCES users,
    expires_at timestamptz NOT NULL
);

-- What a person allowed a client. Every code and token of it falls with the grant.
CREATE TABLE oauth_grants (
    id uuid PRIMARY KEY DEFAULT gen_random_uuid(),
    user_id integer NOT NULL REFERENCES users,
    client_id text NOT NULL,
    scopes text[] NOT NULL,
    project_ids integer[],
    created_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    last_used_at timestamptz,
    revoked_at timestamptz
);
CREATE INDEX oauth_grants_of_user ON oauth_grants (user_id);

CREATE TABLE oauth_codes (
    hash bytea PRIMARY KEY,
    grant_id uuid NOT NULL REFERENCES oauth_grants ON DELETE CASCADE,
    redirect_uri text NOT NULL,
    code_challenge text NOT NULL,
    expires_at timestamptz NOT NULL,
    used_at timestamptz
);

CREATE TABLE oauth_tokens (
    hash bytea PRIMARY KEY,
    grant_id uuid NOT NULL REFERENCES oauth_grants ON DELETE CASCADE,
    kind text NOT NULL CHECK (kind IN ('access', 'refresh')),
    scopes text[] NOT NULL,
    expires_at timestamptz NOT NULL,
    used_at timestamptz  -- a refresh token works once; a second use revokes the grant
);
CREATE INDEX oauth_tokens_of_grant ON oauth_tokens (grant_id);

-- Counters. Not logged: a crash forgets them, which costs nothing but a fresh window.
CREATE UNLOGGED TABLE key_usage (
    key_id uuid PRIMARY KEY,
    minute_start timestamptz NOT NULL,
    minute_count integer NOT NULL,
    hour_start timestamptz NOT NULL,
    hour_count integer NOT NULL
) WITH (fillfactor = 50);

CREATE UNLOGGED TABLE sign_in_attempts (
    subject bytea PRIMARY KEY,
    expires_at timestamptz NOT NULL,
    count integer NOT NULL
) WITH (fillfactor = 50);
"""


def upgrade() -> None:
    connection = op.get_bind().connection.driver_connection
    assert connection is not None
    connection.execute(TABLES)
