"""The outbox is worked off in order, however often MLflow fails, and ledger and MLflow agree in the end."""

import threading
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from errata.server.ledger.ledger import Ledger
from errata.server.ledger.rows import JobKind, JobRow, JobState, NewVersion, PublishState, VersionRow
from errata.server.registry.outbox import Backoff, OutboxWriter
from errata.server.registry.record import EditRecord, Published
from errata.v1 import edit_pb2

BASE = "b" * 64
AT_ONCE = Backoff(first=0.001, most=0.002)
NEVER = Backoff(first=3600, most=3600)
SECONDS = 60


class FakeRegistry:
    """MLflow as far as the writer sees it: remembers what it was told, and fails as often as it is set to."""

    def __init__(self) -> None:
        self.failures = 0
        self.failing: set[str] = set()
        self.told: list[str] = []
        self.attempts = 0
        self.found: dict[str, dict[str, Published]] = {}
        self.before: Callable[[], None] = lambda: None
        self._changed = threading.Condition()

    def publish(self, version: VersionRow, lineage: Sequence[VersionRow], record: EditRecord) -> Published:
        self._tell(version.model, f"publish {version.number} on {[v.number for v in lineage[1:]]} ({record.note})")
        published = Published(run_id=f"run-{version.number}", mlflow_version=version.number + 10)
        return self.found.setdefault(version.model, {}).setdefault(version.edit or "", published)

    def publish_measurement(self, job: JobRow) -> str:
        self._tell(job.model, f"measured {job.request.decode()}")
        return f"run-{job.id}"

    def registered(self, model: str) -> dict[str, Published]:
        return dict(self.found.get(model, {}))

    def set_alias(self, version: VersionRow, alias: str) -> None:
        self._tell(version.model, f"{alias} is {version.number}")

    def delete_alias(self, model: str, alias: str) -> None:
        self._tell(model, f"no {alias}")

    def delete_version(self, model: str, edit: str) -> None:
        self._tell(model, "delete")
        self.found.get(model, {}).pop(edit, None)

    def _tell(self, model: str, what: str) -> None:
        self.before()
        with self._changed:
            self.attempts += 1
            self._changed.notify_all()
            if model in self.failing:
                raise ConnectionError("MLflow is down")
            if self.failures:
                self.failures -= 1
                raise ConnectionError("MLflow is down")
            self.told.append(what if model == "atlas" else f"{model}: {what}")

    def wait_for(self, done: Callable[[], bool]) -> None:
        with self._changed:
            assert self._changed.wait_for(done, SECONDS), self.told


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    ledger = Ledger(f"sqlite:///{tmp_path}/ledger.db")
    ledger.migrate()
    for model in ("atlas", "other"):
        ledger.ensure_model(model)
    yield ledger
    ledger.close()


@pytest.fixture
def registry() -> FakeRegistry:
    return FakeRegistry()


@pytest.fixture
def writer(ledger: Ledger, registry: FakeRegistry) -> Iterator[Callable[..., OutboxWriter]]:
    """Starts a writer; it is stopped when the test ends."""
    started: list[OutboxWriter] = []

    def start(backoff: Backoff = AT_ONCE) -> OutboxWriter:
        started.append(OutboxWriter(ledger, registry, backoff=backoff))
        started[-1].start()
        return started[-1]

    yield start
    for one in started:
        assert one.stop(SECONDS)


def edit(ledger: Ledger, model: str = "atlas", parent: int = 0, publish: bool = True) -> VersionRow:
    request = edit_pb2.CreateEditRequest(description="why").SerializeToString()
    job = ledger.create_job(JobKind.EDIT, model, version=parent, request=request, request_id=None, actor="ada")
    new = NewVersion(
        base_sha256=BASE, delta_sha256="d" * 64, delta_bytes=9, layers=(1,), facts=("fact",), scores="[]", rejections=()
    )
    return ledger.commit_edit(job.id, new, result=b"", publish=publish)


def nothing_left(ledger: Ledger) -> bool:
    return not ledger.tasks_due(datetime.now(UTC) + timedelta(days=1), 100)


def finish(writer: OutboxWriter) -> None:
    assert writer.stop(SECONDS)


def test_versions_and_aliases_reach_mlflow_in_order(
    ledger: Ledger, registry: FakeRegistry, writer: Callable[..., OutboxWriter]
) -> None:
    first = edit(ledger)
    second = edit(ledger, parent=first.number)
    for version in (second.number, 0):
        ledger.promote("atlas", version, "champion", etag="", override_reason=None, actor="ada", publish=True)
    running = writer(NEVER)
    registry.wait_for(lambda: len(registry.told) == 4)
    ledger.delete_version("atlas", second.number, actor="ada", publish=True)
    running.notify()
    registry.wait_for(lambda: len(registry.told) == 5)
    finish(running)
    assert registry.told == [
        "publish 1 on [0] (why)",
        "publish 2 on [1, 0] (why)",
        "champion is 2",
        "no champion",
        "delete",
    ]
    assert nothing_left(ledger)
    found = ledger.version("atlas", 1)
    assert (found.publish_state, found.mlflow_run_id, found.mlflow_version) == (PublishState.PUBLISHED, "run-1", 11)


def test_a_measurement_reaches_mlflow_however_often_that_fails_and_its_run_is_known(
    ledger: Ledger, registry: FakeRegistry, writer: Callable[..., OutboxWriter]
) -> None:
    job = ledger.create_job(
        JobKind.MEASUREMENT, "atlas", version=0, request=b"heads", request_id=None, actor="ada", summary=b"sum"
    )
    ledger.finish(job.id, JobState.SUCCEEDED, result=b"", publish=True)
    registry.failures = 2
    running = writer(AT_ONCE)
    registry.wait_for(lambda: len(registry.told) == 1)
    finish(running)
    assert registry.told == ["measured heads"]
    assert nothing_left(ledger)
    assert ledger.job(job.kind, "atlas", job.id).mlflow_run_id == f"run-{job.id}"


def test_a_notified_writer_publishes_at_once(
    ledger: Ledger, registry: FakeRegistry, writer: Callable[..., OutboxWriter]
) -> None:
    """It would otherwise look again after an hour."""
    running = writer(NEVER)
    edit(ledger)
    running.notify()
    registry.wait_for(lambda: len(registry.told) == 1)
    edit(ledger)
    running.notify()
    registry.wait_for(lambda: len(registry.told) == 2)
    finish(running)
    assert nothing_left(ledger)


def test_a_failure_is_tried_again_until_it_succeeds(
    ledger: Ledger, registry: FakeRegistry, writer: Callable[..., OutboxWriter]
) -> None:
    registry.failures = 5
    edit(ledger)
    running = writer()
    registry.wait_for(lambda: len(registry.told) == 1)
    finish(running)
    assert registry.attempts == 6
    assert nothing_left(ledger)
    assert ledger.version("atlas", 1).publish_state is PublishState.PUBLISHED


def test_a_failure_holds_back_its_own_model_only_and_is_written_down(
    ledger: Ledger, registry: FakeRegistry, writer: Callable[..., OutboxWriter]
) -> None:
    registry.failing.add("atlas")
    edit(ledger)
    edit(ledger)
    edit(ledger, "other")
    running = writer(NEVER)
    registry.wait_for(lambda: len(registry.told) == 1)
    finish(running)
    assert registry.told == ["other: publish 1 on [0] (why)"]
    assert registry.attempts == 2
    waiting = ledger.tasks_due(datetime.now(UTC) + timedelta(days=1), 100)
    assert [(t.version, t.attempts, t.last_error) for t in waiting] == [
        (1, 1, "ConnectionError: MLflow is down"),
        (2, 0, ""),
    ]
    assert ledger.tasks_due(datetime.now(UTC), 100) == []
    assert ledger.version("atlas", 1).publish_state is PublishState.PENDING


def test_a_restart_does_not_wait_for_a_retry_of_before(
    ledger: Ledger, registry: FakeRegistry, writer: Callable[..., OutboxWriter]
) -> None:
    registry.failures = 1
    edit(ledger)
    first = writer(NEVER)
    registry.wait_for(lambda: registry.attempts == 1)
    finish(first)
    second = writer(NEVER)
    registry.wait_for(lambda: len(registry.told) == 1)
    finish(second)
    assert nothing_left(ledger)


def test_a_stop_waits_for_the_running_task_and_leaves_the_rest(
    ledger: Ledger, registry: FakeRegistry, writer: Callable[..., OutboxWriter]
) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def slow() -> None:
        begun.set()
        assert go_on.wait(SECONDS)

    registry.before = slow
    edit(ledger)
    edit(ledger)
    running = writer()
    assert begun.wait(SECONDS)
    assert not running.stop(0)
    go_on.set()
    assert running.stop(SECONDS)
    assert registry.told == ["publish 1 on [0] (why)"]
    assert [t.version for t in ledger.tasks_due(datetime.now(UTC), 100)] == [2]


def test_a_writer_that_was_never_started_stops(ledger: Ledger, registry: FakeRegistry) -> None:
    assert OutboxWriter(ledger, registry).stop()


def test_a_version_that_mlflow_has_is_marked_published(ledger: Ledger, registry: FakeRegistry) -> None:
    """A crash between the two stores."""
    versions = [edit(ledger), edit(ledger)]
    registry.found["atlas"] = {versions[0].edit or "": Published(run_id="run", mlflow_version=7)}
    OutboxWriter(ledger, registry).reconcile()
    first, second = (ledger.version("atlas", n) for n in (1, 2))
    assert (first.publish_state, first.mlflow_run_id, first.mlflow_version) == (PublishState.PUBLISHED, "run", 7)
    assert second.publish_state is PublishState.PENDING
    assert ledger.unpublished() == [second]


def test_a_version_that_mlflow_lost_is_logged_and_not_published_again(
    ledger: Ledger, registry: FakeRegistry, writer: Callable[..., OutboxWriter], caplog: pytest.LogCaptureFixture
) -> None:
    running = writer(NEVER)
    edit(ledger)
    running.notify()
    registry.wait_for(lambda: len(registry.told) == 1)
    finish(running)
    registry.found.clear()
    caplog.clear()
    OutboxWriter(ledger, registry).reconcile()
    (record,) = caplog.records
    assert (record.levelname, record.__dict__["model"], record.__dict__["version"]) == ("WARNING", "atlas", 1)
    assert nothing_left(ledger)
    assert ledger.version("atlas", 1).publish_state is PublishState.PUBLISHED


def test_reconciling_reads_all_pages(ledger: Ledger, registry: FakeRegistry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("errata.server.registry.outbox._PAGE", 2)
    versions = [edit(ledger, model) for model in ("atlas", "other") for _ in range(5)]
    for v in versions:
        found = Published(run_id="run", mlflow_version=v.number)
        registry.found.setdefault(v.model, {})[v.edit or ""] = found
    OutboxWriter(ledger, registry).reconcile()
    assert ledger.unpublished() == []


def test_a_version_deleted_while_it_is_published_is_deleted_in_mlflow_too(
    ledger: Ledger, registry: FakeRegistry, writer: Callable[..., OutboxWriter]
) -> None:
    version = edit(ledger)

    def delete() -> None:
        registry.before = lambda: None
        ledger.delete_version("atlas", version.number, actor="ada", publish=True)

    registry.before = delete
    running = writer()
    registry.wait_for(lambda: len(registry.told) == 2)
    finish(running)
    assert registry.told == ["publish 1 on [0] (why)", "delete"]
    assert registry.registered("atlas") == {}
    assert nothing_left(ledger)


class FlakyLedger(Ledger):
    """Cannot be read the first time."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.refused = False

    def tasks_due(self, now: datetime, limit: int) -> list:  # type: ignore[type-arg]
        if not self.refused:
            self.refused = True
            raise OSError("the database is away")
        return super().tasks_due(now, limit)


def test_a_ledger_that_cannot_be_read_is_read_again(tmp_path: Path, registry: FakeRegistry) -> None:
    ledger = FlakyLedger(f"sqlite:///{tmp_path}/ledger.db")
    ledger.migrate()
    ledger.ensure_model("atlas")
    edit(ledger)
    writer = OutboxWriter(ledger, registry, backoff=AT_ONCE)
    writer.start()
    registry.wait_for(lambda: len(registry.told) == 1)
    finish(writer)
    assert ledger.refused
    ledger.close()


def test_waits_double_up_to_the_most_and_chance_shortens_them() -> None:
    backoff = Backoff(first=1, most=300, jitter=0.25)
    assert [backoff.after(n, 0).total_seconds() for n in (0, 1, 2, 8, 9, 10_000)] == [1, 2, 4, 256, 300, 300]
    assert backoff.after(2, 1).total_seconds() == 3
    assert backoff.after(2, 0.5).total_seconds() == 3.5
