"""What the ledger knows of measurements: published by the outbox, and gone in the release before them."""

import pytest
from alembic import command
from ledgers import new_version

from errata.server.ledger.database import database_url
from errata.server.ledger.ledger import Ledger
from errata.server.ledger.migrate import configuration
from errata.server.ledger.rows import JobKind, JobRow, JobState, TaskKind
from errata.server.names import job_name, job_of


def _measurement(ledger: Ledger, version: int = 0) -> JobRow:
    return ledger.create_job(
        JobKind.MEASUREMENT, "atlas", version=version, request=b"asked", request_id=None, actor="ada", summary=b"sum"
    )


def test_a_measurement_that_ends_is_to_be_published_once(ledger: Ledger) -> None:
    job = _measurement(ledger)
    assert ledger.claim((JobKind.MEASUREMENT,)) is not None
    for _ in range(2):
        ledger.finish(job.id, JobState.SUCCEEDED, result=b"found", publish=True)
    [task] = ledger.tasks_due(ledger.job(job.kind, "atlas", job.id).create_time, 10)
    assert (task.kind, task.model, task.payload) == (
        TaskKind.PUBLISH_MEASUREMENT,
        "atlas",
        f'{{"measurement": "{job.id}"}}',
    )
    assert ledger.job(job.kind, "atlas", job.id).mlflow_run_id == ""
    ledger.measurement_published(job.id, "run")
    assert ledger.job(job.kind, "atlas", job.id).mlflow_run_id == "run"


def test_a_measurement_outlives_the_version_that_it_is_of(ledger: Ledger) -> None:
    edit = ledger.create_job(JobKind.EDIT, "atlas", version=0, request=b"", request_id=None, actor="ada")
    version = ledger.commit_edit(edit.id, new_version(), result=b"", publish=True)
    job = _measurement(ledger, version.number)
    ledger.finish(job.id, JobState.SUCCEEDED, publish=True)
    ledger.delete_version("atlas", version.number, actor="ada", publish=False)
    tasks = ledger.tasks_due(ledger.job(job.kind, "atlas", job.id).create_time, 10)
    assert [task.kind for task in tasks] == [TaskKind.PUBLISH_MEASUREMENT]


def test_measurements_have_names_of_their_own() -> None:
    name = job_name(JobKind.MEASUREMENT, "atlas", "0197")
    assert name == "models/atlas/measurements/0197"
    assert job_of(name, JobKind.MEASUREMENT, "name") == ("atlas", "0197")


@pytest.mark.parametrize("publish", [True, False])
def test_the_release_before_measurements_finds_its_own_jobs_and_none_of_them(empty: str, publish: bool) -> None:
    config = configuration(database_url(empty))
    ledger = Ledger(empty)
    ledger.migrate()
    ledger.ensure_model("atlas")
    measured = _measurement(ledger)
    ledger.finish(measured.id, JobState.SUCCEEDED, result=b"found", publish=publish)
    trace = ledger.create_job(JobKind.TRACE, "atlas", version=0, request=b"asked", request_id=None, actor="ada")
    ledger.finish(trace.id, JobState.SUCCEEDED, result=b"found")
    command.downgrade(config, "0002")
    command.upgrade(config, "head")
    assert ledger.job(JobKind.TRACE, "atlas", trace.id).result == b"found"
    assert ledger.jobs(JobKind.MEASUREMENT, "atlas", None, 10) == []
    assert ledger.tasks_due(trace.create_time, 10) == []
    ledger.close()
