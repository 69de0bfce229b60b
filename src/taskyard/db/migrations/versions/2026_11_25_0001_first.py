"""The first schema: accounts, tasks, runs, events, commands, repositories, and the job engine's tables."""

import re
from collections.abc import Iterator
from pathlib import Path

import procrastinate
from alembic import op

revision = "0001"
down_revision = None

TABLES = """
-- One key for the whole site: every API process must accept the URLs that another one signed.
CREATE TABLE signing_keys (
    name text PRIMARY KEY,
    key bytea NOT NULL DEFAULT sha256((gen_random_uuid()::text || gen_random_uuid()::text)::bytea)
);
INSERT INTO signing_keys (name) VALUES ('urls');

CREATE TABLE organizations (
    id uuid PRIMARY KEY DEFAULT gen_random_uuid(),
    name text NOT NULL,
    created_at timestamptz NOT NULL DEFAULT clock_timestamp()
);

CREATE TABLE projects (
    id integer PRIMARY KEY GENERATED ALWAYS AS IDENTITY,
    organization_id uuid NOT NULL REFERENCES organizations,
    name text NOT NULL,
    next_task_number bigint NOT NULL DEFAULT 0,
    created_at timestamptz NOT NULL DEFAULT clock_timestamp()
);

CREATE TABLE users (
    id integer PRIMARY KEY GENERATED ALWAYS AS IDENTITY,
    uuid uuid NOT NULL UNIQUE DEFAULT gen_random_uuid(),
    distinct_id text NOT NULL UNIQUE DEFAULT gen_random_uuid()::text,
    email text NOT NULL,
    first_name text NOT NULL DEFAULT '',
    last_name text NOT NULL DEFAULT '',
    is_staff boolean NOT NULL DEFAULT false,
    current_project_id integer REFERENCES projects,
    created_at timestamptz NOT NULL DEFAULT clock_timestamp()
);
CREATE UNIQUE INDEX users_email ON users (lower(email));

CREATE TABLE memberships (
    user_id integer NOT NULL REFERENCES users,
    project_id integer NOT NULL REFERENCES projects,
    role text NOT NULL DEFAULT 'member' CHECK (role IN ('member', 'admin')),
    PRIMARY KEY (user_id, project_id)
);

CREATE TABLE api_keys (
    id uuid PRIMARY KEY DEFAULT gen_random_uuid(),
    user_id integer NOT NULL REFERENCES users,
    label text NOT NULL,
    hash bytea NOT NULL UNIQUE,
    mask text NOT NULL,
    scopes text[] NOT NULL,
    project_ids integer[],
    created_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    expires_at timestamptz,
    last_used_at timestamptz,
    revoked_at timestamptz
);

CREATE TABLE repositories (
    project_id integer NOT NULL REFERENCES projects,
    name text NOT NULL,
    origin text NOT NULL,
    created_by_id integer REFERENCES users,
    created_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (project_id, name)
);

CREATE TABLE tasks (
    id uuid PRIMARY KEY DEFAULT gen_random_uuid(),
    project_id integer NOT NULL REFERENCES projects,
    task_number bigint NOT NULL,
    title varchar(255) NOT NULL DEFAULT '',
    title_manually_set boolean NOT NULL DEFAULT false,
    description text NOT NULL DEFAULT '',
    origin_product varchar(20) NOT NULL DEFAULT '',
    repository varchar(255),
    github_integration_id integer,
    github_user_integration_id uuid,
    signal_report_id uuid,
    json_schema jsonb,
    internal boolean NOT NULL DEFAULT false,
    ci_prompt text,
    created_by_id integer REFERENCES users,
    created_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    updated_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    deleted_at timestamptz,
    UNIQUE (project_id, task_number)
);
CREATE INDEX tasks_list ON tasks (project_id, created_at DESC) WHERE deleted_at IS NULL;

CREATE TABLE runs (
    id uuid PRIMARY KEY DEFAULT gen_random_uuid(),
    task_id uuid NOT NULL REFERENCES tasks,
    project_id integer NOT NULL REFERENCES projects,
    status text NOT NULL CHECK
        (status IN ('not_started', 'queued', 'in_progress', 'completed', 'failed', 'cancelled')),
    environment text NOT NULL CHECK (environment IN ('local', 'cloud')),
    stage varchar(100),
    branch varchar(255),
    error_message text,
    output jsonb,
    state jsonb NOT NULL DEFAULT '{}',
    artifacts jsonb NOT NULL DEFAULT '[]',
    created_by_id integer REFERENCES users,
    created_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    updated_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    started_at timestamptz,  -- when its job was enqueued; a run that nobody started has no agent to talk to
    completed_at timestamptz
);
CREATE INDEX runs_of_task ON runs (task_id, created_at DESC, id DESC);

-- What changes with every event or heartbeat, apart from the run itself: a small row that stays on its page.
CREATE TABLE run_cursors (
    run_id uuid PRIMARY KEY REFERENCES runs,
    last_seq bigint NOT NULL DEFAULT 0,
    last_ms bigint NOT NULL DEFAULT 0,
    generation integer NOT NULL DEFAULT 0,
    worker text,
    leased_until timestamptz
) WITH (fillfactor = 50);

CREATE TABLE events (
    run_id uuid NOT NULL REFERENCES runs,
    seq bigint NOT NULL,
    at_ms bigint NOT NULL,
    shown smallint NOT NULL,  -- 1 = in the log, 2 = on the stream, 3 = both
    data text NOT NULL,
    PRIMARY KEY (run_id, seq)
);

CREATE TABLE commands (
    run_id uuid NOT NULL REFERENCES runs,
    seq bigint NOT NULL,
    method text NOT NULL,
    params jsonb NOT NULL,
    created_by_id integer REFERENCES users,
    created_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    delivered_at timestamptz,
    generation integer,
    result jsonb,
    error text,
    answered_at timestamptz,
    PRIMARY KEY (run_id, seq)
);
CREATE INDEX commands_waiting ON commands (run_id, seq) WHERE delivered_at IS NULL;
"""


JOBS_UP_TO = "03.04.00_50"
TYPE_VALUES = {
    "'failed'(?=  -- The job ended)": "'failed', 'cancelled', 'aborting', 'aborted'",
    "'scheduled'": "'abort_requested', 'aborted', 'scheduled', 'retried'",
}


def upgrade() -> None:
    connection = op.get_bind().connection.driver_connection
    assert connection is not None
    connection.execute(TABLES)
    for script in job_engine():
        connection.execute(script)


def job_engine() -> Iterator[str]:
    """The job engine's own migrations, up to a fixed one: what a later release adds comes with a later revision here,
    so that every database goes through the same steps whatever release is installed.

    Before PostgreSQL 17 a value that was added to a type cannot be used in the same transaction. So the types are made
    with all values, in the order that the scripts give them.
    """
    folder = Path(procrastinate.__file__).parent / "sql" / "migrations"
    for script in sorted(folder.glob("*.sql")):
        if script.name[: len(JOBS_UP_TO)] > JOBS_UP_TO:
            continue
        text = script.read_text("utf-8")
        for value, values in TYPE_VALUES.items():
            text = re.sub(rf"(CREATE TYPE [^;]*?){value}(?=[^;]*\);)", rf"\1{values}", text)
        yield re.sub(r"ALTER TYPE \w+ ADD VALUE [^;]*;", "", text)
