"""How a version comes to be and how it ends."""

from collections.abc import Sequence
from datetime import datetime

from sqlalchemy import ColumnElement, select
from sqlalchemy.orm import Session

from errata.server.errors import BaseChangedError, LedgerError, VersionInUseError
from errata.server.ledger.aliases import point
from errata.server.ledger.audit import write_down
from errata.server.ledger.database import Database
from errata.server.ledger.jobs import end, job_by_id
from errata.server.ledger.models import known_model
from errata.server.ledger.outbox import drop_tasks, enqueue
from errata.server.ledger.rows import JobKind, JobState, NewVersion, PublishState, TaskKind, VersionRow
from errata.server.ledger.tables import Alias, BodyPart, Job, JobBody, Model, Version
from errata.server.ledger.versions import live_version, version_row
from errata.server.names import job_name, version_name
from errata.v1 import evaluation_pb2, history_pb2

MAKERS = (JobKind.EDIT, JobKind.DERIVATION)
"""The kinds of jobs that make versions."""


class EditLedger(Database):
    """Versions made and deleted."""

    def commit_edit(
        self, job: str, version: NewVersion, *, result: bytes, publish: bool, summary: bytes | None = None
    ) -> VersionRow:
        """Makes the version of an edit or a derivation and ends it: SUCCEEDED, or REJECTED with `rejections`.

        One transaction: number, version, alias, job, outbox, audit, or nothing at all. A job that has its version is
        given that one again.

        Raises:
            NotFoundError: no such job.
            BaseChangedError: the version was made for another checkpoint than the model's present one.
            LedgerError: the job has ended without a version.
        """
        with self._write.begin() as session:
            model = known_model(session, _model_of(session, job), lock=True)
            edit = job_by_id(session, job)
            if edit.made is not None:
                return version_row(session, session.get_one(Version, (model.name, edit.made)))
            _check_commit(edit, model, version)
            now = self._now()
            made = _made(edit, model.next_number, version, now, publish)
            model.next_number += 1
            edit.made = made.number
            end(edit, JobState.REJECTED if version.rejections else JobState.SUCCEEDED, now, summary=summary)
            session.add_all([made, JobBody(seq=edit.seq, part=BodyPart.RESULT, body=result)])
            if publish:
                enqueue(session, now, TaskKind.PUBLISH, model.name, made.number, {"edit": edit.id})
            write_down(
                session,
                now,
                actor=edit.created_by,
                action="version.create",
                model=model.name,
                resource=version_name(model.name, made.number),
                details={edit.kind.value: edit.id, "parent": edit.version, "rejections": version.rejections},
            )
            if version.alias and not version.rejections:
                session.flush()
                point(session, now, made, version.alias, actor=edit.created_by, publish=publish)
            return version_row(session, made)

    def delete_version(self, model: str, number: int, *, actor: str, publish: bool) -> VersionRow:
        """Deletes the version for good, and returns what it was. Its number is not used again.

        Raises:
            NotFoundError: no such model or version.
            VersionInUseError: it is the base, an alias points to it, a version is built on it, or a job that has not
                ended works on it.
        """
        with self._write.begin() as session:
            known_model(session, model, lock=True)
            version = live_version(session, model, number)
            _check_unused(session, version)
            row = version_row(session, version)
            now = self._now()
            version.delete_time = now
            drop_tasks(session, model, number)
            if publish and version.publish_state is not PublishState.NONE:
                enqueue(session, now, TaskKind.DELETE_VERSION, model, number, _in_mlflow(version))
            write_down(
                session,
                now,
                actor=actor,
                action="version.delete",
                model=model,
                resource=version_name(model, number),
                details={"edit": version.edit, "parent": version.parent, "facts": version.facts},
            )
            return row


def _model_of(session: Session, job: str) -> str:
    """Read without a lock, as the model's comes first; a job never changes its model."""
    return session.scalar(select(Job.model).where(Job.id == job)) or job_by_id(session, job).model


def _check_commit(edit: Job, model: Model, version: NewVersion) -> None:
    name = job_name(edit.kind, edit.model, edit.id)
    if edit.kind not in MAKERS:
        raise ValueError(f"{name} is no edit or derivation, and makes no version")
    if edit.state.ended:
        raise LedgerError(f"{name} has ended as {edit.state.name} and can make no version")
    if model.base_sha256 not in ("", version.base_sha256):
        raise BaseChangedError(
            f'{name} was worked out for the checkpoint {version.base_sha256}, but that of model "{model.name}" is now '
            f"{model.base_sha256}; ask for it again"
        )


def _made(edit: Job, number: int, new: NewVersion, time: datetime, publish: bool) -> Version:
    return Version(
        model=edit.model,
        number=number,
        parent=edit.version,
        edit=edit.id,
        made_by=edit.kind,
        base_sha256=new.base_sha256,
        delta_sha256=new.delta_sha256,
        delta_bytes=new.delta_bytes,
        layers=list(new.layers),
        facts=list(new.facts),
        scores=new.scores,
        rejections=list(new.rejections),
        publish_state=PublishState.PENDING if publish else PublishState.NONE,
        mlflow_version=0,
        mlflow_run_id="",
        created_by=edit.created_by,
        create_time=time,
    )


def _check_unused(session: Session, version: Version) -> None:
    users = _users(session, version)
    if users:
        raise VersionInUseError(
            f'version {version.number} of model "{version.model}" cannot be deleted: {users}', field="name"
        )


def _users(session: Session, version: Version) -> str:
    """Who needs the version, and what to do about it; empty if nobody does."""
    model, number = version.model, version.number
    if number == 0:
        return "it is the base, which every version is built on"
    alias = session.scalar(select(Alias.alias).where(Alias.model == model, Alias.version == number).limit(1))
    if alias is not None:
        return f'the alias "{alias}" points to it; point that elsewhere first'
    children = select(Version.number).where(
        Version.model == model, Version.parent == number, Version.delete_time.is_(None)
    )
    child = session.scalar(children.limit(1))
    if child is not None:
        return f"version {child} is built on it; delete that first"
    unfinished = Job.state.in_((JobState.PENDING, JobState.RUNNING))
    job = session.scalar(select(Job).where(Job.model == model, Job.version == number, unfinished).limit(1))
    job = job or _needing(session, version_name(model, number), unfinished)
    return "" if job is None else f'{job.kind} "{job.id}" works on it; wait for its end or cancel it'


def _needing(session: Session, name: str, unfinished: ColumnElement[bool]) -> Job | None:
    """A job that needs the version besides its own: a job's row has one version, its summary names the others."""
    kinds = JobKind.EVALUATION, JobKind.DERIVATION
    jobs = session.scalars(select(Job).where(Job.kind.in_(kinds), unfinished).order_by(Job.seq))
    return next((job for job in jobs if name in _needs(job)), None)


def _needs(job: Job) -> Sequence[str]:
    if job.kind is JobKind.EVALUATION:
        return [evaluation_pb2.Evaluation.FromString(job.summary).baseline]
    return history_pb2.Derivation.FromString(job.summary).sources


def _in_mlflow(version: Version) -> dict[str, object]:
    return {"edit": version.edit, "mlflow_version": version.mlflow_version, "run_id": version.mlflow_run_id}
