"""Many threads, and two ledgers on one database as two processes would have."""

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import TypeVar

import pytest
from ledgers import BASE, Clock, Edit, new_version

from errata.server.errors import EtagMismatchError, NotFoundError, VersionInUseError
from errata.server.ledger.ledger import Ledger
from errata.server.ledger.rows import JobKind, JobState, TaskKind

THREADS = 8

T = TypeVar("T")


def at_once(call: Callable[[int], T], threads: int = THREADS) -> list[T]:
    """What `call(0)`, `call(1)`, … return, each in its thread, all let loose together."""
    barrier = Barrier(threads)

    def run(n: int) -> T:
        barrier.wait()
        return call(n)

    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(run, range(threads)))


@pytest.fixture
def ledgers(ledger: Ledger, opened: Callable[[], Ledger]) -> list[Ledger]:
    """Two, so that no lock within one of them can be what keeps the threads apart."""
    return [ledger, opened()]


def create(ledger: Ledger, request_id: str | None = None, version: int = 0) -> str:
    return ledger.create_job(
        JobKind.EDIT, "atlas", version=version, request=b"x", request_id=request_id, actor="ada"
    ).id


def test_eight_threads_claim_forty_jobs_and_none_twice(ledgers: list[Ledger]) -> None:
    jobs = [create(ledgers[0]) for _ in range(40)]

    def work(n: int) -> list[str]:
        claimed = []
        while job := ledgers[n % 2].claim([JobKind.EDIT]):
            claimed.append(job.id)
        return claimed

    claimed = Counter(job for done in at_once(work) for job in done)
    assert claimed == Counter(jobs)
    assert {job.attempt for job in ledgers[0].running()} == {1}


def test_concurrent_edits_of_one_parent_make_children_with_numbers_of_their_own(
    ledgers: list[Ledger], clock: Clock
) -> None:
    jobs = [create(ledgers[0]) for _ in range(THREADS)]
    made = at_once(lambda n: ledgers[n % 2].commit_edit(jobs[n], new_version(), result=b"", publish=True))
    assert sorted(version.number for version in made) == list(range(1, THREADS + 1))
    assert {version.parent for version in made} == {0}
    assert [version.edit for version in made] == jobs
    # MLflow is to hear of them in the order of their numbers.
    assert [task.version for task in ledgers[0].tasks_due(clock.now, 100)] == list(range(1, THREADS + 1))


def test_committing_one_edit_from_many_threads_makes_one_version(ledgers: list[Ledger], clock: Clock) -> None:
    job = create(ledgers[0])
    made = at_once(lambda n: ledgers[n % 2].commit_edit(job, new_version(), result=b"", publish=True))
    assert {version.number for version in made} == {1}
    assert [version.number for version in ledgers[0].versions("atlas", None, 10)] == [1, 0]
    assert len(ledgers[0].tasks_due(clock.now, 10)) == 1


def test_the_same_request_id_from_many_threads_makes_one_job(ledgers: list[Ledger]) -> None:
    ids = at_once(lambda n: create(ledgers[n % 2], "r-1"))
    assert len(set(ids)) == 1
    assert [job.id for job in ledgers[0].jobs(JobKind.EDIT, "atlas", None, 10)] == ids[:1]


def test_of_many_promotions_with_one_etag_one_wins(ledgers: list[Ledger], edit: Edit) -> None:
    for _ in range(THREADS + 1):
        edit()
    seen = ledgers[0].promote("atlas", 1, "champion", etag=None, override_reason=None, actor="ada", publish=True)

    def promote(n: int) -> int | None:
        try:
            return (
                ledgers[n % 2]
                .promote("atlas", n + 2, "champion", etag=seen.etag, override_reason=None, actor="a", publish=True)
                .version
            )
        except EtagMismatchError:
            return None

    won = [version for version in at_once(promote) if version is not None]
    assert won == [ledgers[0].alias("atlas", "champion").version]


def test_an_alias_set_by_many_threads_at_first_can_be_rolled_back_through_all_of_them(
    ledgers: list[Ledger], edit: Edit, clock: Clock
) -> None:
    for _ in range(THREADS):
        edit()
    at_once(
        lambda n: ledgers[n % 2].promote(
            "atlas", n + 1, "champion", etag=None, override_reason=None, actor="a", publish=True
        )
    )
    told = [t.version for t in ledgers[0].tasks_due(clock.now, 100) if t.kind is TaskKind.SET_ALIAS]
    back = [ledgers[0].rollback("atlas", "champion", etag=None, actor="a", publish=False).version for _ in told]
    assert back == [*reversed(told[:-1]), 0]


def test_a_version_is_either_deleted_or_worked_on(ledgers: list[Ledger], edit: Edit) -> None:
    for number in range(1, 6):
        edit()

        def race(n: int, number: int = number) -> bool:
            try:
                if n:
                    create(ledgers[1], version=number)
                else:
                    ledgers[0].delete_version("atlas", number, actor="ada", publish=True)
            except (NotFoundError, VersionInUseError):
                return False
            return True

        deleted, queued = at_once(race, threads=2)
        assert deleted != queued


def test_every_model_is_registered_once_by_many_threads(ledgers: list[Ledger]) -> None:
    at_once(lambda n: ledgers[n % 2].ensure_model("mars"))
    assert [model.name for model in ledgers[0].models(None, 10)] == ["atlas", "mars"]
    assert [version.number for version in ledgers[0].versions("mars", None, 10)] == [0]


_COMMITS = """
import sys
from errata.server.ledger.ledger import Ledger
from errata.server.ledger.rows import JobKind
from ledgers import new_version

ledger = Ledger(sys.argv[1])
while True:
    job = ledger.create_job(JobKind.EDIT, "atlas", version=0, request=b"x", request_id=None, actor="ada")
    ledger.claim([JobKind.EDIT])
    ledger.commit_edit(job.id, new_version(), result=b"result", publish=True)
    print(job.id, flush=True)
"""


@pytest.mark.parametrize("commits", [1, 2, 5])
def test_a_killed_process_leaves_every_edit_with_its_version_or_without_any(
    ledger: Ledger, url: str, clock: Clock, commits: int
) -> None:
    here = Path(__file__).parent
    paths = {**os.environ, "PYTHONPATH": os.pathsep.join([str(here), *sys.path])}
    with subprocess.Popen(
        [sys.executable, "-c", _COMMITS, url], stdout=subprocess.PIPE, text=True, env=paths
    ) as process:
        assert process.stdout is not None
        said = [process.stdout.readline().strip() for _ in range(commits)]
        process.send_signal(signal.SIGKILL)
        said += process.stdout.read().split()
    # PostgreSQL may still be at the last thing that the process said; this waits for its lock.
    ledger.describe_model("atlas", base_sha256=BASE, architecture="A", layers=6)
    jobs = {job.id: job for job in ledger.jobs(JobKind.EDIT, "atlas", None, 1000)}
    versions = {version.edit: version for version in ledger.versions("atlas", None, 1000) if version.number}
    assert set(said) <= set(versions)
    assert {job.id: job.made for job in jobs.values() if job.state is JobState.SUCCEEDED} == {
        edit: version.number for edit, version in versions.items()
    }
    clock.now = max(version.create_time for version in versions.values())
    tasks = ledger.tasks_due(clock.now, 1000)
    assert sorted(json.loads(task.payload)["edit"] for task in tasks) == sorted(filter(None, versions))
    created = [entry for entry in ledger.audit("atlas", None, 1000) if entry.action == "version.create"]
    assert len(created) == len(versions)
    assert sorted(version.number for version in versions.values()) == list(range(1, len(versions) + 1))
