"""When somebody joined a project."""

from alembic import op

revision = "0013"
down_revision = "0012"

SQL = """
ALTER TABLE memberships ADD COLUMN joined_at timestamptz, ADD COLUMN updated_at timestamptz;
-- Not before the project or the user was there: more is not known of the old ones.
UPDATE memberships m SET joined_at = greatest(p.created_at, u.created_at), updated_at = clock_timestamp()
FROM projects p, users u WHERE p.id = m.project_id AND u.id = m.user_id;
ALTER TABLE memberships
    ALTER COLUMN joined_at SET DEFAULT clock_timestamp(), ALTER COLUMN joined_at SET NOT NULL,
    ALTER COLUMN updated_at SET DEFAULT clock_timestamp(), ALTER COLUMN updated_at SET NOT NULL;
"""


def upgrade() -> None:
    connection = op.get_bind().connection.driver_connection
    assert connection is not None
    connection.execute(SQL)
