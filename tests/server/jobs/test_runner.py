"""The runner on a real ledger with real, small jobs; faults stand still, raise or vanish where a test wants it."""

from collections.abc import Callable
from threading import Event, Thread

import pytest
from house import House, Worker, edit_message, probe_message, question, small_edit, succeeded, trace_message

from errata.editor.errors import InvalidInputError, PromptError
from errata.server.errors import LedgerUnavailableError
from errata.server.jobs.faults import STAGES, fault_of, no_fault
from errata.server.jobs.runner import failure_of
from errata.server.ledger.rows import JobKind, JobRow, JobState
from errata.v1 import edit_pb2, evaluation_pb2

WAIT = 240.0
Work = Callable[..., Worker]


def _edit() -> edit_pb2.CreateEditRequest:
    return edit_message(small_edit("Estonia", contexts=2), steps=4)


def _evaluation() -> evaluation_pb2.CreateEvaluationRequest:
    return evaluation_pb2.CreateEvaluationRequest(
        version="models/atlas/versions/0",
        baseline="models/atlas/versions/0",
        probes=[probe_message(question("Estonia", shown=False).prompt, "Tallinn")],
    )


class Barrier:
    """Stands still the first time that an edit reaches a stage, until it is let go."""

    def __init__(self, stage: str) -> None:
        self._stage, self.reached, self.go = stage, Event(), Event()

    def __call__(self, stage: str) -> None:
        if stage == self._stage and not self.reached.is_set():
            self.reached.set()
            assert self.go.wait(WAIT)


def test_what_was_queued_before_the_start_is_worked_on_first(house: House, work: Work) -> None:
    job = house.create(_evaluation())
    succeeded(work().end_of(job))


def test_a_queued_job_is_worked_on_as_soon_as_the_runner_hears_of_it(worker: Worker) -> None:
    row = succeeded(worker.run(_evaluation()))
    assert row.attempt == 1
    assert row.start_time is not None
    assert row.end_time is not None


def test_edits_of_one_model_take_turns_and_an_evaluation_runs_beside_them(house: House, work: Work) -> None:
    barrier = Barrier("queued")
    first, second = house.create(_edit()), house.create(_edit())
    worker = work(barrier)
    assert barrier.reached.wait(WAIT)
    succeeded(worker.run(_evaluation()))
    assert house.row(second).state is JobState.PENDING
    barrier.go.set()
    made = [succeeded(worker.end_of(job)).made for job in (first, second)]
    assert made == sorted(made)


def test_an_edit_says_what_it_is_at(work: Work) -> None:
    stages: dict[str, None] = {}
    succeeded(work(look=lambda row: stages.setdefault(row.stage)).run(_edit()))
    assert list(stages) == ["loading", "values", "solve", "evaluate", "publish"]


def _slow_edit() -> edit_pb2.CreateEditRequest:
    """Nobody waits for its values."""
    return edit_message(small_edit("Estonia", contexts=8), steps=1000, target="Ouagadougou Zanzibar Vaduz")


def _long_judged_edit() -> edit_pb2.CreateEditRequest:
    message = _edit()
    message.probes.extend([probe_message(question("Estonia", shown=False).prompt)] * 300)
    return message


def _long_evaluation() -> evaluation_pb2.CreateEvaluationRequest:
    message = _evaluation()
    message.probes.extend([message.probes[0]] * 300)
    return message


@pytest.mark.parametrize(
    ("message", "stage"),
    [
        (_slow_edit, "values"),
        (_long_judged_edit, "evaluate"),
        (lambda: trace_message(20), "tracing"),
        (_long_evaluation, "evaluate"),
    ],
    ids=["values", "evaluate", "tracing", "evaluation"],
)
def test_a_job_that_is_cancelled_in_a_stage_ends_there_and_leaves_nothing(
    house: House, work: Work, message: Callable[[], object], stage: str
) -> None:
    def cancel(row: JobRow) -> None:
        if row.stage == stage:
            house.ledger.request_cancel(row.kind, row.model, row.id, "tester")

    before = _kept(house)
    ended = work(look=cancel).run(message())
    assert (ended.state, ended.stage, ended.made, ended.result) == (JobState.CANCELLED, stage, None, None)
    assert _kept(house) == before


def _kept(house: House) -> list[object]:
    """Every version, and every file and folder of the stores."""
    roots = (house.deltas._root, house.artifacts._root)
    return [house.versions(), *(set(root.rglob("*")) for root in roots)]


def test_an_error_raised_on_purpose_ends_the_job_with_its_reason_and_field(worker: Worker) -> None:
    row = worker.run(edit_message(small_edit(contexts=2), layers=(99,)))
    assert row.state is JobState.FAILED
    assert row.failure is not None
    assert (row.failure.reason, row.failure.field) == ("LAYER_OUT_OF_RANGE", "layers.explicit.layers")
    assert "layer 99" in row.failure.message


def test_any_other_error_is_internal_and_keeps_its_words_to_the_log(
    work: Work, caplog: pytest.LogCaptureFixture
) -> None:
    def fault(stage: str) -> None:
        if stage == "solved":
            raise RuntimeError("the password is 1234")

    row = work(fault).run(_edit())
    assert row.state is JobState.FAILED
    assert row.failure is not None
    assert row.failure.reason == "INTERNAL"
    assert f"models/atlas/edits/{row.id}" in row.failure.message
    assert "1234" not in row.failure.message
    assert "1234" in caplog.text


def test_after_a_failed_job_the_runner_takes_the_next_one(worker: Worker) -> None:
    worker.run(edit_message(small_edit(contexts=2), layers=(99,)))
    succeeded(worker.run(_evaluation()))


def test_a_job_that_outlives_the_drain_is_queued_again_and_done_by_the_next_runner(house: House, work: Work) -> None:
    barrier, versions = Barrier("values"), house.versions()
    worker = work(barrier)
    job = house.create(_edit())
    worker.runner.notify()
    assert barrier.reached.wait(WAIT)
    stopping = Thread(target=worker.runner.stop, args=(0,))
    stopping.start()
    assert worker.runner._interrupting.wait(WAIT)  # only then is the edit to go on, and to find that it must stop
    barrier.go.set()
    stopping.join()
    assert house.row(job).state is JobState.PENDING
    assert house.versions() == versions
    assert succeeded(work().end_of(job)).attempt == 2


def test_a_job_may_end_while_the_runner_drains_and_no_other_is_begun(house: House, work: Work) -> None:
    worker = work()
    worker.runner.stop(WAIT)
    job = house.create(_evaluation())
    worker.runner.notify()
    assert house.row(job).state is JobState.PENDING
    succeeded(work().end_of(job))


class Crash(BaseException):
    """Nothing in the runner catches it: the thread ends and the job stays as it was."""


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("stage", STAGES)
def test_a_crash_at_any_stage_of_an_edit_loses_and_doubles_nothing(house: House, work: Work, stage: str) -> None:
    crashed, versions = Event(), house.versions()

    def crash(reached: str) -> None:
        if reached == stage:
            crashed.set()
            raise Crash

    worker = work(crash)
    job = house.create(_edit())
    worker.runner.notify()
    assert crashed.wait(WAIT)
    worker.runner.stop(WAIT)
    assert house.row(job).state is (JobState.SUCCEEDED if stage == "committed" else JobState.RUNNING)

    second = work()
    if stage != "committed":
        succeeded(second.end_of(job))
    row = house.row(job)
    assert house.versions() == versions + 1
    assert row.made == house.ledger.versions("atlas", None, 1)[0].number
    assert house.models.get("atlas").deltas_of(row.made)


def test_a_job_that_three_starts_did_not_survive_fails_as_interrupted(house: House, work: Work) -> None:
    job = house.create(_evaluation())
    for _ in range(2):
        assert house.ledger.claim(tuple(JobKind)) is not None
        house.ledger.requeue(job.id)
    assert house.ledger.claim(tuple(JobKind)) is not None
    row = work().end_of(job)
    assert row.state is JobState.FAILED
    assert row.failure is not None
    assert row.failure.reason == "INTERRUPTED"


@pytest.mark.parametrize(("outages", "ended"), [(1, JobState.SUCCEEDED), (3, JobState.FAILED)])
def test_a_job_waits_again_where_the_ledger_was_away_but_not_for_ever(
    house: House, work: Work, outages: int, ended: JobState
) -> None:
    left = iter(range(outages))

    def fault(stage: str) -> None:
        if stage == "solved" and next(left, None) is not None:
            raise LedgerUnavailableError("away", retry_after=1.0)

    before = house.versions()
    row = work(fault).run(_edit())
    assert (row.state, row.attempt) == (ended, min(outages + 1, 3))
    assert house.versions() - before == (ended is JobState.SUCCEEDED)
    assert row.failure is None or row.failure.reason == "LEDGER_UNAVAILABLE"


def test_a_job_that_was_to_be_cancelled_when_the_server_crashed_is_cancelled(house: House, work: Work) -> None:
    job = house.create(_evaluation())
    house.ledger.claim(tuple(JobKind))
    house.ledger.request_cancel(JobKind.EVALUATION, "atlas", job.id, "tester")
    assert work().end_of(job).state is JobState.CANCELLED


def test_a_failure_names_the_field_once() -> None:
    failure = failure_of(PromptError("the prompt is empty", field="requests[0].prompt.text"))
    assert (failure.message, failure.field) == ("the prompt is empty", "requests[0].prompt.text")


def test_a_server_without_the_variable_has_no_fault() -> None:
    assert fault_of({}) is no_fault
    assert fault_of({"ERRATA_FAULT": ""}) is no_fault


def test_a_fault_at_no_stage_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="committed"):
        fault_of({"ERRATA_FAULT": "always"})
