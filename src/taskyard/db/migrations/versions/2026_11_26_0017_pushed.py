"""What a run's workers have pushed, or were about to."""

from alembic import op

revision = "0017"
down_revision = "0016"

SQL = """
-- Commits that stand on the run's branch because of us, also when a worker died before it could say so.
ALTER TABLE run_cursors ADD COLUMN pushed text[] NOT NULL DEFAULT '{}';
"""


def upgrade() -> None:
    connection = op.get_bind().connection.driver_connection
    assert connection is not None
    connection.execute(SQL)
