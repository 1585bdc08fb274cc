"""Work that the server does in the background: traces, measurements, edits, evaluations, derivations, bisections.

An operation is a name and what was last seen of it. Everything else is the server's, so a lost client loses nothing:
take the name, and go on from another process.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from typing import Generic, TypeVar, overload

from errata.client.calls import EDITS, EVALUATIONS, TRACES, WorkCalls
from errata.client.errors import CancelledError, ErrataError, from_failure
from errata.client.findings import Measurement
from errata.client.history import BISECTIONS, DERIVATIONS
from errata.client.measuring import MEASUREMENTS
from errata.client.results import Bisection, CausalTrace, Derivation, Edit, Evaluation, Progress, State, Work
from errata.client.transport import AsyncTransport, Transport
from errata.client.watching import Watching

W = TypeVar("W", bound=Work)


@overload
def calls_of(work: CausalTrace) -> WorkCalls[CausalTrace]: ...
@overload
def calls_of(work: Edit) -> WorkCalls[Edit]: ...
@overload
def calls_of(work: Evaluation) -> WorkCalls[Evaluation]: ...
@overload
def calls_of(work: Derivation) -> WorkCalls[Derivation]: ...
@overload
def calls_of(work: Bisection) -> WorkCalls[Bisection]: ...
@overload
def calls_of(work: Measurement) -> WorkCalls[Measurement]: ...
def calls_of(
    work: CausalTrace | Edit | Evaluation | Derivation | Bisection | Measurement,
) -> (
    WorkCalls[CausalTrace]
    | WorkCalls[Edit]
    | WorkCalls[Evaluation]
    | WorkCalls[Derivation]
    | WorkCalls[Bisection]
    | WorkCalls[Measurement]
):
    """The calls of the kind of work that this is."""
    match work:
        case CausalTrace():
            return TRACES
        case Edit():
            return EDITS
        case Evaluation():
            return EVALUATIONS
        case Derivation():
            return DERIVATIONS
        case Bisection():
            return BISECTIONS
        case Measurement():
            return MEASUREMENTS


class _Seen(Generic[W]):
    """What was last seen of a piece of work."""

    def __init__(self, calls: WorkCalls[W], latest: W) -> None:
        self._calls = calls
        self._latest = latest

    @property
    def name(self) -> str:
        """Its full name: `models/atlas/edits/0197…`."""
        return self._latest.name

    @property
    def latest(self) -> W:
        """What was last seen of it, without asking."""
        return self._latest

    @property
    def state(self) -> State:
        """Where it stood then."""
        return self._latest.job.state

    @property
    def done(self) -> bool:
        """Whether it had ended then."""
        return self.state.ended

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name} {self.state}>"

    def _ended_well(self) -> W:
        job = self._latest.job
        if job.state is State.CANCELLED:
            raise CancelledError(f"{self.name} was cancelled; nothing was changed")
        if job.state is State.FAILED:
            failure = job.error
            if failure is None:
                raise ErrataError(f"{self.name} failed and the server does not say why")
            raise from_failure(failure.reason, failure.message, failure.field)
        return self._latest


class Operation(_Seen[W]):
    """A piece of work, as a thread sees it. Iterate over it to follow its progress.

    >>> operation = client.edit("atlas", [astana])
    >>> for progress in operation:
    ...     print(f"{progress.stage} {progress.done}/{progress.total}")
    queued 0/0
    values 1/2
    values 2/2
    >>> operation.result().facts
    ('Kazakhstan: capital → Astana',)
    """

    def __init__(self, transport: Transport, calls: WorkCalls[W], latest: W) -> None:
        super().__init__(calls, latest)
        self._transport = transport

    def refresh(self, *, timeout: float | None = None) -> W:
        """Asks the server where it stands now."""
        self._latest = self._transport.run(self._calls.get(self.name), timeout)
        return self._latest

    def result(self, timeout: float | None = None) -> W:
        """Waits until it has ended, and returns it; a REJECTED edit or evaluation as well, which says why.

        Raises the error that it failed with, CancelledError where it was stopped, and DeadlineExceededError after
        `timeout` seconds (None: however long it takes); the work then goes on.
        """
        for _ in self._changes(timeout):
            pass
        return self._ended_well()

    def progress(self, timeout: float | None = None) -> Iterator[Progress]:
        """How far it is, now and whenever that changes, until it has ended; a broken stream is opened again.

        Raises only where the server cannot be asked any more; `result` says how it ended.
        """
        last = None
        for seen in self._changes(timeout):
            if seen.job.progress != last and not seen.job.state.ended:
                yield seen.job.progress
            last = seen.job.progress

    def __iter__(self) -> Iterator[Progress]:
        return self.progress()

    def cancel(self, *, timeout: float | None = None) -> W:
        """Asks the server to stop it, and returns where it stands; it may still end as it would have."""
        self._latest = self._transport.run(self._calls.cancel(self.name), timeout)
        return self._latest

    def _changes(self, timeout: float | None) -> Iterator[W]:
        watching = Watching(self.name, timeout)
        while not self.done:
            replies = self._transport.stream(self._calls.watch(self.name), watching.stream_seconds())
            error = None
            try:
                for self._latest in replies:
                    watching.heard()
                    yield self._latest
            except ErrataError as broken:
                error = broken
            finally:
                replies.cancel()
            if not self.done:
                time.sleep(watching.pause_after(error))


class AsyncOperation(_Seen[W]):
    """A piece of work, as a coroutine sees it: `Operation`, with `await` and `async for`."""

    def __init__(self, transport: AsyncTransport, calls: WorkCalls[W], latest: W) -> None:
        super().__init__(calls, latest)
        self._transport = transport

    async def refresh(self, *, timeout: float | None = None) -> W:
        """As `Operation.refresh`."""
        self._latest = await self._transport.run(self._calls.get(self.name), timeout)
        return self._latest

    async def result(self, timeout: float | None = None) -> W:
        """As `Operation.result`."""
        async for _ in self._changes(timeout):
            pass
        return self._ended_well()

    async def progress(self, timeout: float | None = None) -> AsyncIterator[Progress]:
        """As `Operation.progress`."""
        last = None
        async for seen in self._changes(timeout):
            if seen.job.progress != last and not seen.job.state.ended:
                yield seen.job.progress
            last = seen.job.progress

    def __aiter__(self) -> AsyncIterator[Progress]:
        return self.progress()

    async def cancel(self, *, timeout: float | None = None) -> W:
        """As `Operation.cancel`."""
        self._latest = await self._transport.run(self._calls.cancel(self.name), timeout)
        return self._latest

    async def _changes(self, timeout: float | None) -> AsyncIterator[W]:
        watching = Watching(self.name, timeout)
        while not self.done:
            replies = self._transport.stream(self._calls.watch(self.name), watching.stream_seconds())
            error = None
            try:
                async for self._latest in replies:
                    watching.heard()
                    yield self._latest
            except ErrataError as broken:
                error = broken
            finally:
                replies.cancel()
            if not self.done:
                await asyncio.sleep(watching.pause_after(error))
