"""Usage and budgets."""

from alembic import op

revision = "0015"
down_revision = "0014"

SQL = """
-- Every call of a model that the gateway let through.
CREATE TABLE model_calls (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    run_id uuid NOT NULL REFERENCES runs ON DELETE CASCADE,
    project_id integer NOT NULL,
    ended_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    provider text NOT NULL,
    endpoint text NOT NULL,
    model text,                    -- as the answer names it
    status smallint NOT NULL,      -- of HTTP, as the agent got it
    complete boolean NOT NULL,     -- the answer was passed on to its end
    metered boolean NOT NULL,      -- the answer told its usage; else the tokens are estimated
    input_tokens bigint NOT NULL,  -- neither read from nor written to the cache
    output_tokens bigint NOT NULL,
    cached_read_tokens bigint NOT NULL,
    cached_write_tokens bigint NOT NULL,
    cost numeric(20, 10),          -- US dollars; null: the model's price was not known
    milliseconds integer NOT NULL
);
CREATE INDEX model_calls_run ON model_calls (run_id);
CREATE INDEX model_calls_project ON model_calls (project_id, ended_at);
"""


def upgrade() -> None:
    connection = op.get_bind().connection.driver_connection
    assert connection is not None
    connection.execute(SQL)
