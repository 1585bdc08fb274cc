"""A job while a thread works on it: it says how far it is, and hears whether to go on."""

import logging
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager, nullcontext
from typing import TypeVar

from errata.editor.errors import CancelledError
from errata.editor.model import EditableModel
from errata.server.errors import LedgerUnavailableError
from errata.server.ledger.ledger import Ledger
from errata.server.ledger.rows import JobRow

T = TypeVar("T")

_log = logging.getLogger(__name__)

INTERVAL = 0.2
"""Seconds between two writes of a stage's progress, and between two looks at whether to stop."""


class RunningJob:
    """One job, in one thread.

    `interrupted` says whether the server is shutting down and has waited long enough; `changed` wakes watchers.
    """

    def __init__(
        self,
        row: JobRow,
        ledger: Ledger,
        *,
        changed: Callable[[str], None],
        interrupted: Callable[[], bool],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.row = row
        self._ledger, self._changed, self._interrupted, self._clock = ledger, changed, interrupted, clock
        self._stage, self._total, self._passes = "", 0, 0
        self._written = self._looked = -INTERVAL
        self._asked_to_stop = False

    def stage(self, stage: str, total: int = 0) -> None:
        """A new stage, of `total` steps; 0 where that is not known: then forward passes are counted (`watching`).

        Raises CancelledError where the job is to stop.
        """
        self.check(now=True)
        self._stage, self._total, self._passes = stage, total, 0
        self._write(0, total)

    def step(self, done: int, total: int) -> None:
        """How far the stage is; written at most every `INTERVAL`, and when it is done."""
        if done == total or self._clock() - self._written >= INTERVAL:
            self._write(done, total)

    def _write(self, done: int, total: int) -> None:
        with _bearing_an_outage():
            self._ledger.progress(self.row.id, self._stage, done, total)
        self._written = self._clock()
        self._changed(self.row.id)

    def cancelled(self, *, now: bool = False) -> bool:
        """Whether to stop: somebody asked for it, or the server ends. The ledger is asked `now` or every `INTERVAL`."""
        if not self._asked_to_stop and (now or self._clock() - self._looked >= INTERVAL):
            with nullcontext() if now else _bearing_an_outage():
                self._asked_to_stop = self._ledger.cancel_requested(self.row.id)
            self._looked = self._clock()
        return self._asked_to_stop or self._interrupted()

    def check(self, *, now: bool = False) -> None:
        """Raises CancelledError where `cancelled`."""
        if self.cancelled(now=now):
            raise CancelledError("stopped on request; nothing was changed")

    def result_of(self, future: "Future[T]") -> T:
        """A future's result; raises CancelledError where the job is to stop before it is there."""
        while not future.done():
            self.check()
            wait([future], timeout=INTERVAL)
        return future.result()

    @contextmanager
    def watching(self, model: EditableModel) -> Iterator[EditableModel]:
        """While open, no forward pass of `model` begins once the job is to stop: work without callbacks ends, too."""

        def before_forward(*_: object) -> None:
            self.check()
            if not self._total:
                self._passes += 1
                self.step(self._passes, 0)

        handle = model.model.register_forward_pre_hook(before_forward)
        try:
            yield model
        finally:
            handle.remove()


@contextmanager
def _bearing_an_outage() -> Iterator[None]:
    """Hours of work are not given up because nobody can be told how far it is. What it comes to must be written."""
    try:
        yield
    except LedgerUnavailableError:
        _log.warning("the ledger does not answer; the job goes on")
