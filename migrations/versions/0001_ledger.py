"""The ledger's first tables.

Revision 0001, after nothing.
"""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None

_COUNTER = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
_TIME = sa.DateTime(timezone=True)
_WORD = sa.String(32)


def upgrade() -> None:
    """To this revision."""
    _models_and_versions()
    _jobs()
    _aliases()
    _outbox_audit_tokens()


def _models_and_versions() -> None:
    op.create_table(
        "errata_models",
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("base_sha256", sa.Text(), nullable=False),
        sa.Column("architecture", sa.Text(), nullable=False),
        sa.Column("layers", sa.Integer(), nullable=False),
        sa.Column("next_number", sa.Integer(), nullable=False),
        sa.Column("create_time", _TIME, nullable=False),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_errata_models")),
    )
    op.create_table(
        "errata_versions",
        sa.Column("model", sa.Text(), nullable=False),
        sa.Column("number", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("parent", sa.Integer(), nullable=True),
        sa.Column("edit", sa.Text(), nullable=True),
        sa.Column("base_sha256", sa.Text(), nullable=False),
        sa.Column("delta_sha256", sa.Text(), nullable=False),
        sa.Column("delta_bytes", sa.BigInteger(), nullable=False),
        sa.Column("layers", sa.JSON(), nullable=False),
        sa.Column("facts", sa.JSON(), nullable=False),
        sa.Column("scores", sa.Text(), nullable=False),
        sa.Column("rejections", sa.JSON(), nullable=False),
        sa.Column("publish_state", _WORD, nullable=False),
        sa.Column("mlflow_version", sa.Integer(), nullable=False),
        sa.Column("mlflow_run_id", sa.Text(), nullable=False),
        sa.Column("created_by", sa.Text(), nullable=False),
        sa.Column("create_time", _TIME, nullable=False),
        sa.Column("delete_time", _TIME, nullable=True),
        sa.ForeignKeyConstraint(["model"], ["errata_models.name"], name=op.f("fk_errata_versions_errata_models")),
        sa.ForeignKeyConstraint(
            ["model", "parent"],
            ["errata_versions.model", "errata_versions.number"],
            name=op.f("fk_errata_versions_errata_versions"),
        ),
        sa.PrimaryKeyConstraint("model", "number", name=op.f("pk_errata_versions")),
        sa.UniqueConstraint("edit", name=op.f("uq_errata_versions_edit")),
    )
    op.create_index(op.f("ix_errata_versions_delta_sha256"), "errata_versions", ["delta_sha256"])


def _jobs() -> None:
    op.create_table(
        "errata_jobs",
        sa.Column("seq", _COUNTER, nullable=False),
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("kind", _WORD, nullable=False),
        sa.Column("model", sa.Text(), nullable=False),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column("request_id", sa.Text(), nullable=True),
        sa.Column("request_sha256", sa.Text(), nullable=False),
        sa.Column("summary", sa.LargeBinary(), nullable=False),
        sa.Column("state", _WORD, nullable=False),
        sa.Column("stage", sa.Text(), nullable=False),
        sa.Column("done", sa.Integer(), nullable=False),
        sa.Column("total", sa.Integer(), nullable=False),
        sa.Column("failure_reason", sa.Text(), nullable=True),
        sa.Column("failure_message", sa.Text(), nullable=True),
        sa.Column("failure_field", sa.Text(), nullable=True),
        sa.Column("made", sa.Integer(), nullable=True),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("cancel_requested", sa.Boolean(), nullable=False),
        sa.Column("created_by", sa.Text(), nullable=False),
        sa.Column("create_time", _TIME, nullable=False),
        sa.Column("start_time", _TIME, nullable=True),
        sa.Column("end_time", _TIME, nullable=True),
        sa.ForeignKeyConstraint(
            ["model", "version"],
            ["errata_versions.model", "errata_versions.number"],
            name=op.f("fk_errata_jobs_errata_versions"),
        ),
        sa.PrimaryKeyConstraint("seq", name=op.f("pk_errata_jobs")),
        sa.UniqueConstraint("id", name=op.f("uq_errata_jobs_id")),
        sa.UniqueConstraint("kind", "model", "request_id", name=op.f("uq_errata_jobs_kind_model_request_id")),
        sqlite_autoincrement=True,
    )
    op.create_index(op.f("ix_errata_jobs_state_seq"), "errata_jobs", ["state", "seq"])
    op.create_index(op.f("ix_errata_jobs_model_kind_seq"), "errata_jobs", ["model", "kind", "seq"])
    op.create_table(
        "errata_job_bodies",
        sa.Column("seq", _COUNTER, autoincrement=False, nullable=False),
        sa.Column("part", _WORD, nullable=False),
        sa.Column("body", sa.LargeBinary(), nullable=False),
        sa.ForeignKeyConstraint(["seq"], ["errata_jobs.seq"], name=op.f("fk_errata_job_bodies_errata_jobs")),
        sa.PrimaryKeyConstraint("seq", "part", name=op.f("pk_errata_job_bodies")),
    )


def _aliases() -> None:
    op.create_table(
        "errata_aliases",
        sa.Column("model", sa.Text(), nullable=False),
        sa.Column("alias", sa.Text(), nullable=False),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column("revision", sa.Integer(), nullable=False),
        sa.ForeignKeyConstraint(
            ["model", "version"],
            ["errata_versions.model", "errata_versions.number"],
            name=op.f("fk_errata_aliases_errata_versions"),
        ),
        sa.PrimaryKeyConstraint("model", "alias", name=op.f("pk_errata_aliases")),
    )
    op.create_table(
        "errata_alias_changes",
        sa.Column("id", _COUNTER, nullable=False),
        sa.Column("model", sa.Text(), nullable=False),
        sa.Column("alias", sa.Text(), nullable=False),
        sa.Column("previous", sa.Integer(), nullable=True),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column("taken_back", sa.Boolean(), nullable=False),
        sa.Column("time", _TIME, nullable=False),
        sa.ForeignKeyConstraint(
            ["model", "alias"],
            ["errata_aliases.model", "errata_aliases.alias"],
            name=op.f("fk_errata_alias_changes_errata_aliases"),
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_errata_alias_changes")),
        sqlite_autoincrement=True,
    )
    op.create_index(op.f("ix_errata_alias_changes_model_alias_id"), "errata_alias_changes", ["model", "alias", "id"])


def _outbox_audit_tokens() -> None:
    op.create_table(
        "errata_tasks",
        sa.Column("id", _COUNTER, nullable=False),
        sa.Column("kind", _WORD, nullable=False),
        sa.Column("model", sa.Text(), nullable=False),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column("payload", sa.Text(), nullable=False),
        sa.Column("attempts", sa.Integer(), nullable=False),
        sa.Column("last_error", sa.Text(), nullable=False),
        sa.Column("due_time", _TIME, nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_errata_tasks")),
        sqlite_autoincrement=True,
    )
    op.create_index(op.f("ix_errata_tasks_model_id"), "errata_tasks", ["model", "id"])
    op.create_table(
        "errata_audit",
        sa.Column("id", _COUNTER, nullable=False),
        sa.Column("time", _TIME, nullable=False),
        sa.Column("actor", sa.Text(), nullable=False),
        sa.Column("action", sa.Text(), nullable=False),
        sa.Column("model", sa.Text(), nullable=False),
        sa.Column("resource", sa.Text(), nullable=False),
        sa.Column("details", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_errata_audit")),
        sqlite_autoincrement=True,
    )
    op.create_index(op.f("ix_errata_audit_model_id"), "errata_audit", ["model", "id"])
    op.create_table(
        "errata_tokens",
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("sha256", sa.Text(), nullable=False),
        sa.Column("roles", sa.JSON(), nullable=False),
        sa.Column("create_time", _TIME, nullable=False),
        sa.Column("revoke_time", _TIME, nullable=True),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_errata_tokens")),
        sa.UniqueConstraint("sha256", name=op.f("uq_errata_tokens_sha256")),
    )


def downgrade() -> None:
    """To an empty database: everything the ledger knows is lost."""
    for table in (
        "tokens",
        "audit",
        "tasks",
        "alias_changes",
        "aliases",
        "job_bodies",
        "jobs",
        "versions",
        "models",
    ):
        op.drop_table(f"errata_{table}")
