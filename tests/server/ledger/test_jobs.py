from collections.abc import Callable

import pytest
from ledgers import Clock, Edit, new_version
from sqlalchemy import event

from errata.server.errors import NotFoundError, RequestIdReusedError
from errata.server.ledger.ledger import Ledger
from errata.server.ledger.rows import Failure, JobKind, JobRow, JobState

EDITS, TRACES = (JobKind.EDIT,), (JobKind.TRACE,)


def create(
    ledger: Ledger, kind: JobKind = JobKind.EDIT, *, model: str = "atlas", version: int = 0, summary: bytes = b""
) -> JobRow:
    return ledger.create_job(
        kind, model, version=version, request=b"request", request_id=None, actor="ada", summary=summary
    )


def test_a_new_job_waits(ledger: Ledger, clock: Clock) -> None:
    job = create(ledger, summary=b"short")
    assert ledger.job(JobKind.EDIT, "atlas", job.id) == job
    assert (job.state, job.stage, job.attempt, job.version, job.made) == (JobState.PENDING, "queued", 0, 0, None)
    assert (job.request, job.result, job.failure, job.summary) == (b"request", None, None, b"short")
    assert (job.created_by, job.create_time, job.start_time, job.end_time) == ("ada", clock.now, None, None)


def test_a_job_on_nothing_is_refused(ledger: Ledger) -> None:
    with pytest.raises(NotFoundError) as refused:
        create(ledger, version=1)
    assert refused.value.said_reason == "VERSION_NOT_FOUND"
    with pytest.raises(NotFoundError) as refused:
        create(ledger, model="mars")
    assert refused.value.said_reason == "MODEL_NOT_FOUND"
    assert ledger.jobs(JobKind.EDIT, "atlas", None, 10) == []


def test_the_same_request_id_returns_the_first_job(ledger: Ledger) -> None:
    first, again = (
        ledger.create_job(JobKind.EDIT, "atlas", version=0, request=b"x" * 100, request_id="r-1", actor=actor)
        for actor in ("ada", "bob")
    )
    assert again == first
    assert ledger.jobs(JobKind.EDIT, "atlas", None, 10) == [as_listed(first)]
    assert len(ledger.audit("atlas", None, 10)) == 1


def test_a_repeated_request_shows_how_far_the_first_job_is(ledger: Ledger) -> None:
    job = ledger.create_job(JobKind.TRACE, "atlas", version=0, request=b"x", request_id="r-1", actor="ada")
    ledger.finish(job.id, JobState.SUCCEEDED, result=b"found")
    again = ledger.create_job(JobKind.TRACE, "atlas", version=0, request=b"x", request_id="r-1", actor="ada")
    assert (again.id, again.state, again.result) == (job.id, JobState.SUCCEEDED, b"found")


def test_the_same_request_id_with_another_request_is_refused(ledger: Ledger) -> None:
    ledger.create_job(JobKind.EDIT, "atlas", version=0, request=b"x", request_id="r-1", actor="ada")
    with pytest.raises(RequestIdReusedError, match='"r-1"'):
        ledger.create_job(JobKind.EDIT, "atlas", version=0, request=b"y", request_id="r-1", actor="ada")


def test_a_request_is_compared_as_it_was_sent(ledger: Ledger) -> None:
    first = ledger.create_job(
        JobKind.EDIT, "atlas", version=0, request=b"with its pictures", request_id="r-1", actor="ada", sent=b"by URI"
    )
    assert ledger.repeated(JobKind.EDIT, "atlas", "r-1", b"by URI") == first
    assert first.request == b"with its pictures"
    again = ledger.create_job(
        JobKind.EDIT, "atlas", version=0, request=b"with others", request_id="r-1", actor="ada", sent=b"by URI"
    )
    assert again == first
    with pytest.raises(RequestIdReusedError, match='"r-1"'):
        ledger.repeated(JobKind.EDIT, "atlas", "r-1", b"with its pictures")
    for kind, model, request_id in (
        (JobKind.EDIT, "atlas", "r-2"),
        (JobKind.TRACE, "atlas", "r-1"),
        (JobKind.EDIT, "mars", "r-1"),
    ):
        assert ledger.repeated(kind, model, request_id, b"by URI") is None


def test_a_repeated_request_is_the_first_job_though_its_version_is_gone(ledger: Ledger, edit: Edit) -> None:
    number = edit().number
    first = ledger.create_job(JobKind.EDIT, "atlas", version=number, request=b"x", request_id="r-1", actor="ada")
    ended = ledger.finish(first.id, JobState.FAILED)
    ledger.delete_version("atlas", number, actor="ada", publish=True)
    again = ledger.create_job(JobKind.EDIT, "atlas", version=number, request=b"x", request_id="r-1", actor="ada")
    assert again == ledger.repeated(JobKind.EDIT, "atlas", "r-1", b"x") == ended


def test_a_job_that_needs_a_further_version_is_refused_where_it_is_gone(ledger: Ledger) -> None:
    with pytest.raises(NotFoundError, match="no version 7"):
        ledger.create_job(
            JobKind.EVALUATION, "atlas", version=0, request=b"x", request_id=None, actor="ada", also=(0, 7)
        )
    assert ledger.jobs(JobKind.EVALUATION, "atlas", None, 10) == []


def test_a_request_id_belongs_to_its_kind_and_model(ledger: Ledger) -> None:
    ledger.ensure_model("mars")
    for kind, model in ((JobKind.EDIT, "atlas"), (JobKind.TRACE, "atlas"), (JobKind.EDIT, "mars")):
        ledger.create_job(kind, model, version=0, request=model.encode(), request_id="r-1", actor="ada")
    assert len(ledger.jobs(JobKind.EDIT, "atlas", None, 10)) == 1


@pytest.mark.parametrize("request_id", [None, ""])
def test_without_a_request_id_every_job_is_new(ledger: Ledger, request_id: str | None) -> None:
    jobs = [
        ledger.create_job(JobKind.EDIT, "atlas", version=0, request=b"x", request_id=request_id, actor="ada")
        for _ in range(2)
    ]
    assert jobs[0].id != jobs[1].id


def test_a_job_is_found_only_as_what_it_is(ledger: Ledger) -> None:
    ledger.ensure_model("mars")
    job = create(ledger)
    for kind, model, reason in (
        (JobKind.TRACE, "atlas", "TRACE_NOT_FOUND"),
        (JobKind.EDIT, "mars", "EDIT_NOT_FOUND"),
        (JobKind.EVALUATION, "atlas", "EVALUATION_NOT_FOUND"),
        (JobKind.EDIT, "venus", "MODEL_NOT_FOUND"),
    ):
        with pytest.raises(NotFoundError) as refused:
            ledger.job(kind, model, job.id)
        assert refused.value.said_reason == reason


def test_lists_go_from_the_newest_to_the_oldest_page_by_page(ledger: Ledger) -> None:
    # All in the same instant: the clock stands still.
    jobs = [create(ledger) for _ in range(5)]
    create(ledger, JobKind.TRACE)
    pages = [first := ledger.jobs(JobKind.EDIT, "atlas", None, 3), ledger.jobs(JobKind.EDIT, "atlas", first[-1].id, 3)]
    assert [[job.id for job in page] for page in pages] == [
        [job.id for job in reversed(jobs[2:])],
        [job.id for job in reversed(jobs[:2])],
    ]
    assert ledger.jobs(JobKind.EDIT, "atlas", jobs[0].id, 3) == []


def test_ids_sort_by_time(ledger: Ledger, clock: Clock) -> None:
    ids = []
    for _ in range(4):
        ids.append(create(ledger).id)
        clock.forward(0.002)
    assert ids == sorted(ids)


def test_a_list_of_unknown_models_jobs_is_refused(ledger: Ledger) -> None:
    with pytest.raises(NotFoundError):
        ledger.jobs(JobKind.EDIT, "mars", None, 10)


def test_a_list_reads_no_requests_and_no_results(ledger: Ledger) -> None:
    body = bytes(2 * 2**20)
    job = ledger.create_job(JobKind.TRACE, "atlas", version=0, request=body, request_id=None, actor="a", summary=b"s")
    assert ledger.claim(TRACES).request == body  # type: ignore[union-attr]
    statements: list[str] = []
    event.listen(ledger._engine, "before_cursor_execute", lambda *seen: statements.append(seen[2]))
    running = ledger.running()
    finished = ledger.finish(job.id, JobState.SUCCEEDED, result=body)
    assert finished.result == body
    del statements[:]
    listed = ledger.jobs(JobKind.TRACE, "atlas", None, 10)
    assert (running[0].request, listed[0].request, listed[0].result, listed[0].summary) == (b"", b"", None, b"s")
    assert not any("job_bodies" in statement for statement in statements)


def test_jobs_are_claimed_in_the_order_they_came(ledger: Ledger, clock: Clock) -> None:
    jobs = [create(ledger) for _ in range(3)]
    clock.forward(5)
    claimed = [ledger.claim(EDITS) for _ in range(4)]
    assert [job and job.id for job in claimed] == [*(job.id for job in jobs), None]
    first = claimed[0]
    assert first is not None
    assert (first.state, first.attempt, first.start_time, first.request) == (JobState.RUNNING, 1, clock.now, b"request")


def test_a_busy_model_is_passed_over_for_that_kind_only(ledger: Ledger) -> None:
    ledger.ensure_model("mars")
    waiting, trace, other = create(ledger), create(ledger, JobKind.TRACE), create(ledger, model="mars")
    busy = {(JobKind.EDIT, "atlas")}
    both = (JobKind.EDIT, JobKind.TRACE)
    claimed = [ledger.claim(both, busy) for _ in range(3)]
    assert [job and job.id for job in claimed] == [trace.id, other.id, None]
    assert ledger.claim(both, {(JobKind.TRACE, "atlas")}).id == waiting.id  # type: ignore[union-attr]


def test_only_the_kinds_asked_for_are_claimed(ledger: Ledger) -> None:
    create(ledger)
    assert ledger.claim(TRACES) is None
    assert ledger.claim(()) is None
    assert ledger.claim((JobKind.TRACE, JobKind.EDIT)) is not None


def test_progress_is_that_of_a_running_job(ledger: Ledger) -> None:
    job = create(ledger)
    ledger.progress(job.id, "values", 3, 10)
    assert ledger.job(JobKind.EDIT, "atlas", job.id).stage == "queued"
    ledger.claim(EDITS)
    ledger.progress(job.id, "values", 3, 10)
    seen = ledger.job(JobKind.EDIT, "atlas", job.id)
    assert (seen.stage, seen.done, seen.total) == ("values", 3, 10)
    ledger.finish(job.id, JobState.CANCELLED)
    ledger.progress(job.id, "solve", 1, 2)
    assert ledger.job(JobKind.EDIT, "atlas", job.id).stage == "values"


def test_a_waiting_job_is_cancelled_at_once(ledger: Ledger, clock: Clock) -> None:
    job = create(ledger)
    ended = ledger.request_cancel(JobKind.EDIT, "atlas", job.id, "bob")
    assert (ended.state, ended.end_time, ended.start_time) == (JobState.CANCELLED, clock.now, None)
    assert ledger.claim(EDITS) is None


def test_a_running_job_is_asked_to_stop(ledger: Ledger) -> None:
    job = create(ledger)
    ledger.claim(EDITS)
    assert not ledger.cancel_requested(job.id)
    asked = ledger.request_cancel(JobKind.EDIT, "atlas", job.id, "bob")
    assert (asked.state, asked.cancel_requested, asked.end_time) == (JobState.RUNNING, True, None)
    assert ledger.cancel_requested(job.id)
    ledger.request_cancel(JobKind.EDIT, "atlas", job.id, "bob")
    assert [entry.action for entry in ledger.audit("atlas", None, 10)] == ["edit.cancel", "edit.create"]
    assert [entry.actor for entry in ledger.audit("atlas", None, 10)] == ["bob", "ada"]


@pytest.mark.parametrize("state", [state for state in JobState if state.ended])
def test_an_ended_job_never_changes_again(ledger: Ledger, clock: Clock, state: JobState) -> None:
    job = create(ledger)
    ledger.claim(EDITS)
    ended = ledger.finish(job.id, state, result=b"one")
    clock.forward(1)
    others: list[Callable[[], JobRow]] = [
        lambda: ledger.finish(job.id, JobState.FAILED, result=b"two", failure=Failure(reason="R", message="m")),
        lambda: ledger.request_cancel(JobKind.EDIT, "atlas", job.id, "bob"),
        lambda: ledger.requeue(job.id),
        lambda: ledger.job(JobKind.EDIT, "atlas", job.id),
    ]
    assert [change() for change in others] == [ended] * 4
    assert (ended.state, ended.result, ended.failure) == (state, b"one", None)
    assert ledger.claim(EDITS) is None


def test_what_a_list_shows_changes_with_the_end_of_a_job_and_never_after(ledger: Ledger, edit: Edit) -> None:
    first, second = create(ledger, summary=b"asked"), create(ledger, summary=b"asked")
    assert ledger.finish(first.id, JobState.SUCCEEDED, summary=b"done").summary == b"done"
    assert ledger.finish(first.id, JobState.FAILED, summary=b"again").summary == b"done"
    assert ledger.finish(second.id, JobState.FAILED).summary == b"asked"
    third = create(ledger, summary=b"asked")
    ledger.commit_edit(third.id, new_version(), result=b"", publish=True, summary=b"made")
    ledger.commit_edit(third.id, new_version(), result=b"", publish=True, summary=b"made twice")
    listed = ledger.jobs(JobKind.EDIT, "atlas", None, 3)
    assert [job.summary for job in listed] == [b"made", b"asked", b"done"]


def test_a_job_does_not_finish_as_something_that_is_no_end(ledger: Ledger) -> None:
    job = create(ledger)
    with pytest.raises(ValueError, match="running"):
        ledger.finish(job.id, JobState.RUNNING)
    assert ledger.job(JobKind.EDIT, "atlas", job.id) == job


def test_a_failure_is_kept_whole(ledger: Ledger, clock: Clock) -> None:
    job = create(ledger)
    ledger.claim(EDITS)
    clock.forward(7.5)
    failure = Failure(reason="CONSTRAINT_NOT_FOUND", message="“this contry” does not occur", field="requests[2]")
    ended = ledger.finish(job.id, JobState.FAILED, failure=failure)
    assert (ended.state, ended.failure, ended.end_time) == (JobState.FAILED, failure, clock.now)


def test_a_failure_that_quotes_a_zero_byte_still_ends_its_job(ledger: Ledger) -> None:
    job = create(ledger)
    ended = ledger.finish(job.id, JobState.FAILED, failure=Failure(reason="R", message="a\0b"))
    assert ended.failure == Failure(reason="R", message="ab")


def test_an_interrupted_job_goes_back_to_its_place_in_the_queue(ledger: Ledger) -> None:
    first, second = create(ledger), create(ledger)
    ledger.claim(EDITS)
    ledger.progress(first.id, "values", 3, 10)
    assert [job.id for job in ledger.running()] == [first.id]
    again = ledger.requeue(first.id)
    assert (again.state, again.stage, again.done, again.start_time) == (JobState.PENDING, "queued", 0, None)
    assert ledger.running() == []
    claimed = ledger.claim(EDITS)
    assert claimed is not None
    assert (claimed.id, claimed.attempt) == (first.id, 2)
    assert ledger.requeue(second.id).state is JobState.PENDING


def test_an_interrupted_job_that_was_to_stop_is_not_started_again(ledger: Ledger, clock: Clock) -> None:
    job = create(ledger)
    ledger.claim(EDITS)
    ledger.request_cancel(JobKind.EDIT, "atlas", job.id, "bob")
    ended = ledger.requeue(job.id)
    assert (ended.state, ended.end_time) == (JobState.CANCELLED, clock.now)


def test_a_job_nobody_queued_cannot_be_ended(ledger: Ledger) -> None:
    with pytest.raises(NotFoundError):
        ledger.finish("0" * 32, JobState.FAILED)
    with pytest.raises(NotFoundError):
        ledger.requeue("0" * 32)
    assert not ledger.cancel_requested("0" * 32)


def test_jobs_survive_a_restart(ledger: Ledger, opened: Callable[[], Ledger], edit: Edit) -> None:
    edit()
    waiting = create(ledger, version=1)
    ledger.close()
    again = opened()
    assert again.job(JobKind.EDIT, "atlas", waiting.id) == waiting
    assert again.version("atlas", 1) == ledger.version("atlas", 1)


def as_listed(job: JobRow) -> JobRow:
    values = {name: getattr(job, name) for name in JobRow.__slots__}
    return JobRow(**{**values, "request": b"", "result": None})
