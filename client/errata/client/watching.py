"""When to open a broken stream of changes again, and when to give up. Pure but for the clock.

A server may restart while an edit runs, a proxy may cut a stream that is silent: neither ends the work. So a watch
goes on from whatever the server says next, until the caller's own time is over or the server has been silent for
`PATIENCE`.
"""

import time
from collections.abc import Callable

import grpc

from errata.client.errors import BusyError, DeadlineExceededError, ErrataError, UnavailableError

PATIENCE = 120.0
"""Seconds without any answer after which the last error is raised."""
STREAM_SECONDS = 300.0
"""Seconds after which a stream is opened anew, so that one whose other end has vanished is noticed."""
_FIRST_PAUSE = 0.1
_LONGEST_PAUSE = 5.0
# What a server that is stopped, or a proxy, ends a stream with. A server's own fault comes with a reason.
_BROKEN = (grpc.StatusCode.CANCELLED, grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN)


class Watching:
    """The time that one watch of `name` has. `timeout` is in seconds, None: however long it takes."""

    def __init__(self, name: str, timeout: float | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._name = name
        self._timeout = timeout
        self._clock = clock
        self._end = None if timeout is None else clock() + timeout
        self._silent_since: float | None = None
        self._pause = _FIRST_PAUSE

    def stream_seconds(self) -> float:
        """How long the next stream may last. Raises DeadlineExceededError where the caller's time is over."""
        return STREAM_SECONDS if self._end is None else min(STREAM_SECONDS, self._remaining())

    def heard(self) -> None:
        """The server said something."""
        self._silent_since = None
        self._pause = _FIRST_PAUSE

    def pause_after(self, error: ErrataError | None) -> float:
        """Seconds to wait before the next stream, when one ended early: with `error`, or without any.

        Raises the error where it is final, or the server has been silent for too long.
        """
        now = self._clock()
        since = self._silent_since = now if self._silent_since is None else self._silent_since
        if error is not None and (not _may_pass(error) or now - since > PATIENCE):
            raise error
        pause = self._pause
        self._pause = min(pause * 2, _LONGEST_PAUSE)
        if error is not None and error.retry_after is not None:
            pause = max(pause, error.retry_after)
        return pause if self._end is None else min(pause, self._remaining())

    def _remaining(self) -> float:
        assert self._end is not None
        remaining = self._end - self._clock()
        if remaining <= 0:
            raise DeadlineExceededError(
                f"{self._name} has not ended after {self._timeout:g} s; it goes on, ask for it again by its name"
            )
        return remaining


def _may_pass(error: ErrataError) -> bool:
    if isinstance(error, (UnavailableError, BusyError, DeadlineExceededError)):
        return True
    return not error.explained and error.code in _BROKEN
