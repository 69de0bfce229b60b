"""The queue of runs."""

from alembic import op

revision = "0011"
down_revision = "0010"

SQL = "SELECT 1"


def upgrade() -> None:
    connection = op.get_bind().connection.driver_connection
    assert connection is not None
    connection.execute(SQL)
