"""The queue of runs, the workers that take from it, and the pool that an environment asks for."""

from alembic import op

revision = "0011"
down_revision = "0010"

SQL = """
-- Runs that want a driver and have none. A worker takes its row away as it takes the run.
CREATE TABLE run_queue (
    run_id uuid PRIMARY KEY REFERENCES runs,
    project_id integer NOT NULL REFERENCES projects,
    agent text NOT NULL,               -- '' stands for the default
    environment_id uuid NOT NULL,      -- its pool is looked up when it matters; zeros without an environment
    priority integer NOT NULL,
    begun boolean NOT NULL,            -- it was driven before: it goes on before others begin
    since timestamptz NOT NULL
);
CREATE INDEX run_queue_order
    ON run_queue (project_id, agent, environment_id, begun DESC, priority DESC, since, run_id);

-- When a project got a driver last.
CREATE TABLE queue_turns (
    project_id integer PRIMARY KEY REFERENCES projects,
    at timestamptz NOT NULL
);

-- A lease is a slot from the moment a worker takes the run, until it is given back or found lost.
ALTER TABLE run_cursors
    ADD COLUMN reserved_by text,       -- the worker that has taken the run, until it claims it
    ADD COLUMN slot_agent text;        -- whom the limit of an agent counts it for
CREATE INDEX run_cursors_held ON run_cursors (run_id) WHERE leased_until IS NOT NULL;

CREATE TABLE workers (
    name text PRIMARY KEY,
    pools text[] NOT NULL,
    sandboxes text[] NOT NULL,         -- kinds
    agents text[] NOT NULL,            -- installed ones
    capacity integer NOT NULL,
    version text NOT NULL,
    started_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    seen_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    stopping boolean NOT NULL DEFAULT false
);

ALTER TABLE sandbox_environments ADD COLUMN worker_pool text;

-- What waits at this moment; runs that are driven already have their lease.
INSERT INTO run_queue
SELECT r.id, r.project_id,
    coalesce(nullif(r.state ->> 'agent', ''), nullif(r.state ->> 'runtime_adapter', ''), ''),
    '00000000-0000-0000-0000-000000000000', 0, r.status = 'in_progress', r.started_at
FROM runs r JOIN run_cursors c ON c.run_id = r.id
WHERE r.started_at IS NOT NULL AND r.status IN ('queued', 'in_progress') AND c.leased_until IS NULL;
"""


def upgrade() -> None:
    connection = op.get_bind().connection.driver_connection
    assert connection is not None
    connection.execute(SQL)
