"""A job now, and whenever it changes, until it has ended: what every Watch call streams.

The ledger is the truth and is read again at each wake-up, so that anyone can begin to watch at any time.
"""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator

from errata.server.errors import DrainingError
from errata.server.jobs.events import JobEvents
from errata.server.ledger.ledger import Ledger
from errata.server.ledger.rows import JobKind, JobRow


class Watches:
    """All that is being watched. Made in the server's event loop."""

    def __init__(self, ledger: Ledger, events: JobEvents) -> None:
        self._ledger, self._events = ledger, events
        self._closing = asyncio.Event()

    def close(self) -> None:
        """Ends every watch: the jobs that have not ended are taken up by the next server."""
        self._closing.set()

    async def states(self, kind: JobKind, model: str, job: str) -> AsyncGenerator[JobRow]:
        """The job's states; the last one has ended. Raises NotFoundError, and DrainingError at `close`."""
        seen: JobRow | None = None
        async with self._events.subscribe(job) as wakes:
            async for _ in _until(wakes, self._closing):
                row = await asyncio.to_thread(self._ledger.job, kind, model, job)
                if row != seen:
                    yield row
                if row.state.ended:
                    return
                seen = row
        raise DrainingError("the server is shutting down; the job goes on with the next one, watch it there")


async def _until(wakes: AsyncIterator[None], closing: asyncio.Event) -> AsyncIterator[None]:
    """The wake-ups until `closing` is set, and one after it, for what changed just before."""
    closed = asyncio.ensure_future(closing.wait())
    try:
        while not closing.is_set():
            wake = asyncio.ensure_future(anext(wakes))
            try:
                await asyncio.wait((wake, closed), return_when=asyncio.FIRST_COMPLETED)
            finally:
                wake.cancel()  # without effect where it came
            yield None
    finally:
        closed.cancel()
