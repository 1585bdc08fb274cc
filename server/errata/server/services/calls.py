"""What every service needs of a call: who makes it, and lists in pages."""

from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import Any, Protocol, TypeAlias, TypeVar

import grpc

from errata.server.conversion import page_size
from errata.server.pages import PageTokens
from errata.server.security import Caller

T = TypeVar("T")

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
"""gRPC's side of a call."""

_CALLER: ContextVar[Caller] = ContextVar("caller")  # no default: a call that passed no gate has no caller


def caller() -> Caller:
    """Who makes the call that this task, or a thread it started, works on."""
    return _CALLER.get()


def called_by(who: Caller) -> None:
    """Says who makes this task's call. Each call is a task of its own."""
    _CALLER.set(who)


class ListRequest(Protocol):
    """A request for part of a list."""

    page_size: int
    page_token: str


class Pager:
    """Cuts lists into pages."""

    def __init__(self, tokens: PageTokens) -> None:
        self._tokens = tokens

    def page(
        self,
        method: str,
        parent: str,
        request: ListRequest,
        fetch: Callable[[str | None, int], Sequence[T]],
        position: Callable[[T], str],
    ) -> tuple[Sequence[T], str]:
        """A page, and the token of the next one, "" after the last.

        `fetch(after, limit)` gives the rows after a `position`. Raises PageTokenError, MalformedError.
        """
        size = page_size(request.page_size)
        rows = fetch(self._tokens.read(request.page_token, method, parent), size + 1)
        if len(rows) <= size:
            return rows, ""
        return rows[:size], self._tokens.issue(method, parent, position(rows[size - 1]))
