"""Measurements: jobs that are published in MLflow, each in a run of its own.

Revision 0003, after 0002.
"""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"

_THEIRS = "SELECT seq FROM errata_jobs WHERE kind = 'measurement'"


def upgrade() -> None:
    """To this revision."""
    op.add_column("errata_jobs", sa.Column("mlflow_run_id", sa.Text(), nullable=True))


def downgrade() -> None:
    """Back to 0002, which knows no measurements: they go, from the outbox as well. What MLflow has of them stays."""
    op.execute("DELETE FROM errata_tasks WHERE kind = 'publish_measurement'")
    op.execute(f"DELETE FROM errata_job_bodies WHERE seq IN ({_THEIRS})")
    op.execute("DELETE FROM errata_jobs WHERE kind = 'measurement'")
    op.drop_column("errata_jobs", "mlflow_run_id")
