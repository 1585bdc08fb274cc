"""The gate that every call passes: who calls, whether it may, how often; and how its end looks, is logged and counted.

One interceptor, for unary and streaming handlers alike. Requests reach it as bytes, so that one that is too large or
no message at all is refused like any other bad input. Knows no service.
"""

import asyncio
import inspect
import logging
import re
import secrets
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from time import perf_counter
from typing import Any, NoReturn, TypeAlias

import grpc
from google.protobuf.message import DecodeError, Message
from google.rpc import status_pb2

from errata.editor.errors import ErrataError
from errata.server.errors import BusyError, DrainingError, MalformedError, NotFoundError, reason_of
from errata.server.metrics import Metrics
from errata.server.security import OPEN, Authenticator, RateLimiter, authorize
from errata.server.services.calls import Context, called_by
from errata.server.status import code_from, internal, retry_after, status_of, trailing_metadata

_log = logging.getLogger(__name__)

_MOST_OF_A_CALLER = 400
"""Calls of one caller that are answered at once, fewer than the server answers: watches and streams may stay open."""

_RETRY_SECONDS = 1.0

_NAMING = ("name", "parent", "version", "first", "bad")
"""The fields that name what a request is about."""

_MODEL = re.compile(r"models/([^/]+)")

# The generated handlers are untyped; everything else here is not.
_Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"


class Gate(grpc.aio.ServerInterceptor):
    """Stands before every handler."""

    def __init__(
        self,
        authenticator: Authenticator,
        limiter: RateLimiter,
        metrics: Metrics,
        *,
        max_message_bytes: int,
        most_of_a_caller: int = _MOST_OF_A_CALLER,
    ) -> None:
        self._authenticator, self._limiter, self._metrics = authenticator, limiter, metrics
        self._most, self._most_of_a_caller = max_message_bytes, most_of_a_caller
        self._present: Counter[str] = Counter()
        self._draining = False
        self._working, self._idle = 0, asyncio.Event()
        self._idle.set()

    def drain(self) -> None:
        """Refuses every call from now on, but those about the server's health."""
        self._draining = True

    async def idle(self) -> None:
        """Waits until no call is being answered, but those about the server itself."""
        await self._idle.wait()

    def _enter(self, caller: str) -> None:
        if self._present[caller] >= self._most_of_a_caller:
            raise BusyError(
                f"{self._present[caller]} calls of {caller or 'callers without a name'} are being answered; end some, "
                "streams and watches that nobody reads for instance",
                retry_after=_RETRY_SECONDS,
            )
        self._present[caller] += 1

    def _leave(self, caller: str | None) -> None:
        if caller is not None:
            self._present[caller] -= 1
            if not self._present[caller]:
                del self._present[caller]

    def _count(self, change: int) -> None:
        self._working += change
        self._idle.clear() if self._working else self._idle.set()

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], "Awaitable[_Handler | None]"],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> "_Handler | None":
        """The handler of a call, guarded."""
        handler = await continuation(handler_call_details)
        # gRPC's own answer to a method that nobody serves.
        return handler if handler is None else self._guarded(handler_call_details.method, handler)

    def _guarded(self, method: str, handler: _Handler) -> _Handler:
        answer = handler.response_serializer
        if handler.request_streaming:
            return grpc.stream_stream_rpc_method_handler(
                self._streaming(method, handler.stream_stream, None), handler.request_deserializer, answer
            )
        read = handler.request_deserializer
        if handler.response_streaming:
            return grpc.unary_stream_rpc_method_handler(
                self._streaming(method, handler.unary_stream, read), response_serializer=answer
            )
        return grpc.unary_unary_rpc_method_handler(
            self._unary(method, handler.unary_unary, read), response_serializer=answer
        )

    def _unary(self, method: str, inner: Any, read: Any) -> Any:
        async def unary(raw: bytes, context: Context) -> Any:
            async with self._call(method, context) as call:
                request = await call.admit(raw, read)
                answer = await inner(request, context)
                call.note_answer(answer)
                return answer

        return unary

    def _streaming(self, method: str, inner: Any, read: Any) -> Any:
        async def iterated(raw: Any, context: Context) -> AsyncIterator[Any]:
            async with self._call(method, context) as call:
                request = await call.admit(raw, read)
                async with aclosing(inner(request, context)) as answers:
                    async for answer in answers:
                        yield answer

        async def written(raw: Any, context: Context) -> None:
            async with self._call(method, context) as call:
                await inner(await call.admit(raw, read), context)

        return iterated if inspect.isasyncgenfunction(inner) else written

    @asynccontextmanager
    async def _call(self, method: str, context: Context) -> AsyncIterator["_Call"]:
        """Ends the call as what was raised in it says."""
        call = _Call(self, method, context)
        self._metrics.began(method)
        self._count(call.works)
        try:
            yield call
        except (asyncio.CancelledError, GeneratorExit):
            call.code = _left(context)
            raise
        except grpc.aio.AbortError:
            call.code = _aborted(context)
            raise
        except Exception as error:
            if isinstance(error, NotFoundError) and not error.field:
                error.field = call.naming
            status = self._status(method, error)
            call.code = code_from(status)
            call.reason = reason_of(error) if isinstance(error, ErrataError) else "INTERNAL"
            await _abort(context, status, retry_after(error))
        finally:
            self._leave(call.entered)
            self._count(-call.works)
            self._metrics.ended(method, call.code.name, call.seconds)
            call.log()

    def _status(self, method: str, error: Exception) -> status_pb2.Status:
        """What the caller is told; what nobody meant goes to the log instead."""
        if isinstance(error, ErrataError) and (status := status_of(error)).code != grpc.StatusCode.INTERNAL.value[0]:
            return status
        error_id = secrets.token_hex(4)
        _log.error("%s failed", method, exc_info=error, extra={"method": method, "error_id": error_id})
        return internal(method, error_id)


class _Call:
    """One call on its way through."""

    def __init__(self, gate: Gate, method: str, context: Context) -> None:
        self._gate, self._method, self._context = gate, method, context
        self._began = perf_counter()
        self._caller = self._resource = self.naming = self.reason = ""
        self.code = grpc.StatusCode.OK
        self.entered: str | None = None
        # Health and reflection are watched for as long as the server lives: nothing to wait for.
        self.works = int(method.startswith("/errata."))

    @property
    def seconds(self) -> float:
        return perf_counter() - self._began

    async def admit(self, raw: Any, read: Callable[[bytes], Message] | None) -> Any:
        """The request, once it may pass. `read` is None for a stream of requests, of which nothing is known yet."""
        gate, method = self._gate, self._method
        if method in OPEN:
            self._enter("")
            return _parsed(raw, read, gate._most)
        if gate._draining:
            raise DrainingError("the server is shutting down; call again in a moment, or another one")
        metadata = self._context.invocation_metadata() or ()
        who = await asyncio.to_thread(gate._authenticator.caller, tuple(metadata))
        self._caller = who.name
        called_by(who)
        gate._limiter.take(who.name)
        self._enter(who.name)
        request = _parsed(raw, read, gate._most)
        self.naming, self._resource = _resource(request)
        found = _MODEL.match(self._resource)
        authorize(who, method, found[1] if found else None)
        return request

    def _enter(self, caller: str) -> None:
        self._gate._enter(caller)
        self.entered = caller

    def note_answer(self, answer: object) -> None:
        """What was created is worth more in the log than what it was created from."""
        if "/Create" in self._method and isinstance(answer, Message):
            for _, made in answer.ListFields():
                self._resource = getattr(made, "name", "") or self._resource

    def log(self) -> None:
        level = logging.DEBUG if self._method in OPEN else logging.INFO
        about = {
            "method": self._method,
            "operation": self._resource,
            "caller": self._caller,
            "code": self.code.name,
            "reason": self.reason,
            "milliseconds": round(1000 * self.seconds, 1),
        }
        _log.log(level, "%s %s", self._method, self.code.name, extra={k: v for k, v in about.items() if v != ""})


def _parsed(raw: Any, read: Callable[[bytes], Message] | None, most: int) -> Any:
    if read is None:
        return raw
    if len(raw) > most:
        raise MalformedError(
            f"the request has {len(raw)} bytes, and this server takes {most}; split it or send smaller images",
            field="request",
            reason="MESSAGE_TOO_LARGE",
        )
    try:
        return read(raw)
    except DecodeError:
        raise MalformedError(
            "the request is no message of this method; make it with the API's own protos",
            field="request",
            reason="MALFORMED_MESSAGE",
        ) from None


def _resource(request: Any) -> tuple[str, str]:
    """The field that says what a request is about, and the name in it; both "" where it names nothing."""
    for field in _NAMING:
        name = getattr(request, field, "")
        if isinstance(name, str) and name:
            return field, name
    inner = getattr(request, "request", None)
    if not isinstance(inner, Message):
        return "", ""
    field, name = _resource(inner)
    return f"request.{field}", name


async def _abort(context: Context, status: status_pb2.Status, retry: float | None = None) -> NoReturn:
    await context.abort(code_from(status), status.message, trailing_metadata(status, retry))
    raise AssertionError("abort always raises")


def _left(context: Context) -> grpc.StatusCode:
    """Why a call was cancelled from outside."""
    remaining = context.time_remaining()
    late = remaining is not None and remaining <= 0
    return grpc.StatusCode.DEADLINE_EXCEEDED if late else grpc.StatusCode.CANCELLED


def _aborted(context: Context) -> grpc.StatusCode:
    """What a handler ended its call with by itself."""
    code = context.code()
    return next((c for c in grpc.StatusCode if code in (c, c.value[0])), grpc.StatusCode.UNKNOWN)
