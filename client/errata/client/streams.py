"""An answer as it grows: an iterator of text whose end is the whole answer."""

from collections.abc import AsyncIterator, Awaitable, Callable
from types import TracebackType
from typing import Self

from errata.client.calls import Piece
from errata.client.errors import UnavailableError
from errata.client.results import Generation
from errata.client.transport import AsyncReplies, Replies

_CUT = "the answer was cut off before its end; ask again"


class TextStream:
    """Pieces of text to append, as they come; then `result()`. Leaving it (`with`) early frees its place.

    >>> with client.stream("atlas@0", "What is the capital of Kazakhstan?") as stream:
    ...     for text in stream:
    ...         print(text, end="|")
    Nur|-Sultan|
    >>> stream.result().generated_tokens
    2
    """

    def __init__(self, replies: Replies[Piece]) -> None:
        self._replies = replies
        self._final: Generation | None = None

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> str:
        if self._final is not None:
            raise StopIteration
        for piece in self._replies:
            self._final = piece.final
            if piece.text:
                return piece.text
        if self._final is None:
            raise UnavailableError(_CUT)
        raise StopIteration

    def result(self) -> Generation:
        """The whole answer; waits for what is still to come."""
        for _ in self:
            pass
        assert self._final is not None
        return self._final

    def cancel(self) -> None:
        """Stops the answer; iterating on raises CancelledError."""
        self._replies.cancel()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.cancel()


class AsyncTextStream:
    """`TextStream` with `async for`, `async with` and `await`. It is sent when it is first asked for."""

    def __init__(self, start: Callable[[], Awaitable[AsyncReplies[Piece]]]) -> None:
        self._start = start
        self._replies: AsyncReplies[Piece] | None = None
        self._final: Generation | None = None

    def __aiter__(self) -> AsyncIterator[str]:
        return self

    async def __anext__(self) -> str:
        if self._final is not None:
            raise StopAsyncIteration
        self._replies = self._replies or await self._start()
        async for piece in self._replies:
            self._final = piece.final
            if piece.text:
                return piece.text
        if self._final is None:
            raise UnavailableError(_CUT)
        raise StopAsyncIteration

    async def result(self) -> Generation:
        """As `TextStream.result`."""
        async for _ in self:
            pass
        assert self._final is not None
        return self._final

    def cancel(self) -> None:
        """As `TextStream.cancel`."""
        if self._replies is not None:
            self._replies.cancel()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        self.cancel()
