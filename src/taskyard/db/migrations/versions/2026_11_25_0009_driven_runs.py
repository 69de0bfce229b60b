"""Finding the runs that should be driven, among all that ever were."""

from alembic import op

revision = "0009"
down_revision = "0008"


def upgrade() -> None:
    connection = op.get_bind().connection.driver_connection
    assert connection is not None
    connection.execute(
        "CREATE INDEX runs_driven ON runs (id) WHERE started_at IS NOT NULL AND status IN ('queued', 'in_progress')"
    )
