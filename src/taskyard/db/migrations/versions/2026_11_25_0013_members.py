"""Members and sessions."""

from alembic import op

revision = "0013"
down_revision = "0012"

SQL = "SELECT 1"


def upgrade() -> None:
    connection = op.get_bind().connection.driver_connection
    assert connection is not None
    connection.execute(SQL)
