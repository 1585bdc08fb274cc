"""Versions that were derived from versions: which kind of job made each.

Revision 0002, after 0001.
"""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """To this revision. Until now every version but the base was an edit's."""
    op.add_column("errata_versions", sa.Column("made_by", sa.String(32), nullable=True))
    op.execute("UPDATE errata_versions SET made_by = 'edit' WHERE edit IS NOT NULL")


def downgrade() -> None:
    """Back to 0001, which knows no job but traces, edits and evaluations, and takes every version for an edit's.

    Refused while a version is there that something else made: its lineage could not be read. Other jobs go.
    """
    bind = op.get_bind()
    derived = bind.scalar(sa.text("SELECT count(*) FROM errata_versions WHERE made_by <> 'edit'"))
    if derived:
        raise RuntimeError(
            f"{derived} version(s), deleted ones included, were derived from others, and revision 0001 cannot read "
            "them; restore the backup from before 0002 instead"
        )
    known = "(SELECT seq FROM errata_jobs WHERE kind IN ('trace', 'edit', 'evaluation'))"
    op.execute(f"DELETE FROM errata_job_bodies WHERE seq NOT IN {known}")
    op.execute(f"DELETE FROM errata_jobs WHERE seq NOT IN {known}")
    with op.batch_alter_table("errata_versions") as table:
        table.drop_column("made_by")
