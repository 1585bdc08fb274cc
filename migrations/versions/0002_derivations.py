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
    """Back to 0001, which takes every version for an edit's: derived ones answer, but nothing tells how they came."""
    with op.batch_alter_table("errata_versions") as table:
        table.drop_column("made_by")
