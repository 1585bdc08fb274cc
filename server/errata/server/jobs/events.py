"""Wakes whoever watches a job. Carries nothing: the ledger is the truth, an event only says to read it again."""

import asyncio
import threading
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class JobEvents:
    """From the threads that work on jobs to the coroutines that watch them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._watchers: dict[str, set[_Watcher]] = defaultdict(set)

    def changed(self, job_id: str) -> None:
        """Wakes the watchers of a job. May be called from any thread; never blocks."""
        with self._lock:
            watchers = tuple(self._watchers.get(job_id, ()))
        for watcher in watchers:
            watcher.wake()

    @asynccontextmanager
    async def subscribe(self, job_id: str) -> AsyncIterator[AsyncIterator[None]]:
        """While open, an endless iterator of wake-ups.

        The first comes at once, so that a change just before is not missed; changes in quick succession may come as
        one. Read the ledger after each, and leave when the job has ended.
        """
        watcher = _Watcher()
        with self._lock:
            self._watchers[job_id].add(watcher)
        try:
            yield watcher
        finally:
            with self._lock:
                self._watchers[job_id].discard(watcher)
                if not self._watchers[job_id]:
                    del self._watchers[job_id]

    @property
    def watched(self) -> int:
        """Number of jobs that somebody watches."""
        with self._lock:
            return len(self._watchers)


class _Watcher:
    """An event of the loop that it was made in."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._event = asyncio.Event()
        self._event.set()

    def wake(self) -> None:
        # A loop that is closed has nobody left to wake.
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._event.set)

    def __aiter__(self) -> "_Watcher":
        return self

    async def __anext__(self) -> None:
        await self._event.wait()
        self._event.clear()
