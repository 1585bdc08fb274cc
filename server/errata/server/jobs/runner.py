"""Threads that take jobs from the ledger and end them there.

A job is claimed in the ledger before work on it begins, and whatever happens it ends there: succeeded, rejected,
failed with a reason, cancelled, or pending again where the server ends first. A process that is killed leaves it
RUNNING; `recover` at the next start puts that right. One process works on a ledger at a time.

Memory: at most `worker_threads` jobs run at once, edits and derivations of one model one after the other. Replicas
share the base's weights, so each job adds its activations only, which `TraceSettings.max_rows` and
`ValueSettings.max_rows` bound.
"""

import logging
import threading
from collections.abc import Callable
from functools import partial
from time import monotonic

from errata.editor.errors import CancelledError, ErrataError
from errata.server.conversion import Decoder
from errata.server.errors import LedgerUnavailableError, reason_of
from errata.server.jobs.bisections import BisectionWork
from errata.server.jobs.derivations import DerivationWork, Sources
from errata.server.jobs.edits import EditWork
from errata.server.jobs.evaluations import EvaluationWork
from errata.server.jobs.events import JobEvents
from errata.server.jobs.faults import Fault, no_fault
from errata.server.jobs.measurements import MeasurementWork
from errata.server.jobs.publishing import Publisher
from errata.server.jobs.running import RunningJob
from errata.server.jobs.traces import TraceWork
from errata.server.ledger.edits import MAKERS
from errata.server.ledger.ledger import Ledger
from errata.server.ledger.rows import Failure, JobKind, JobRow, JobState
from errata.server.models import Models
from errata.server.names import job_name
from errata.server.store import ArtifactStore, DeltaStore

_log = logging.getLogger(__name__)

_MOST_ATTEMPTS = 3
"""Starts of a job that the process or the ledger did not survive, before it counts as the job's fault."""

_GRACE = 30.0
"""Seconds that jobs have to stop once they are told to: one forward pass, or one solve."""

_MOST_WAIT = 60.0
"""Seconds between two tries, at most, while the ledger cannot be used."""


class JobRunner:
    """Works on jobs, `worker_threads` at once.

    `outbox_notify` wakes whoever publishes versions; None where there is no registry. `ended` is told of every job
    that ends, and raises nothing. `fault` is for tests of crashes (module `faults`).
    """

    def __init__(
        self,
        ledger: Ledger,
        models: Models,
        delta_store: DeltaStore,
        artifact_store: ArtifactStore,
        outbox_notify: Callable[[], None] | None,
        decoder: Decoder,
        *,
        events: JobEvents,
        worker_threads: int = 2,
        ended: Callable[[JobRow], None] = lambda _job: None,
        fault: Fault = no_fault,
    ) -> None:
        self._ledger, self._events, self._ended = ledger, events, ended
        self._work: dict[JobKind, Callable[[RunningJob], None]] = {
            JobKind.TRACE: TraceWork(ledger, models, artifact_store, decoder),
            JobKind.EDIT: EditWork(ledger, models, delta_store, artifact_store, outbox_notify, decoder, fault),
            JobKind.EVALUATION: EvaluationWork(ledger, models, artifact_store, decoder),
            JobKind.DERIVATION: DerivationWork(
                ledger,
                Sources(models=models, deltas=delta_store, decoder=decoder),
                Publisher(ledger, delta_store, artifact_store, outbox_notify, fault),
            ),
            JobKind.BISECTION: BisectionWork(ledger, models, decoder),
            JobKind.MEASUREMENT: MeasurementWork(ledger, models, artifact_store, outbox_notify, decoder),
        }
        self._ring = threading.Condition()
        self._rung = 0
        self._claiming = threading.Lock()
        self._busy: set[tuple[JobKind, str]] = set()
        self._stopping, self._interrupting = threading.Event(), threading.Event()
        self._threads = [
            threading.Thread(target=self._serve, name=f"job-{n}", daemon=True) for n in range(worker_threads)
        ]

    def recover(self) -> None:
        """Puts right what a killed process left RUNNING. Call it before `start`.

        Everything is done again from its request: until `commit_edit`, one transaction, nothing of a job can be seen.
        Deltas and artifacts of an edit that did not get there are harmless: no version names them, a delta is stored
        under its own hash and artifacts under the edit's id, so the next attempt writes the same files or others
        whole. A job that was running at three crashes fails with INTERRUPTED.
        """
        for job in self._ledger.running():
            if job.attempt < _MOST_ATTEMPTS:
                _log.warning("%s was interrupted; it is queued again", _name(job))
                self._end(partial(self._ledger.requeue, job.id))
            else:
                failure = Failure(
                    reason="INTERRUPTED",
                    message=f"the server ended {job.attempt} times while it worked on this; look at its log for what "
                    "the job needs, memory for instance, and ask for less at once",
                )
                self._end(partial(self._ledger.finish, job.id, JobState.FAILED, failure=failure))

    def start(self) -> None:
        """Begins to work, on what is queued already first."""
        for thread in self._threads:
            thread.start()

    def notify(self) -> None:
        """Says that a job was queued. May be called from any thread; never blocks."""
        with self._ring:
            self._rung += 1
            self._ring.notify_all()

    def stop(self, drain_seconds: float) -> None:
        """Takes no new job; those running have `drain_seconds` to end, and are then stopped and queued again.

        One that does not stop in time stays RUNNING, and `recover` finds it at the next start.
        """
        self._stopping.set()
        self.notify()
        self._join(drain_seconds)
        self._interrupting.set()
        self._join(_GRACE)
        for thread in self._threads:
            if thread.is_alive():
                _log.warning("%s did not stop in time; its job is taken up again at the next start", thread.name)

    @property
    def running(self) -> bool:
        """Whether any worker is alive."""
        return any(t.is_alive() for t in self._threads)

    def _join(self, seconds: float) -> None:
        until = monotonic() + seconds
        for thread in self._threads:
            if thread.ident is not None:
                thread.join(max(0.0, until - monotonic()))

    def _serve(self) -> None:
        while (job := self._next()) is not None:
            try:
                self._run(job)
            finally:
                with self._claiming:
                    self._busy -= {(kind, job.model) for kind in MAKERS if job.kind in MAKERS}
                self.notify()  # the model's next edit may have waited for this one

    def _next(self) -> JobRow | None:
        """The next job, once there is one; None when the server ends."""
        wait = 1.0
        while not self._stopping.is_set():
            with self._ring:
                rung = self._rung
            try:
                if job := self._claim():
                    return job
                timeout = None
            except Exception:
                _log.exception("the ledger could not be asked for work; trying again in %.0f s", wait)
                timeout, wait = wait, min(2 * wait, _MOST_WAIT)
            with self._ring:
                # What rang since the ledger was asked is not lost, nor the end where it rang before.
                self._ring.wait_for(lambda rung=rung: self._rung != rung or self._stopping.is_set(), timeout)  # type: ignore[misc]
        return None

    def _claim(self) -> JobRow | None:
        with self._claiming:
            job = self._ledger.claim(tuple(JobKind), self._busy)
            if job and job.kind in MAKERS:
                self._busy |= {(kind, job.model) for kind in MAKERS}
            return job

    def _run(self, row: JobRow) -> None:
        _log.info("%s begins, attempt %d", _name(row), row.attempt, extra={"operation": _name(row)})
        self._end(self._worked(row))

    def _worked(self, row: JobRow) -> Callable[[], JobRow]:
        """Works on a job; gives back what is then to be written in the ledger."""
        job = RunningJob(row, self._ledger, changed=self._events.changed, interrupted=self._interrupting.is_set)
        try:
            self._work[row.kind](job)
            return partial(self._ledger.job, row.kind, row.model, row.id)
        except CancelledError:
            return partial(self._stopped, row.id)
        except LedgerUnavailableError as error:
            return partial(self._set_aside, row, error)
        except ErrataError as error:
            return partial(self._ledger.finish, row.id, JobState.FAILED, failure=failure_of(error))
        except Exception:
            _log.exception("%s failed", _name(row), extra={"operation": _name(row)})
            failure = Failure(
                reason="INTERNAL", message=f"{_name(row)} failed inside the server; the server's log says why"
            )
            return partial(self._ledger.finish, row.id, JobState.FAILED, failure=failure)

    def _stopped(self, job_id: str) -> JobRow:
        """A job that the server's end stopped waits again, unless it was to be cancelled, too."""
        if self._interrupting.is_set():
            return self._ledger.requeue(job_id)
        return self._ledger.finish(job_id, JobState.CANCELLED)

    def _set_aside(self, row: JobRow, error: LedgerUnavailableError) -> JobRow:
        """A job that only the ledger's absence stopped waits again, as after a crash; not for ever, either."""
        if row.attempt < _MOST_ATTEMPTS:
            return self._ledger.requeue(row.id)
        return self._ledger.finish(row.id, JobState.FAILED, failure=failure_of(error))

    def _end(self, write: Callable[[], JobRow]) -> None:
        """Writes how a job ended, again and again while that fails, until the server ends: then `recover` does it."""
        wait = 1.0
        while True:
            try:
                row = write()
                break
            except Exception:
                _log.exception("the ledger could not be written; trying again in %.0f s", wait)
            if self._stopping.wait(wait):
                return
            wait = min(2 * wait, _MOST_WAIT)
        self._events.changed(row.id)
        _log.info("%s: %s%s", _name(row), row.state, f", {row.failure}" if row.failure else "")
        if row.state.ended:
            self._ended(row)


def failure_of(error: ErrataError) -> Failure:
    """An error raised on purpose, as a job keeps it."""
    message = str(error.args[0]) if error.args else str(error)
    return Failure(reason=reason_of(error), message=message, field=getattr(error, "field", ""))


def _name(row: JobRow) -> str:
    return job_name(row.kind, row.model, row.id)
