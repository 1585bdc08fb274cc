"""What the ledger knows of versions made of versions, and of what a job has found so far."""

import pytest
from alembic import command
from ledgers import new_version
from sqlalchemy import text

from errata.server.errors import NotFoundError
from errata.server.ledger.database import database_url, open_engine
from errata.server.ledger.ledger import Ledger
from errata.server.ledger.migrate import configuration
from errata.server.ledger.rows import JobKind, JobRow, JobState


def _job(ledger: Ledger, kind: JobKind) -> JobRow:
    return ledger.create_job(kind, "atlas", version=0, request=b"request", request_id=None, actor="ada", summary=b"sum")


def test_a_derivation_makes_a_version_as_an_edit_does(ledger: Ledger) -> None:
    job = _job(ledger, JobKind.DERIVATION)
    made = ledger.commit_edit(job.id, new_version(), result=b"done", publish=True)
    assert (made.made_by, made.edit, made.parent) == (JobKind.DERIVATION, job.id, 0)
    assert ledger.job(JobKind.DERIVATION, "atlas", job.id).made == made.number
    assert '"derivation"' in ledger.audit("atlas", None, 1)[0].details


def test_the_maker_of_a_version_is_known_even_after_its_deletion(ledger: Ledger) -> None:
    job = _job(ledger, JobKind.EDIT)
    number = ledger.commit_edit(job.id, new_version(), result=b"", publish=False).number
    ledger.delete_version("atlas", number, actor="ada", publish=False)
    maker = ledger.maker("atlas", number)
    assert maker is not None
    assert (maker.id, maker.kind, maker.summary) == (job.id, JobKind.EDIT, b"sum")
    assert ledger.maker("atlas", 0) is None
    with pytest.raises(NotFoundError):
        ledger.maker("atlas", number + 1)


def test_what_a_job_has_found_so_far_outlives_its_process_and_is_replaced_at_its_end(ledger: Ledger) -> None:
    job = _job(ledger, JobKind.BISECTION)
    ledger.keep(job.id, b"not running yet")
    assert ledger.claim((JobKind.BISECTION,)) is not None
    ledger.keep(job.id, b"one")
    ledger.keep(job.id, b"two")
    assert ledger.requeue(job.id).result == b"two"
    again = ledger.claim((JobKind.BISECTION,))
    assert again is not None
    assert (again.result, again.attempt) == (b"two", 2)
    assert ledger.finish(job.id, JobState.SUCCEEDED, result=b"all").result == b"all"


def test_versions_from_before_were_all_made_by_edits(empty: str) -> None:
    config = configuration(database_url(empty))
    command.upgrade(config, "0001")
    engine = open_engine(database_url(empty))
    with engine.begin() as connection:
        connection.execute(
            text("INSERT INTO errata_models VALUES ('atlas', '', '', 0, 2, '2030-01-01 00:00:00+00:00')")
        )
        for number, parent, edit in ((0, "NULL", "NULL"), (1, "0", "'e1'")):
            connection.execute(
                text(
                    "INSERT INTO errata_versions VALUES "
                    f"('atlas', {number}, {parent}, {edit}, '', '', 0, '[]', '[]', '', '[]', 'none', 0, '', 'ada', "
                    "'2030-01-01 00:00:00+00:00', NULL)"
                )
            )
    engine.dispose()
    command.upgrade(config, "head")
    ledger = Ledger(empty)
    assert ledger.version("atlas", 1).made_by is JobKind.EDIT
    ledger.close()
    command.downgrade(config, "0001")


def test_a_downgrade_takes_the_jobs_along_that_the_release_before_cannot_read(empty: str) -> None:
    config = configuration(database_url(empty))
    command.upgrade(config, "head")
    ledger = Ledger(empty)
    ledger.ensure_model("atlas")
    kept = _job(ledger, JobKind.EDIT)
    for kind in (JobKind.DERIVATION, JobKind.BISECTION):
        _job(ledger, kind)
    command.downgrade(config, "0001")
    command.upgrade(config, "head")
    assert ledger.open_jobs() == {("atlas", JobKind.EDIT, JobState.PENDING): 1}
    assert ledger.job(JobKind.EDIT, "atlas", kept.id).request == b"request"
    ledger.close()


def test_a_downgrade_is_refused_while_a_version_is_there_that_was_derived(empty: str) -> None:
    config = configuration(database_url(empty))
    command.upgrade(config, "head")
    ledger = Ledger(empty)
    ledger.ensure_model("atlas")
    made = ledger.commit_edit(_job(ledger, JobKind.DERIVATION).id, new_version(), result=b"", publish=False)
    with pytest.raises(RuntimeError, match=r"1 version.* derived from others.* backup"):
        command.downgrade(config, "0001")
    assert ledger.version("atlas", made.number).made_by is JobKind.DERIVATION
    ledger.close()
