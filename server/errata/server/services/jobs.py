"""What jobs of every kind have in common: queued, looked up, listed, cancelled, watched.

Knows no message of theirs: rows of the ledger come out, and each service makes its own message of them.
"""

from asyncio import to_thread
from collections.abc import AsyncGenerator, Callable, Collection, Iterator, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from typing import Protocol

from google.protobuf.message import Message

from errata.editor.errors import LayerError
from errata.server.conversion import request_id
from errata.server.errors import NotFoundError
from errata.server.jobs.events import JobEvents
from errata.server.ledger.ledger import Ledger
from errata.server.ledger.rows import JobKind, JobRow, VersionRow
from errata.server.models import Models
from errata.server.names import VersionRef, job_of, model_of
from errata.server.services.calls import ListRequest, Pager, caller
from errata.server.services.watching import Watches


class JobListRequest(ListRequest, Protocol):
    """A request for part of a model's jobs."""

    parent: str


class CreateRequest(Protocol):
    """A request for a job."""

    request_id: str
    validate_only: bool

    def SerializeToString(self, *, deterministic: bool = ...) -> bytes:  # noqa: N802
        """As every message has it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Queue:
    """Where jobs are queued and found again. `notify` wakes whoever works on them."""

    ledger: Ledger
    models: Models
    pager: Pager
    watches: Watches
    events: JobEvents
    notify: Callable[[], None]


class Jobs:
    """The jobs of one kind."""

    def __init__(self, kind: JobKind, queue: Queue) -> None:
        self._kind, self._queue, self._ledger = kind, queue, queue.ledger

    def repeated(self, model: str, request: CreateRequest) -> JobRow | None:
        """The job that the same call made before, whatever became of its version or of its images since. Blocks.

        None where it made none, or is only to be validated. Raises RequestIdReusedError, MalformedError.
        """
        given = request_id(request.request_id)
        if given is None or request.validate_only:
            return None
        return self._ledger.repeated(self._kind, model, given, request.SerializeToString(deterministic=True))

    def resolved(self, ref: VersionRef, field: str = "") -> VersionRow:
        """The version that a job is to work on. Blocks. Raises NotFoundError; a model must be configured, too."""
        with _found(field):
            self._queue.models.settings(ref.model)
            return self._ledger.resolve(ref.model, ref.number, ref.alias)

    def other(self, kind: JobKind, model: str, job: str, field: str) -> JobRow:
        """A job of another kind, that the request names in `field`. Blocks. Raises NotFoundError."""
        with _found(field):
            return self._ledger.job(kind, model, job)

    def check_layer(self, model: str, highest: int, field: str) -> None:
        """Raises LayerError for a layer that the model has not, as far as it was ever loaded. Blocks."""
        layers = self._ledger.model(model).layers
        if layers and highest >= layers:
            raise LayerError(f"{model!r} has no layer {highest}; its {layers} layers are counted from 0", field=field)

    def create(
        self,
        version: VersionRow,
        request: Message,
        request_id: str | None,
        planned: Message,
        *,
        sent: CreateRequest | None = None,
        also: Collection[int] = (),
    ) -> JobRow:
        """Queues a job. `planned` is what lists show of it. Blocks. Raises RequestIdReusedError, NotFoundError.

        `sent` is the request as the caller made it, where `request` has aliases and URIs replaced by what they meant.
        `also` are further versions that the job needs.
        """
        row = self._ledger.create_job(
            self._kind,
            version.model,
            version=version.number,
            request=request.SerializeToString(deterministic=True),
            request_id=request_id,
            actor=caller().name,
            summary=planned.SerializeToString(deterministic=True),
            sent=None if sent is None else sent.SerializeToString(deterministic=True),
            also=also,
        )
        self._queue.notify()
        return row

    async def get(self, name: str) -> JobRow:
        """A job by its full name. Raises NotFoundError, MalformedError."""
        model, job = job_of(name, self._kind, "name")
        with _found("name"):
            return await to_thread(self._ledger.job, self._kind, model, job)

    async def cancel(self, name: str) -> JobRow:
        """Asks a job to stop. Raises NotFoundError, MalformedError."""
        model, job = job_of(name, self._kind, "name")
        with _found("name"):
            row = await to_thread(self._ledger.request_cancel, self._kind, model, job, caller().name)
        self._queue.events.changed(job)
        return row

    async def page(self, method: str, request: JobListRequest) -> tuple[Sequence[JobRow], str]:
        """Part of a model's jobs, the newest first, and the next page's token."""
        model = model_of(request.parent, "parent")

        def fetch(after: str | None, limit: int) -> list[JobRow]:
            return self._ledger.jobs(self._kind, model, after, limit)

        with _found("parent"):
            return await to_thread(self._queue.pager.page, method, model, request, fetch, lambda row: row.id)

    async def watch(self, name: str) -> AsyncGenerator[JobRow]:
        """A job now and at each change, until it has ended. Raises NotFoundError, MalformedError, DrainingError."""
        model, job = job_of(name, self._kind, "name")
        async with aclosing(self._queue.watches.states(self._kind, model, job)) as rows:
            with _found("name"):
                async for row in rows:
                    yield row


@contextmanager
def _found(field: str) -> Iterator[None]:
    """What is not found names the field of the request that named it."""
    try:
        yield
    except NotFoundError as error:
        error.field = error.field or field
        raise
