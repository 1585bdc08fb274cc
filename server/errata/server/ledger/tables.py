"""The ledger's tables, as `migrations/` makes them; a test holds the two together.

Every table's name begins with `errata_`, so that the ledger can share a database with MLflow. Knows no rule of the
service: what may change when stands in the modules beside this one.
"""

from datetime import UTC, datetime
from enum import StrEnum

from sqlalchemy import (
    JSON,
    BigInteger,
    DateTime,
    Dialect,
    Enum,
    ForeignKey,
    ForeignKeyConstraint,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    Text,
    TypeDecorator,
    UniqueConstraint,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from errata.server.ledger.rows import JobKind, JobState, PublishState, TaskKind

PREFIX = "errata_"
VERSION_TABLE = f"{PREFIX}alembic_version"

# SQLite counts by itself only in a column whose type is INTEGER.
_Counter = BigInteger().with_variant(Integer, "sqlite")


class BodyPart(StrEnum):
    """Which of a job's two large values."""

    REQUEST = "request"
    RESULT = "result"


class UtcDateTime(TypeDecorator[datetime]):
    """A time, aware and in UTC on both databases: SQLite stores none of the zone."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """Refuses a naive time: nobody could say what it means."""
        if value is not None and value.tzinfo is None:
            raise ValueError(f"{value} has no time zone; give the ledger aware times")
        return value and value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """In UTC, whatever zone the database's session has."""
        return value and (value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC))


def _words(kind: type[StrEnum]) -> Enum:
    """Stored as its value in a text column: a new member needs no migration."""
    return Enum(kind, native_enum=False, length=32, values_callable=lambda members: [m.value for m in members])


class Base(DeclarativeBase):
    """Constraints have names, so that a migration can drop them on either database."""

    metadata = MetaData(
        naming_convention={
            "pk": "pk_%(table_name)s",
            "fk": "fk_%(table_name)s_%(referred_table_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        }
    )
    type_annotation_map = {  # noqa: RUF012 - SQLAlchemy reads it from the class
        str: Text(),
        datetime: UtcDateTime(),
        list[int]: JSON(),
        list[str]: JSON(),
        dict[str, str]: JSON(),
        JobKind: _words(JobKind),
        JobState: _words(JobState),
        PublishState: _words(PublishState),
        TaskKind: _words(TaskKind),
        BodyPart: _words(BodyPart),
    }


class Model(Base):
    """A base model. `next_number` only rises, so that no version's number is used twice."""

    __tablename__ = f"{PREFIX}models"

    name: Mapped[str] = mapped_column(primary_key=True)
    base_sha256: Mapped[str]
    architecture: Mapped[str]
    layers: Mapped[int]
    next_number: Mapped[int]
    create_time: Mapped[datetime]


class Version(Base):
    """A version; the base is number 0. A deleted one stays as a row: jobs and audit still name it.

    `edit` is the id of the job that made it, an edit or a derivation, which `made_by` says.
    """

    __tablename__ = f"{PREFIX}versions"
    __table_args__ = (
        ForeignKeyConstraint(["model", "parent"], [f"{PREFIX}versions.model", f"{PREFIX}versions.number"]),
    )

    model: Mapped[str] = mapped_column(ForeignKey(f"{PREFIX}models.name"), primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    parent: Mapped[int | None]
    edit: Mapped[str | None] = mapped_column(unique=True)
    made_by: Mapped[JobKind | None]
    base_sha256: Mapped[str]
    delta_sha256: Mapped[str] = mapped_column(index=True)
    delta_bytes: Mapped[int] = mapped_column(BigInteger)
    layers: Mapped[list[int]]
    facts: Mapped[list[str]]
    scores: Mapped[str]
    rejections: Mapped[list[str]]
    publish_state: Mapped[PublishState]
    mlflow_version: Mapped[int]
    mlflow_run_id: Mapped[str]
    created_by: Mapped[str]
    create_time: Mapped[datetime]
    delete_time: Mapped[datetime | None]


class Job(Base):
    """A piece of work. `seq` is the order they came in, whatever the clock says."""

    __tablename__ = f"{PREFIX}jobs"
    __table_args__ = (
        ForeignKeyConstraint(["model", "version"], [f"{PREFIX}versions.model", f"{PREFIX}versions.number"]),
        UniqueConstraint("kind", "model", "request_id"),
        Index(None, "state", "seq"),
        Index(None, "model", "kind", "seq"),
        {"sqlite_autoincrement": True},
    )

    seq: Mapped[int] = mapped_column(_Counter, primary_key=True)
    id: Mapped[str] = mapped_column(unique=True)
    kind: Mapped[JobKind]
    model: Mapped[str]
    version: Mapped[int]
    request_id: Mapped[str | None]
    request_sha256: Mapped[str]
    summary: Mapped[bytes] = mapped_column(LargeBinary)
    state: Mapped[JobState]
    stage: Mapped[str]
    done: Mapped[int]
    total: Mapped[int]
    failure_reason: Mapped[str | None]
    failure_message: Mapped[str | None]
    failure_field: Mapped[str | None]
    made: Mapped[int | None]
    attempt: Mapped[int]
    cancel_requested: Mapped[bool]
    created_by: Mapped[str]
    create_time: Mapped[datetime]
    start_time: Mapped[datetime | None]
    end_time: Mapped[datetime | None]
    mlflow_run_id: Mapped[str | None]


class JobBody(Base):
    """A job's request or result, up to tens of megabytes.

    A table of its own: SQLite writes a whole row anew for every change, and a job's progress changes often.
    """

    __tablename__ = f"{PREFIX}job_bodies"

    seq: Mapped[int] = mapped_column(_Counter, ForeignKey(f"{PREFIX}jobs.seq"), primary_key=True, autoincrement=False)
    part: Mapped[BodyPart] = mapped_column(primary_key=True)
    body: Mapped[bytes] = mapped_column(LargeBinary)


class Alias(Base):
    """A name for a version. `revision` counts its changes, rollbacks among them."""

    __tablename__ = f"{PREFIX}aliases"
    __table_args__ = (
        ForeignKeyConstraint(["model", "version"], [f"{PREFIX}versions.model", f"{PREFIX}versions.number"]),
    )

    model: Mapped[str] = mapped_column(primary_key=True)
    alias: Mapped[str] = mapped_column(primary_key=True)
    version: Mapped[int]
    revision: Mapped[int]


class AliasChange(Base):
    """A promotion: `alias` moved from `previous` (none: it was new) to `version`. A rollback takes it back."""

    __tablename__ = f"{PREFIX}alias_changes"
    __table_args__ = (
        ForeignKeyConstraint(["model", "alias"], [f"{PREFIX}aliases.model", f"{PREFIX}aliases.alias"]),
        Index(None, "model", "alias", "id"),
        {"sqlite_autoincrement": True},
    )

    id: Mapped[int] = mapped_column(_Counter, primary_key=True)
    model: Mapped[str]
    alias: Mapped[str]
    previous: Mapped[int | None]
    version: Mapped[int]
    taken_back: Mapped[bool]
    time: Mapped[datetime]


class Task(Base):
    """The outbox: what MLflow has not been told yet. Done is deleted; ids are never used again."""

    __tablename__ = f"{PREFIX}tasks"
    __table_args__ = (Index(None, "model", "id"), {"sqlite_autoincrement": True})

    id: Mapped[int] = mapped_column(_Counter, primary_key=True)
    kind: Mapped[TaskKind]
    model: Mapped[str]
    version: Mapped[int]
    payload: Mapped[str]
    attempts: Mapped[int]
    last_error: Mapped[str]
    due_time: Mapped[datetime]


class AuditEntry(Base):
    """Who changed what when. `model` is empty for what concerns the whole service."""

    __tablename__ = f"{PREFIX}audit"
    __table_args__ = (Index(None, "model", "id"), {"sqlite_autoincrement": True})

    id: Mapped[int] = mapped_column(_Counter, primary_key=True)
    time: Mapped[datetime]
    actor: Mapped[str]
    action: Mapped[str]
    model: Mapped[str]
    resource: Mapped[str]
    details: Mapped[str]


class Token(Base):
    """A caller's token: only the SHA-256 of its secret, which is 32 random bytes and so needs no salt."""

    __tablename__ = f"{PREFIX}tokens"

    name: Mapped[str] = mapped_column(primary_key=True)
    sha256: Mapped[str] = mapped_column(unique=True)
    roles: Mapped[dict[str, str]]
    create_time: Mapped[datetime]
    revoke_time: Mapped[datetime | None]
