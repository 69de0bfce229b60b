"""The image that sandboxes of an environment are made of."""

from alembic import op

revision = "0018"
down_revision = "0017"

SQL = """
-- Null: the site's.
ALTER TABLE sandbox_environments ADD COLUMN image text;
"""


def upgrade() -> None:
    connection = op.get_bind().connection.driver_connection
    assert connection is not None
    connection.execute(SQL)
