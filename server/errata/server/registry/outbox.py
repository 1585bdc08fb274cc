"""The one writer to MLflow: a thread that works off the ledger's outbox, and tries again for as long as it must.

The ledger is the truth. While MLflow is down nothing waits for it but the outbox: versions are used all the same and
show as unpublished. Knows nothing of how a version is published, and imports no MLflow, which takes seconds.
"""

import json
import logging
import random
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Protocol

from errata.server.errors import NotFoundError
from errata.server.ledger.ledger import Ledger
from errata.server.ledger.rows import JobKind, JobRow, PublishState, TaskKind, TaskRow, VersionRow
from errata.server.registry.record import EditRecord, Published, record_of

_PAGE = 100

_log = logging.getLogger(__name__)


class VersionRegistry(Protocol):
    """What the writer needs of `registry.Registry`. Every call may be repeated, and may raise anything."""

    def publish(self, version: VersionRow, lineage: Sequence[VersionRow], record: EditRecord) -> Published:
        """Publishes a version, or returns where it is."""

    def publish_measurement(self, job: JobRow) -> str:
        """Publishes a measurement, or finds where it is; returns its run."""

    def registered(self, model: str) -> dict[str, Published]:
        """All of a model's registered versions, by their edits."""

    def set_alias(self, version: VersionRow, alias: str) -> None:
        """Points an alias to a version."""

    def delete_alias(self, model: str, alias: str) -> None:
        """Takes an alias away."""

    def delete_version(self, model: str, edit: str) -> None:
        """Removes an edit's registered version."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Backoff:
    """How long to wait before trying again: `first`, twice as long each time, at most `most`; in seconds.

    `jitter` is the share of it that is left to chance, 0-1, so that servers that failed together do not return
    together.
    """

    first: float = 1.0
    most: float = 300.0
    jitter: float = 0.25

    def after(self, attempts: int, chance: float) -> timedelta:
        """The wait after `attempts` failures before this one; `chance` is drawn from 0-1."""
        whole = min(self.most, self.first * 2.0 ** min(attempts, 60))
        return timedelta(seconds=whole * (1 - self.jitter * chance))


_BACKOFF = Backoff()


class OutboxWriter:
    """Works off the outbox in a thread of its own.

    `clock` says the time, aware; `chance` draws from 0-1.
    """

    def __init__(
        self,
        ledger: Ledger,
        registry: VersionRegistry,
        *,
        backoff: Backoff = _BACKOFF,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
        chance: Callable[[], float] = random.random,
    ) -> None:
        self._ledger, self._registry = ledger, registry
        self._backoff, self._clock, self._chance = backoff, clock, chance
        self._wake, self._stopping = threading.Event(), threading.Event()
        self._retries: dict[str, datetime] = {}
        self._reconciled = False
        self._thread = threading.Thread(target=self._run, name="outbox", daemon=True)

    def start(self) -> None:
        """Starts the thread: it reconciles, tries at once whatever is left from before, and waits for `notify`."""
        self._thread.start()

    def notify(self) -> None:
        """Says that there may be something to do. From any thread; never blocks."""
        self._wake.set()

    def stop(self, timeout: float | None = None) -> bool:
        """Stops after the running task. Returns whether it ended within `timeout` seconds (None: however long).

        What is left stays in the outbox. Idempotent.
        """
        self._stopping.set()
        self._wake.set()
        if self._thread.ident is not None:
            self._thread.join(timeout)
        return not self._thread.is_alive()

    def reconcile(self) -> None:
        """Makes the ledger say what MLflow has, where the two were cut off from each other.

        A version that MLflow has and the ledger believes unpublished is marked published. One that the ledger believes
        published and MLflow has not is only logged: somebody removed it there, and may have meant it.
        """
        for model in self._models():
            versions = [v for v in self._versions(model) if v.edit is not None]
            registered = self._registry.registered(model) if versions else {}
            for version in versions:
                self._compare(version, registered.get(version.edit or ""))

    def _compare(self, version: VersionRow, found: Published | None) -> None:
        if found is None:
            if version.publish_state is PublishState.PUBLISHED:
                _log.warning("a published version is not in MLflow any more", extra=_said(version))
        elif (version.mlflow_run_id, version.mlflow_version) != (found.run_id, found.mlflow_version):
            self._ledger.published(version.model, version.number, found.run_id, found.mlflow_version)
            _log.info("a version was found in MLflow", extra={**_said(version), "run_id": found.run_id})

    def _models(self) -> Iterator[str]:
        after = None
        while page := self._ledger.models(after, _PAGE):
            yield from (m.name for m in page)
            after = page[-1].name

    def _versions(self, model: str) -> Iterator[VersionRow]:
        before = None
        while page := self._ledger.versions(model, before, _PAGE):
            yield from page
            before = page[-1].number

    def _run(self) -> None:
        # Waits from before a restart are cut short once: MLflow may be back.
        horizon = timedelta(seconds=self._backoff.most)
        while not self._stopping.is_set():
            self._wake.clear()
            try:
                self._round(horizon)
                horizon = timedelta()
            except Exception:  # the ledger cannot be reached
                _log.exception("the outbox cannot be read; trying again")
            if not self._stopping.is_set():
                self._wake.wait(self._wait())

    def _round(self, horizon: timedelta) -> None:
        """Does what is due by `horizon` from now, and what becomes due meanwhile."""
        self._reconcile_once()
        tasks = self._ledger.tasks_due(self._clock() + horizon, _PAGE)
        while tasks and not self._stopping.is_set():
            self._work_off(tasks)
            tasks = self._ledger.tasks_due(self._clock(), _PAGE)

    def _reconcile_once(self) -> None:
        if not self._reconciled:
            try:
                self.reconcile()
                self._reconciled = True
            except Exception as error:
                _log.warning("ledger and MLflow could not be compared; trying again", extra={"error": _line(error)})

    def _work_off(self, tasks: Sequence[TaskRow]) -> None:
        """In order; after a failure the rest of that model's tasks are left for later."""
        failed: set[str] = set()
        for task in tasks:
            if self._stopping.is_set():
                return
            if task.model not in failed and not self._attempt(task):
                failed.add(task.model)

    def _attempt(self, task: TaskRow) -> bool:
        try:
            self._do(task)
        except Exception as error:  # whatever a network, a disk or a server can fail with
            wait = self._backoff.after(task.attempts, self._chance())
            self._retries[task.model] = self._clock() + wait
            self._ledger.task_failed(task.id, _line(error), self._retries[task.model])
            said = {"task": task.kind.value, "attempts": task.attempts + 1, "retry_in": wait.total_seconds()}
            _log.warning(
                "MLflow could not be told; trying again",
                extra={"model": task.model, "version": task.version, "error": _line(error), **said},
            )
            return False
        self._ledger.task_done(task.id)
        self._retries.pop(task.model, None)
        return True

    def _do(self, task: TaskRow) -> None:
        payload = json.loads(task.payload or "{}")
        if task.kind is TaskKind.PUBLISH_MEASUREMENT:
            self._publish_measurement(self._ledger.job(JobKind.MEASUREMENT, task.model, payload["measurement"]))
        elif task.kind is TaskKind.DELETE_VERSION:
            self._registry.delete_version(task.model, payload["edit"])
        elif task.kind is TaskKind.SET_ALIAS and task.version == 0:
            self._registry.delete_alias(task.model, payload["alias"])
        elif (version := self._version(task)) is None:
            return
        elif task.kind is TaskKind.SET_ALIAS:
            self._registry.set_alias(version, payload["alias"])
        else:
            self._publish(version)

    def _version(self, task: TaskRow) -> VersionRow | None:
        """None where it was deleted meanwhile, so that there is nothing left to tell."""
        try:
            return self._ledger.version(task.model, task.version)
        except NotFoundError:
            return None

    def _publish(self, version: VersionRow) -> None:
        lineage = self._ledger.lineage(version.model, version.number)
        job = self._ledger.job(version.made_by, version.model, version.edit or "")
        found = self._registry.publish(version, lineage, record_of(job))
        self._ledger.published(version.model, version.number, found.run_id, found.mlflow_version)
        said = {"run_id": found.run_id, "mlflow_version": found.mlflow_version}
        _log.info("a version was published", extra={**_said(version), **said})

    def _publish_measurement(self, job: JobRow) -> None:
        run_id = self._registry.publish_measurement(job)
        self._ledger.measurement_published(job.id, run_id)
        _log.info("a measurement was published", extra={"model": job.model, "measurement": job.id, "run_id": run_id})

    def _wait(self) -> float:
        """Seconds until something is due. Never longer than `most`: another process may have left something."""
        until = ((time - self._clock()).total_seconds() for time in self._retries.values())
        return max(0.0, min([self._backoff.most, *until]))


def _said(version: VersionRow) -> dict[str, object]:
    return {"model": version.model, "version": version.number, "edit": version.edit}


def _line(error: Exception) -> str:
    """An error as the ledger keeps it."""
    return f"{type(error).__name__}: {error}"[:1000]
