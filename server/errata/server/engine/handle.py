"""A generation in flight: pieces, result, cancellation. For threads, and for asyncio without polling."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from concurrent.futures import Future
from contextlib import suppress

from errata.server.engine.requests import Generated


class GenerationHandle:
    """What `Engine.generate` returns at once. Thread-safe; its pieces have one reader.

    Pieces are made only once somebody asks for them; joined they are the result's text.
    """

    def __init__(self, on_cancel: Callable[[], None]) -> None:
        self._changed = threading.Condition()
        self._pieces: list[str] = []
        self._wake: Callable[[], None] | None = None
        self._on_cancel = on_cancel
        self._future: Future[Generated] = Future()
        self._future.set_running_or_notify_cancel()  # its own cancel() would leave the row running
        self._cancelled = False
        self._read = False

    def result(self, timeout: float | None = None) -> Generated:
        """Waits for the answer, or raises what ended it; TimeoutError after `timeout` seconds."""
        return self._future.result(timeout)

    def pieces(self) -> Iterator[str]:
        """The text as it grows; raises what ended it otherwise."""
        self._read = True
        return self._growing()

    def _growing(self) -> Iterator[str]:
        done = False
        while not done:
            with self._changed:
                self._changed.wait_for(lambda: self._pieces or self._future.done())
                pieces, done = self._taken()
            yield from pieces
        self._future.result()

    def __aiter__(self) -> AsyncIterator[str]:
        """The text as it grows, for asyncio. Cancelling the task cancels the generation."""
        self._read = True
        return self._growing_async()

    async def _growing_async(self) -> AsyncIterator[str]:
        loop, grown = asyncio.get_running_loop(), asyncio.Event()
        done = False
        with self._changed:
            self._wake = lambda: _in(loop, grown.set)
        try:
            while not done:
                grown.clear()
                with self._changed:
                    pieces, done = self._taken()
                for piece in pieces:
                    yield piece
                if not done:
                    await grown.wait()
        except asyncio.CancelledError:
            self.cancel()
            raise
        self._future.result()

    def __await__(self) -> Generator[object, None, Generated]:
        """The answer, for asyncio. Cancelling the task cancels the generation."""
        return self._awaited().__await__()

    async def _awaited(self) -> Generated:
        try:
            return await asyncio.wrap_future(self._future)
        except asyncio.CancelledError:
            self.cancel()
            raise

    def cancel(self) -> None:
        """Frees its row at the engine's next step; the result is then CancelledError, if it had not ended before."""
        self._cancelled = True
        self._on_cancel()

    @property
    def cancelled(self) -> bool:
        """Whether `cancel` was called."""
        return self._cancelled

    @property
    def done(self) -> bool:
        """Whether it has ended."""
        return self._future.done()

    @property
    def read(self) -> bool:
        """Whether somebody reads the pieces."""
        return self._read

    def add(self, piece: str) -> None:
        """The engine's: a piece more."""
        if piece:
            with self._changed:
                self._pieces.append(piece)
            self._notify()

    def end(self, outcome: Generated | Exception) -> None:
        """The engine's: the answer, or what ended it. Once."""
        if isinstance(outcome, Exception):
            self._future.set_exception(outcome)
        else:
            self._future.set_result(outcome)
        self._notify()

    def _taken(self) -> tuple[list[str], bool]:
        pieces, self._pieces = self._pieces, []
        return pieces, self._future.done()

    def _notify(self) -> None:
        with self._changed:
            self._changed.notify_all()
            wake = self._wake
        if wake:
            wake()


def _in(loop: asyncio.AbstractEventLoop, call: Callable[[], None]) -> None:
    with suppress(RuntimeError):  # a loop that is closed has no reader to wake
        loop.call_soon_threadsafe(call)
