"""Task automations: schedules that make runs of a task of their own."""

from alembic import op

revision = "0005"
down_revision = "0004"

TABLES = """
-- Name, prompt and repository are the task's own.
CREATE TABLE task_automations (
    id uuid PRIMARY KEY DEFAULT gen_random_uuid(),
    project_id integer NOT NULL REFERENCES projects,
    task_id uuid NOT NULL UNIQUE REFERENCES tasks,
    cron_expression varchar(100) NOT NULL,
    timezone text NOT NULL DEFAULT 'UTC',
    template_id varchar(255),
    enabled boolean NOT NULL DEFAULT true,
    next_run_at timestamptz,  -- null while disabled
    last_run_id uuid REFERENCES runs ON DELETE SET NULL,
    error text,  -- why no run could be started, or why it was paused; what a run failed of is the run's
    failed_starts integer NOT NULL DEFAULT 0,  -- in a row
    enabled_at timestamptz NOT NULL DEFAULT clock_timestamp(),  -- failures before it do not count any more
    created_by_id integer REFERENCES users,
    created_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    updated_at timestamptz NOT NULL DEFAULT clock_timestamp()
);
CREATE INDEX task_automations_list ON task_automations (project_id);
CREATE INDEX task_automations_due ON task_automations (next_run_at) WHERE enabled;
"""


def upgrade() -> None:
    connection = op.get_bind().connection.driver_connection
    assert connection is not None
    connection.execute(TABLES)
