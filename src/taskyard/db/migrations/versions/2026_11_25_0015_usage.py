"""Usage and budgets."""

from alembic import op

revision = "0015"
down_revision = "0014"

SQL = "SELECT 1"


def upgrade() -> None:
    connection = op.get_bind().connection.driver_connection
    assert connection is not None
    connection.execute(SQL)
