"""Calls sent and answered, in a thread or in asyncio; a failed one becomes an ErrataError.

Knows calls (`calls.py`), not what they are about.
"""

import asyncio
from collections.abc import AsyncIterator, Iterable, Iterator
from functools import cached_property
from typing import Generic, Protocol, TypeVar, cast

import grpc
import grpc.aio

from errata.client.calls import Call, Pages
from errata.client.channel import Connection
from errata.client.details import read_details
from errata.client.errors import CancelledError, ClosedError, ErrataError, MessageTooLargeError, RpcStatus, from_status

T = TypeVar("T")
_CLOSED = "the client is closed; open another"


class Transport:
    """Sends calls over one channel, for any number of threads."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self._closed = False
        tls = connection.tls
        self._channel = (
            grpc.secure_channel(connection.server, tls.credentials(), connection.options)
            if tls
            else grpc.insecure_channel(connection.server, connection.options)
        )

    def run(self, call: Call[T], timeout: float | None = None) -> T:
        """The answer of a call, within `timeout` seconds; None: the connection's."""
        body = _body(call, self.connection)
        try:
            raw = self._open.unary_unary(call.path, _as_is, _as_is)(
                body, timeout=self.seconds(timeout), metadata=self.connection.metadata
            )
        except grpc.RpcError as error:
            raise _error(error, self.connection) from error
        return call.read(raw)

    def seconds(self, timeout: float | None) -> float | None:
        """How long a call may take whose caller says `timeout`; None: however long it takes."""
        return self.connection.timeout if timeout is None else timeout

    def stream(self, call: Call[T], timeout: float | None) -> "Replies[T]":
        """The answers of a call, one by one, within `timeout` seconds in all; None: however long it takes."""
        body = _body(call, self.connection)
        rpc = self._open.unary_stream(call.path, _as_is, _as_is)(
            body, timeout=timeout, metadata=self.connection.metadata
        )
        return Replies(rpc, call, self.connection)

    def pages(self, pages: Pages[T], timeout: float | None) -> Iterator[T]:
        """Every item of a list; each page is asked for when it is needed."""
        token, more = "", True
        while more:
            page = self.run(pages(token), timeout)
            yield from page.items
            token, more = page.next_page_token, bool(page.next_page_token)

    def close(self) -> None:
        """Ends the calls that run, and the channel."""
        self._closed = True
        self._channel.close()

    @property
    def _open(self) -> grpc.Channel:
        if self._closed:
            raise ClosedError(_CLOSED)
        return self._channel


class _Answers(Protocol):
    """A call of gRPC's that streams."""

    def __next__(self) -> bytes: ...
    def cancel(self) -> object: ...


class Replies(Generic[T]):
    """The answers of a streaming call. `cancel` may be called from another thread; the stream then ends."""

    def __init__(self, rpc: "_Answers", call: Call[T], connection: Connection) -> None:
        self._rpc = rpc
        self._call = call
        self._connection = connection

    def __iter__(self) -> "Replies[T]":
        return self

    def __next__(self) -> T:
        try:
            raw = next(self._rpc)
        except grpc.RpcError as error:
            raise _error(error, self._connection) from error
        return self._call.read(raw)

    def cancel(self) -> None:
        """Ends the call; without effect where it has ended."""
        self._rpc.cancel()


class AsyncTransport:
    """Sends calls over one channel, within one event loop."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self._closed = False
        self._credentials = connection.tls.credentials() if connection.tls else None

    @cached_property
    def _channel(self) -> grpc.aio.Channel:
        # A channel belongs to the event loop that runs when it is made; the client may be made before any does.
        server, options = self.connection.server, self.connection.options
        if self._credentials is None:
            return grpc.aio.insecure_channel(server, options)
        return grpc.aio.secure_channel(server, self._credentials, options)

    async def run(self, call: Call[T], timeout: float | None = None) -> T:
        """The answer of a call, within `timeout` seconds; None: the connection's."""
        body = _body(call, self.connection)
        try:
            raw = await self._open.unary_unary(call.path, _as_is, _as_is)(
                body, timeout=self.seconds(timeout), metadata=self.connection.metadata
            )
        except grpc.aio.AioRpcError as error:
            raise _error(error, self.connection) from error
        return call.read(raw)

    def seconds(self, timeout: float | None) -> float | None:
        """How long a call may take whose caller says `timeout`; None: however long it takes."""
        return self.connection.timeout if timeout is None else timeout

    def stream(self, call: Call[T], timeout: float | None) -> "AsyncReplies[T]":
        """The answers of a call, one by one, within `timeout` seconds in all; None: however long it takes."""
        body = _body(call, self.connection)
        rpc = self._open.unary_stream(call.path, _as_is, _as_is)(
            body, timeout=timeout, metadata=self.connection.metadata
        )
        return AsyncReplies(rpc, call, self.connection)

    async def pages(self, pages: Pages[T], timeout: float | None) -> AsyncIterator[T]:
        """Every item of a list; each page is asked for when it is needed."""
        token, more = "", True
        while more:
            page = await self.run(pages(token), timeout)
            for item in page.items:
                yield item
            token, more = page.next_page_token, bool(page.next_page_token)

    async def close(self) -> None:
        """Ends the calls that run, and the channel."""
        self._closed = True
        await self._channel.close()

    @property
    def _open(self) -> grpc.aio.Channel:
        if self._closed:
            raise ClosedError(_CLOSED)
        return self._channel


class AsyncReplies(Generic[T]):
    """The answers of a streaming call."""

    def __init__(self, rpc: "grpc.aio.UnaryStreamCall[bytes, bytes]", call: Call[T], connection: Connection) -> None:
        self._rpc = rpc
        self._answers = rpc.__aiter__()
        self._call = call
        self._connection = connection
        self._cancelled = False

    def __aiter__(self) -> "AsyncReplies[T]":
        return self

    async def __anext__(self) -> T:
        try:
            raw = await anext(self._answers)
        except grpc.aio.AioRpcError as error:
            raise _error(error, self._connection) from error
        except asyncio.CancelledError as error:
            if not self._cancelled:
                raise
            raise CancelledError("the call was cancelled by its caller") from error
        return self._call.read(raw)

    def cancel(self) -> None:
        """Ends the call; without effect where it has ended."""
        self._cancelled = True
        self._rpc.cancel()


def _as_is(raw: bytes) -> bytes:
    # Messages are made and read outside of gRPC, which would turn an exception there into a status without a trace.
    return raw


def _body(call: Call[T], connection: Connection) -> bytes:
    body = call.request.SerializeToString()
    if len(body) > connection.max_message_bytes:
        size = f"the request has {len(body)} bytes, more than the {connection.max_message_bytes} allowed"
        raise MessageTooLargeError(f"{size}; split it, send smaller images, or allow more (max_message_bytes)")
    return body


def _error(failed: grpc.RpcError, connection: Connection) -> ErrataError:
    # The stubs' metadatum has no length, and so cannot be unpacked.
    metadata = cast("Iterable[tuple[str, str | bytes]]", failed.trailing_metadata() or ())
    details = read_details(metadata)
    status = RpcStatus(code=failed.code(), message=failed.details() or "", details=details)
    return from_status(status, connection.server)
