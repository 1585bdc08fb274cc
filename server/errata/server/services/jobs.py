"""What traces, edits and evaluations have in common: queued, looked up, listed, cancelled, watched.

Knows no message of theirs: rows of the ledger come out, and each service makes its own message of them.
"""

from asyncio import to_thread
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from google.protobuf.message import Message

from errata.editor.errors import LayerError
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

    def resolved(self, ref: VersionRef) -> VersionRow:
        """The version that a job is to work on. Blocks. Raises NotFoundError; a model must be configured, too."""
        self._queue.models.settings(ref.model)
        return self._ledger.resolve(ref.model, ref.number, ref.alias)

    def check_layer(self, model: str, highest: int, field: str) -> None:
        """Raises LayerError for a layer that the model has not, as far as it was ever loaded. Blocks."""
        layers = self._ledger.model(model).layers
        if layers and highest >= layers:
            raise LayerError(f"{model!r} has no layer {highest}; its {layers} layers are counted from 0", field=field)

    def create(self, version: VersionRow, request: Message, request_id: str | None, planned: Message) -> JobRow:
        """Queues a job. `planned` is what lists show of it. Blocks. Raises RequestIdReusedError, NotFoundError."""
        row = self._ledger.create_job(
            self._kind,
            version.model,
            version=version.number,
            request=request.SerializeToString(deterministic=True),
            request_id=request_id,
            actor=caller().name,
            summary=planned.SerializeToString(deterministic=True),
        )
        self._queue.notify()
        return row

    async def get(self, name: str) -> JobRow:
        """A job by its full name. Raises NotFoundError, MalformedError."""
        model, job = job_of(name, self._kind, "name")
        return await to_thread(self._ledger.job, self._kind, model, job)

    async def cancel(self, name: str) -> JobRow:
        """Asks a job to stop. Raises NotFoundError, MalformedError."""
        model, job = job_of(name, self._kind, "name")
        row = await to_thread(self._ledger.request_cancel, self._kind, model, job, caller().name)
        self._queue.events.changed(job)
        return row

    async def page(self, method: str, request: JobListRequest) -> tuple[Sequence[JobRow], str]:
        """Part of a model's jobs, the newest first, and the next page's token."""
        model = model_of(request.parent, "parent")

        def fetch(after: str | None, limit: int) -> list[JobRow]:
            return self._ledger.jobs(self._kind, model, after, limit)

        return await to_thread(self._queue.pager.page, method, model, request, fetch, lambda row: row.id)

    def watch(self, name: str) -> AsyncGenerator[JobRow]:
        """A job now and at each change, until it has ended. Raises NotFoundError, MalformedError, DrainingError."""
        model, job = job_of(name, self._kind, "name")
        return self._queue.watches.states(self._kind, model, job)
