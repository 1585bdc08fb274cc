"""Traces, edits, evaluations, derivations, bisections, measurements: the queue, and what became of each.

A job is PENDING, then RUNNING, then ended for good. Requests and results can be tens of megabytes: only `create_job`,
`job`, `claim`, `finish` and `requeue` hand them out; every list leaves them empty and has the `summary` instead.
"""

from collections.abc import Collection, Sequence
from datetime import datetime
from hashlib import sha256
from secrets import token_hex

from sqlalchemy import and_, select, update
from sqlalchemy.orm import Session

from errata.server.errors import NotFoundError, RequestIdReusedError
from errata.server.ledger.audit import write_down
from errata.server.ledger.database import Database
from errata.server.ledger.models import known_model
from errata.server.ledger.outbox import enqueue
from errata.server.ledger.rows import Failure, JobKind, JobRow, JobState, TaskKind
from errata.server.ledger.tables import BodyPart, Job, JobBody, Version
from errata.server.ledger.versions import live_version
from errata.server.names import job_name

QUEUED = "queued"
"""The stage of a job that waits."""


class JobLedger(Database):
    """Jobs."""

    def create_job(
        self,
        kind: JobKind,
        model: str,
        *,
        version: int,
        request: bytes,
        request_id: str | None,
        actor: str,
        summary: bytes = b"",
        sent: bytes | None = None,
        also: Collection[int] = (),
    ) -> JobRow:
        """Queues a job on a version. `summary` is the little that a list shows of the request.

        The same `request_id` (not empty; per kind and model) with an equal request returns the first job. `sent` is
        what the caller sent, where `request` says more: it is what is compared. `also` are further versions needed.

        Raises:
            RequestIdReusedError: the same `request_id` with another request.
            NotFoundError: no such model or version.
        """
        digest = sha256(request if sent is None else sent).hexdigest()
        with self._write.begin() as session:
            known_model(session, model, lock=True)
            first = _first_with(session, kind, model, request_id) if request_id else None
            if first is not None:
                return _repeated(session, first, digest)
            for number in (version, *also):
                live_version(session, model, number)
            job = _pending(kind, model, self._now())
            job.version, job.created_by, job.summary = version, actor, summary
            job.request_id, job.request_sha256 = request_id or None, digest
            session.add(job)
            session.flush()
            session.add(JobBody(seq=job.seq, part=BodyPart.REQUEST, body=request))
            self._record(session, job, "create", actor)
            return _row(job, request)

    def repeated(self, kind: JobKind, model: str, request_id: str, sent: bytes) -> JobRow | None:
        """The job that this request, as it was `sent`, made before; None where the `request_id` is new.

        Whatever became of its version since. Raises RequestIdReusedError.
        """
        with self._read() as session:
            first = _first_with(session, kind, model, request_id)
            return None if first is None else _repeated(session, first, sha256(sent).hexdigest())

    def job(self, kind: JobKind, model: str, job: str) -> JobRow:
        """One job. Raises NotFoundError, whose reason has the kind: TRACE_NOT_FOUND, EDIT_NOT_FOUND and so on."""
        with self._read() as session:
            return full_row(session, _named(session, kind, model, job))

    def jobs(self, kind: JobKind, model: str, before: str | None, limit: int) -> list[JobRow]:
        """A model's jobs of a kind, the newest first, from those older than the id `before`.

        Without requests and results: `request` is empty and `result` None. Raises NotFoundError.
        """
        query = select(Job).where(Job.model == model, Job.kind == kind).order_by(Job.seq.desc()).limit(limit)
        if before is not None:
            query = query.where(Job.seq < select(Job.seq).where(Job.id == before).scalar_subquery())
        with self._read() as session:
            known_model(session, model)
            return [_row(job) for job in session.scalars(query)]

    def claim(self, kinds: Sequence[JobKind], busy: Collection[tuple[JobKind, str]] = ()) -> JobRow | None:
        """Starts the oldest PENDING job of these kinds whose (kind, model) is not busy; None if there is none.

        No two callers are given the same job.
        """
        free = (~and_(Job.kind == kind, Job.model == model) for kind, model in busy)
        query = select(Job).where(Job.state == JobState.PENDING, Job.kind.in_(kinds), *free).order_by(Job.seq).limit(1)
        with self._write.begin() as session:
            job = session.scalar(query.with_for_update(skip_locked=True))
            if job is None:
                return None
            job.state, job.attempt, job.start_time = JobState.RUNNING, job.attempt + 1, self._now()
            return full_row(session, job)

    def progress(self, job: str, stage: str, done: int, total: int) -> None:
        """How far a running job is. Nothing happens if it is not running."""
        running = update(Job).where(Job.id == job, Job.state == JobState.RUNNING)
        with self._write.begin() as session:
            session.execute(running.values(stage=stage, done=done, total=total))

    def request_cancel(self, kind: JobKind, model: str, job: str, actor: str) -> JobRow:
        """Ends a PENDING job as CANCELLED, asks a RUNNING one to stop, leaves an ended one. Raises NotFoundError."""
        with self._write.begin() as session:
            found = _named(session, kind, model, job, lock=True)
            if not found.state.ended and not found.cancel_requested:
                found.cancel_requested = True
                if found.state is JobState.PENDING:
                    end(found, JobState.CANCELLED, self._now())
                self._record(session, found, "cancel", actor)
            return full_row(session, found)

    def cancel_requested(self, job: str) -> bool:
        """Whether the job was asked to stop."""
        with self._read() as session:
            return bool(session.scalar(select(Job.cancel_requested).where(Job.id == job)))

    def finish(
        self,
        job: str,
        state: JobState,
        *,
        result: bytes | None = None,
        failure: Failure | None = None,
        summary: bytes | None = None,
        publish: bool = False,
    ) -> JobRow:
        """Ends the job; one that has ended already stays as it is. A job that made a version: `commit_edit`.

        A `result` replaces what was kept (`keep`), a `summary` what the job was queued with; without, those stay.
        With `publish` MLflow is to be told of the measurement, in the same transaction.

        Raises:
            ValueError: `state` is not an end.
            NotFoundError: no such job.
        """
        if not state.ended:
            raise ValueError(f"a job does not finish as {state}")
        with self._write.begin() as session:
            found = job_by_id(session, job)
            if not found.state.ended:
                end(found, state, self._now(), failure, summary)
                if result is not None:
                    session.merge(JobBody(seq=found.seq, part=BodyPart.RESULT, body=result))
                    session.flush()
                if publish:
                    told = {"measurement": found.id}
                    enqueue(session, self._now(), TaskKind.PUBLISH_MEASUREMENT, found.model, found.version, told)
            return full_row(session, found)

    def keep(self, job: str, result: bytes) -> None:
        """Keeps what a RUNNING job has found so far: it is there again after a crash. Otherwise nothing happens."""
        with self._write.begin() as session:
            found = job_by_id(session, job)
            if found.state is JobState.RUNNING:
                session.merge(JobBody(seq=found.seq, part=BodyPart.RESULT, body=result))

    def maker(self, model: str, number: int) -> JobRow | None:
        """The job that made a version, also one deleted since, as lists have it; None for the base.

        Raises NotFoundError.
        """
        with self._read() as session:
            if number == 0:
                known_model(session, model)
                return None
            version = session.get(Version, (model, number))
            job = version and session.scalar(select(Job).where(Job.id == version.edit))
            if not job:
                raise NotFoundError(f'model "{model}" never had a version {number}', reason="VERSION_NOT_FOUND")
            return _row(job)

    def requeue(self, job: str) -> JobRow:
        """Puts a RUNNING job back, in its old place; one that was asked to stop ends as CANCELLED.

        Other jobs stay as they are. Raises NotFoundError.
        """
        with self._write.begin() as session:
            found = job_by_id(session, job)
            if found.state is JobState.RUNNING and found.cancel_requested:
                end(found, JobState.CANCELLED, self._now())
            elif found.state is JobState.RUNNING:
                found.state, found.start_time = JobState.PENDING, None
                found.stage, found.done, found.total = QUEUED, 0, 0
            return full_row(session, found)

    def running(self) -> list[JobRow]:
        """All RUNNING jobs, the oldest first; without requests. At the start: those that a crash interrupted."""
        with self._read() as session:
            query = select(Job).where(Job.state == JobState.RUNNING).order_by(Job.seq)
            return [_row(job) for job in session.scalars(query)]

    def _record(self, session: Session, job: Job, action: str, actor: str) -> None:
        resource = job_name(job.kind, job.model, job.id)
        details = {"version": job.version}
        write_down(
            session,
            self._now(),
            actor=actor,
            action=f"{job.kind}.{action}",
            model=job.model,
            resource=resource,
            details=details,
        )


def job_by_id(session: Session, job: str) -> Job:
    """The job, locked. Raises NotFoundError (JOB_NOT_FOUND)."""
    found = session.scalar(select(Job).where(Job.id == job).with_for_update())
    if found is None:
        raise NotFoundError(f'there is no job "{job}"', reason="JOB_NOT_FOUND")
    return found


def end(
    job: Job, state: JobState, time: datetime, failure: Failure | None = None, summary: bytes | None = None
) -> None:
    """Ends a job that has not ended."""
    job.state, job.end_time = state, time
    if summary is not None:
        job.summary = summary
    if failure is not None:
        job.failure_reason, job.failure_field = failure.reason, failure.field
        # A prompt can hold U+0000 and its error quote it; PostgreSQL's text cannot.
        job.failure_message = failure.message.replace("\0", "")


def full_row(session: Session, job: Job) -> JobRow:
    """A job with its request and result."""
    bodies = {row.part: row.body for row in session.scalars(select(JobBody).where(JobBody.seq == job.seq))}
    return _row(job, bodies[BodyPart.REQUEST], bodies.get(BodyPart.RESULT))


def _named(session: Session, kind: JobKind, model: str, job: str, *, lock: bool = False) -> Job:
    query = select(Job).where(Job.id == job, Job.kind == kind, Job.model == model)
    found = session.scalar(query.with_for_update() if lock else query)
    if found is None:
        known_model(session, model)
        raise NotFoundError(f'model "{model}" has no {kind} "{job}"', reason=f"{kind.name}_NOT_FOUND")
    return found


def _first_with(session: Session, kind: JobKind, model: str, request_id: str) -> Job | None:
    return session.scalar(select(Job).where(Job.kind == kind, Job.model == model, Job.request_id == request_id))


def _repeated(session: Session, first: Job, digest: str) -> JobRow:
    if first.request_sha256 != digest:
        raise RequestIdReusedError(
            f'request_id "{first.request_id}" came before with another request, which is {first.kind} "{first.id}"; '
            "give every new request a new one",
            field="request_id",
        )
    return full_row(session, first)


def _pending(kind: JobKind, model: str, time: datetime) -> Job:
    return Job(
        # 48 bits of milliseconds, then chance: ids sort by time and cannot be guessed.
        id=f"{int(time.timestamp() * 1000):012x}{token_hex(10)}",
        kind=kind,
        model=model,
        state=JobState.PENDING,
        stage=QUEUED,
        done=0,
        total=0,
        attempt=0,
        cancel_requested=False,
        create_time=time,
    )


def _row(job: Job, request: bytes = b"", result: bytes | None = None) -> JobRow:
    failure = None
    if job.failure_reason is not None:
        failure = Failure(reason=job.failure_reason, message=job.failure_message or "", field=job.failure_field or "")
    return JobRow(
        id=job.id,
        kind=job.kind,
        model=job.model,
        version=job.version,
        state=job.state,
        stage=job.stage,
        done=job.done,
        total=job.total,
        request=request,
        result=result,
        failure=failure,
        made=job.made,
        attempt=job.attempt,
        cancel_requested=job.cancel_requested,
        created_by=job.created_by,
        create_time=job.create_time,
        start_time=job.start_time,
        end_time=job.end_time,
        summary=job.summary,
        mlflow_run_id=job.mlflow_run_id or "",
    )
