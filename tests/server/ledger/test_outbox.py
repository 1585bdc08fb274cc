import json
from datetime import timedelta

import pytest
from ledgers import Clock, Edit, new_version

from errata.server.ledger.ledger import Ledger
from errata.server.ledger.rows import JobKind, PublishState, TaskKind


def due(ledger: Ledger, clock: Clock) -> list[tuple[str, int]]:
    return [(task.model, task.version) for task in ledger.tasks_due(clock.now, 100)]


@pytest.fixture
def two_models(ledger: Ledger, edit: Edit) -> None:
    """Tasks 1 to 4: atlas 1, atlas 2, mars 1, atlas 3."""
    ledger.ensure_model("mars")
    edit(), edit()
    job = ledger.create_job(JobKind.EDIT, "mars", version=0, request=b"", request_id=None, actor="ada")
    ledger.commit_edit(job.id, new_version(), result=b"", publish=True)
    edit()


@pytest.mark.usefixtures("two_models")
def test_tasks_come_in_the_order_of_their_changes(ledger: Ledger, clock: Clock) -> None:
    assert due(ledger, clock) == [("atlas", 1), ("atlas", 2), ("mars", 1), ("atlas", 3)]
    assert [task.version for task in ledger.tasks_due(clock.now, 2)] == [1, 2]
    task = ledger.tasks_due(clock.now, 1)[0]
    assert (task.kind, task.attempts, task.last_error) == (TaskKind.PUBLISH, 0, "")
    assert json.loads(task.payload) == {"edit": ledger.version("atlas", 1).edit}


@pytest.mark.usefixtures("two_models")
def test_a_task_that_is_done_does_not_come_again(ledger: Ledger, clock: Clock) -> None:
    task = ledger.tasks_due(clock.now, 1)[0]
    ledger.task_done(task.id)
    ledger.task_done(task.id)
    assert due(ledger, clock) == [("atlas", 2), ("mars", 1), ("atlas", 3)]


@pytest.mark.usefixtures("two_models")
def test_a_failed_task_holds_back_its_own_model_until_its_retry(ledger: Ledger, clock: Clock) -> None:
    task = ledger.tasks_due(clock.now, 1)[0]
    ledger.task_failed(task.id, "connection refused\0", clock.now + timedelta(seconds=30))
    assert due(ledger, clock) == [("mars", 1)]
    clock.forward(29)
    assert due(ledger, clock) == [("mars", 1)]
    clock.forward(1)
    assert due(ledger, clock) == [("atlas", 1), ("atlas", 2), ("mars", 1), ("atlas", 3)]
    again = ledger.tasks_due(clock.now, 1)[0]
    assert (again.id, again.attempts, again.last_error) == (task.id, 1, "connection refused")


@pytest.mark.usefixtures("two_models")
def test_a_later_task_that_waits_does_not_hold_back_earlier_ones(ledger: Ledger, clock: Clock) -> None:
    ledger.task_failed(ledger.tasks_due(clock.now, 4)[1].id, "no", clock.now + timedelta(seconds=30))
    assert due(ledger, clock) == [("atlas", 1), ("mars", 1)]


def test_a_published_version_says_where_it_is(ledger: Ledger, edit: Edit) -> None:
    edit(), edit()
    assert [version.number for version in ledger.unpublished()] == [1, 2]
    for _ in range(2):
        ledger.published("atlas", 1, "run", 7)
    version = ledger.version("atlas", 1)
    assert (version.publish_state, version.mlflow_run_id, version.mlflow_version) == (PublishState.PUBLISHED, "run", 7)
    assert [version.number for version in ledger.unpublished()] == [2]


def test_deleting_a_published_version_tells_mlflow_which(ledger: Ledger, edit: Edit, clock: Clock) -> None:
    made = edit()
    ledger.task_done(ledger.tasks_due(clock.now, 1)[0].id)
    ledger.published("atlas", 1, "run", 7)
    ledger.delete_version("atlas", 1, actor="ada", publish=True)
    [task] = ledger.tasks_due(clock.now, 10)
    assert (task.kind, task.version) == (TaskKind.DELETE_VERSION, 1)
    assert json.loads(task.payload) == {"edit": made.edit, "mlflow_version": 7, "run_id": "run"}


@pytest.mark.parametrize(("made", "deleted"), [(False, True), (True, False)])
def test_a_deletion_is_not_told_where_mlflow_never_knew(
    ledger: Ledger, edit: Edit, clock: Clock, made: bool, deleted: bool
) -> None:
    edit(publish=made)
    ledger.delete_version("atlas", 1, actor="ada", publish=deleted)
    assert ledger.tasks_due(clock.now, 10) == []


def test_a_task_id_is_never_used_again(ledger: Ledger, edit: Edit, clock: Clock) -> None:
    edit()
    done = ledger.tasks_due(clock.now, 1)[0].id
    ledger.task_done(done)
    edit()
    # A writer that says "done" late must not strike out somebody else's task.
    ledger.task_done(done)
    assert due(ledger, clock) == [("atlas", 2)]
