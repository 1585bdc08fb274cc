"""What MLflow has not been told yet, in order per model. Enqueued in the same transaction as the change itself."""

import json
from collections.abc import Mapping
from datetime import datetime

from sqlalchemy import delete, exists, select, update
from sqlalchemy.orm import Session, aliased

from errata.server.ledger.database import Database
from errata.server.ledger.rows import PublishState, TaskKind, TaskRow, VersionRow
from errata.server.ledger.tables import Job, Task, Version
from errata.server.ledger.versions import version_rows


def enqueue(
    session: Session, time: datetime, kind: TaskKind, model: str, version: int, payload: Mapping[str, object]
) -> None:
    """Adds a task to the session's transaction, due at once."""
    session.add(
        Task(
            kind=kind,
            model=model,
            version=version,
            payload=json.dumps(dict(payload)),
            attempts=0,
            last_error="",
            due_time=time,
        )
    )


def drop_tasks(session: Session, model: str, version: int) -> None:
    """Forgets what MLflow was still to be told of a version that is being deleted; not of measurements of it."""
    of_version = Task.model == model, Task.version == version, Task.kind != TaskKind.PUBLISH_MEASUREMENT
    session.execute(delete(Task).where(*of_version))


class OutboxLedger(Database):
    """The outbox, for its one writer.

    Payloads: PUBLISH `{"edit"}`; SET_ALIAS `{"alias"}`, where `version` 0 means that MLflow has no such version (the
    base, or one made without MLflow) and the alias is to be taken away; DELETE_VERSION `{"edit", "mlflow_version",
    "run_id"}`, the last two as known when it was deleted; PUBLISH_MEASUREMENT `{"measurement"}`.
    """

    def tasks_due(self, now: datetime, limit: int) -> list[TaskRow]:
        """The oldest tasks to try. One that waits for its retry holds back all later ones of its model.

        The list may hold several tasks of a model: after a failure the writer leaves the rest of that model's out.
        """
        earlier = aliased(Task)
        waits = exists().where(earlier.model == Task.model, earlier.id < Task.id, earlier.due_time > now)
        query = select(Task).where(Task.due_time <= now, ~waits).order_by(Task.id).limit(limit)
        with self._read() as session:
            return [_row(task) for task in session.scalars(query)]

    def task_done(self, task: int) -> None:
        """MLflow knows. Idempotent."""
        with self._write.begin() as session:
            session.execute(delete(Task).where(Task.id == task))

    def task_failed(self, task: int, error: str, retry_at: datetime) -> None:
        """Keeps the task for `retry_at`, with one attempt more. Nothing happens if it is gone."""
        values = {"attempts": Task.attempts + 1, "last_error": error.replace("\0", ""), "due_time": retry_at}
        with self._write.begin() as session:
            session.execute(update(Task).where(Task.id == task).values(values))

    def published(self, model: str, number: int, run_id: str, mlflow_version: int) -> None:
        """The version is in MLflow under this run and number. Idempotent; also for one deleted meanwhile."""
        values = {"publish_state": PublishState.PUBLISHED, "mlflow_run_id": run_id, "mlflow_version": mlflow_version}
        with self._write.begin() as session:
            session.execute(update(Version).where(Version.model == model, Version.number == number).values(values))

    def measurement_published(self, job: str, run_id: str) -> None:
        """The measurement is in MLflow under this run. Idempotent."""
        with self._write.begin() as session:
            session.execute(update(Job).where(Job.id == job).values(mlflow_run_id=run_id))

    def unpublished(self) -> list[VersionRow]:
        """The versions that are to be in MLflow and are not yet, by model and number."""
        query = select(Version).where(Version.publish_state == PublishState.PENDING, Version.delete_time.is_(None))
        with self._read() as session:
            return version_rows(session, session.scalars(query.order_by(Version.model, Version.number)).all())


def _row(task: Task) -> TaskRow:
    return TaskRow(
        id=task.id,
        kind=task.kind,
        model=task.model,
        version=task.version,
        payload=task.payload,
        attempts=task.attempts,
        last_error=task.last_error,
    )
