"""When a broken stream is opened again and when it is not, by a clock of our own."""

import grpc
import pytest

from errata.client import BusyError, DeadlineExceededError, ErrataError, InternalError, UnavailableError
from errata.client.watching import PATIENCE, STREAM_SECONDS, Watching

GONE = UnavailableError("gone", code=grpc.StatusCode.UNAVAILABLE, explained=False)
EXPIRED = DeadlineExceededError("expired", code=grpc.StatusCode.DEADLINE_EXCEEDED, explained=False)


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_pauses_grow_to_a_limit_and_begin_anew_when_the_server_speaks(clock: Clock) -> None:
    watching = Watching("w", None, clock)
    pauses = [watching.pause_after(GONE) for _ in range(8)]
    assert pauses == [0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0]
    watching.heard()
    assert watching.pause_after(None) == 0.1


def test_a_server_that_stays_silent_is_given_up_with_its_last_error(clock: Clock) -> None:
    watching = Watching("w", None, clock)
    watching.pause_after(GONE)
    clock.now = PATIENCE
    watching.pause_after(GONE)
    clock.now = PATIENCE + 1
    with pytest.raises(UnavailableError, match="gone"):
        watching.pause_after(GONE)


def test_a_long_quiet_stage_is_no_silence_of_the_server(clock: Clock) -> None:
    watching = Watching("w", None, clock)
    for _ in range(10):
        assert watching.stream_seconds() == STREAM_SECONDS
        watching.heard()
        clock.now += STREAM_SECONDS
        watching.pause_after(EXPIRED)


def test_a_server_whose_hint_is_longer_is_left_alone_for_as_long(clock: Clock) -> None:
    assert Watching("w", None, clock).pause_after(BusyError("full", retry_after=7.0)) == 7.0


def test_neither_a_stream_nor_a_pause_outlasts_the_callers_time(clock: Clock) -> None:
    watching = Watching("w", 3.0, clock)
    clock.now = 2.5
    assert watching.stream_seconds() == 0.5
    assert watching.pause_after(BusyError("full", retry_after=7.0)) == 0.5
    clock.now = 3.0
    with pytest.raises(DeadlineExceededError, match="w has not ended after 3 s"):
        watching.stream_seconds()


@pytest.mark.parametrize("code", [grpc.StatusCode.CANCELLED, grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN])
def test_a_cut_stream_is_told_from_a_fault_of_the_server_by_its_missing_reason(
    clock: Clock, code: grpc.StatusCode
) -> None:
    assert Watching("w", None, clock).pause_after(InternalError("cut", code=code, explained=False)) == 0.1
    with pytest.raises(ErrataError, match="fault"):
        Watching("w", None, clock).pause_after(InternalError("fault", code=code))
