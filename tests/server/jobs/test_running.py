from concurrent.futures import Future

import pytest
from house import House, edit_message, question, small_edit

from errata.editor.errors import CancelledError
from errata.server.errors import LedgerUnavailableError
from errata.server.jobs.running import INTERVAL, RunningJob
from errata.server.ledger.rows import JobKind, JobRow, JobState


class Clock:
    """Seconds, moved by hand."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Claimed:
    """A job that is claimed, with a clock of its own."""

    def __init__(self, house: House) -> None:
        self.house, self.clock, self.changes, self.ending = house, Clock(), 0, False
        self.row = house.create(edit_message(small_edit(contexts=1)))
        assert house.ledger.claim((JobKind.EDIT,)) is not None
        self.job = RunningJob(
            self.row, house.ledger, changed=self._changed, interrupted=lambda: self.ending, clock=self.clock
        )

    def _changed(self, job: str) -> None:
        assert job == self.row.id
        self.changes += 1

    def stored(self) -> tuple[str, int, int]:
        row: JobRow = self.house.row(self.row)
        return row.stage, row.done, row.total

    def cancel(self) -> None:
        self.house.ledger.request_cancel(JobKind.EDIT, "atlas", self.row.id, "tester")


@pytest.fixture
def claimed(house: House):
    found = Claimed(house)
    yield found
    house.ledger.finish(found.row.id, JobState.CANCELLED)


def test_a_stage_is_written_at_once(claimed: Claimed) -> None:
    claimed.job.stage("values", 60)
    assert claimed.stored() == ("values", 0, 60)
    assert claimed.changes == 1


def test_steps_in_quick_succession_are_not_all_written(claimed: Claimed) -> None:
    claimed.job.stage("values", 60)
    claimed.job.step(1, 60)
    assert claimed.stored() == ("values", 0, 60)
    claimed.clock.now += INTERVAL
    claimed.job.step(2, 60)
    assert claimed.stored() == ("values", 2, 60)


def test_the_last_step_of_a_stage_is_written_at_once(claimed: Claimed) -> None:
    claimed.job.stage("values", 60)
    claimed.job.step(60, 60)
    assert claimed.stored() == ("values", 60, 60)


def test_a_cancellation_is_heard_within_the_interval(claimed: Claimed) -> None:
    assert not claimed.job.cancelled()
    claimed.cancel()
    assert not claimed.job.cancelled()
    claimed.clock.now += INTERVAL
    assert claimed.job.cancelled()
    with pytest.raises(CancelledError):
        claimed.job.stage("solve")


class Away:
    """A ledger that does not answer."""

    def progress(self, *_: object) -> None:
        raise LedgerUnavailableError("away", retry_after=1.0)

    def cancel_requested(self, _job: str) -> bool:
        raise LedgerUnavailableError("away", retry_after=1.0)


def test_a_job_works_on_while_nobody_can_be_told_how_far_it_is_but_publishes_nothing(claimed: Claimed) -> None:
    claimed.job.stage("values", 60)
    claimed.job._ledger = Away()
    claimed.clock.now += INTERVAL
    claimed.job.step(2, 60)
    claimed.job.check()
    with pytest.raises(LedgerUnavailableError):
        claimed.job.check(now=True)
    claimed.job._ledger = claimed.house.ledger
    claimed.clock.now += INTERVAL
    claimed.job.step(3, 60)
    assert claimed.stored() == ("values", 3, 60)


def test_a_server_that_ends_is_heard_at_once(claimed: Claimed) -> None:
    assert not claimed.job.cancelled()
    claimed.ending = True
    assert claimed.job.cancelled()


def test_waiting_for_a_model_ends_when_the_job_is_cancelled(claimed: Claimed) -> None:
    never: Future[None] = Future()
    claimed.cancel()
    with pytest.raises(CancelledError):
        claimed.job.result_of(never)


def test_a_forward_pass_of_a_cancelled_job_does_not_begin(house: House, claimed: Claimed) -> None:
    with house.models.get("atlas").borrow() as model:
        with claimed.job.watching(model):
            claimed.job.stage("evaluate")
            model.generate([question("Estonia", shown=False).prompt], max_new_tokens=1)
            claimed.clock.now += INTERVAL
            model.generate([question("Estonia", shown=False).prompt], max_new_tokens=1)
            assert claimed.stored()[1] > 0
            claimed.ending = True
            with pytest.raises(CancelledError):
                model.generate([question("Estonia", shown=False).prompt], max_new_tokens=1)
        model.generate([question("Estonia", shown=False).prompt], max_new_tokens=1)
