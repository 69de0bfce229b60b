"""What an environment does before and beside an agent."""

from alembic import op

revision = "0016"
down_revision = "0015"

SQL = """
ALTER TABLE sandbox_environments
    -- Run in the sandbox before the agent starts; empty: nothing is.
    ADD COLUMN setup_script text NOT NULL DEFAULT '',
    -- What the agent gets as its MCP servers, in ACP's words but for `env` and `headers`, which are objects.
    ADD COLUMN mcp_servers jsonb NOT NULL DEFAULT '[]';
"""


def upgrade() -> None:
    connection = op.get_bind().connection.driver_connection
    assert connection is not None
    connection.execute(SQL)
