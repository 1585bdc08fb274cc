"""What the ledger hands out: frozen rows. Times are aware, in UTC."""

from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum


class JobKind(StrEnum):
    """What a job does."""

    TRACE = "trace"
    EDIT = "edit"
    EVALUATION = "evaluation"
    DERIVATION = "derivation"
    BISECTION = "bisection"
    MEASUREMENT = "measurement"


class JobState(StrEnum):
    """Where a job stands; the proto's State."""

    PENDING = "pending"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"
    REJECTED = "rejected"

    @property
    def ended(self) -> bool:
        """Whether it will never change again."""
        return self not in (JobState.PENDING, JobState.RUNNING)


class PublishState(StrEnum):
    """Whether a version is in MLflow yet; the proto's PublishState."""

    PENDING = "pending"
    PUBLISHED = "published"
    NONE = "none"


class TaskKind(StrEnum):
    """What the outbox asks MLflow to do."""

    PUBLISH = "publish"
    SET_ALIAS = "set_alias"
    DELETE_VERSION = "delete_version"
    PUBLISH_MEASUREMENT = "publish_measurement"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelRow:
    """A base model. `base_sha256` and `architecture` are empty and `layers` 0 until it was loaded once."""

    name: str
    base_sha256: str
    architecture: str
    layers: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """Why a job failed; the proto's Failure."""

    reason: str
    message: str
    field: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class JobRow:
    """A piece of work. `request` and `result` are serialized protos; lists leave them out.

    `summary` is what a list shows of the job, in a few bytes, of its outcome too once it has ended.
    `version` is the version worked on; `made` the version that it made. `attempt` counts its starts. A running job
    has a `result` where it keeps what it has found so far. `mlflow_run_id` is empty until a measurement is published.
    """

    id: str
    kind: JobKind
    model: str
    version: int
    state: JobState
    stage: str
    done: int
    total: int
    request: bytes
    result: bytes | None
    failure: Failure | None
    made: int | None
    attempt: int
    cancel_requested: bool
    created_by: str
    create_time: datetime
    start_time: datetime | None
    end_time: datetime | None
    summary: bytes = b""
    mlflow_run_id: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class NewVersion:
    """What an edit or a derivation hands in. `scores` is a serialized list of the proto's MetricScore, as JSON.

    `alias` is pointed to the version unless that is rejected; "" for none.
    """

    base_sha256: str
    delta_sha256: str
    delta_bytes: int
    layers: tuple[int, ...]
    facts: tuple[str, ...]
    scores: str
    rejections: tuple[str, ...]
    alias: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class VersionRow:
    """A version. The base is number 0, without parent, edit or delta. Rejected where `rejections` is not empty.

    `edit` is the job that made it, of the kind `made_by`: an edit or a derivation.
    """

    model: str
    number: int
    parent: int | None
    edit: str | None
    base_sha256: str
    delta_sha256: str
    delta_bytes: int
    layers: tuple[int, ...]
    facts: tuple[str, ...]
    scores: str
    rejections: tuple[str, ...]
    aliases: tuple[str, ...]
    publish_state: PublishState
    mlflow_version: int
    mlflow_run_id: str
    created_by: str
    create_time: datetime
    made_by: JobKind = JobKind.EDIT


@dataclass(frozen=True, slots=True, kw_only=True)
class AliasRow:
    """A name for a version. `etag` changes whenever it moves."""

    model: str
    alias: str
    version: int
    etag: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskRow:
    """One thing for MLflow to be told, in the order of `id`. `payload` is JSON."""

    id: int
    kind: TaskKind
    model: str
    version: int
    payload: str
    attempts: int
    last_error: str


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditRow:
    """One change, for the record. `details` is a JSON object."""

    id: int
    time: datetime
    actor: str
    action: str
    model: str
    resource: str
    details: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenRow:
    """A caller. `roles` maps a model's name, or "*", to a role."""

    name: str
    roles: dict[str, str]
    create_time: datetime
    revoked: bool
