"""Requests in flight, as the engine's two threads hand them on. Knows nothing about the threads."""

from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from errata.editor.mixed import VersionFactors
from errata.editor.model import Encoded
from errata.server.engine.batch import Row
from errata.server.engine.handle import GenerationHandle
from errata.server.engine.requests import CandidateScore, Generation, Scoring
from errata.server.engine.text import TextStream


@dataclass(slots=True, kw_only=True, eq=False)
class Work(ABC):
    """A request in flight; made by the caller, filled in by the preparing thread, ended by the engine."""

    submitted: float
    deadline: float | None
    ended: bool = False
    tokens: int = 0

    @abstractmethod
    def withdrawn(self) -> bool:
        """Whether the caller no longer wants it."""

    @abstractmethod
    def end(self, outcome: Exception) -> None:
        """Tells the caller what ended it."""


@dataclass(slots=True, kw_only=True, eq=False)
class Answering(Work):
    """A generation: its row of the batch, and its text so far. `limit`: tokens it may have."""

    request: Generation
    handle: GenerationHandle
    limit: int = 0
    row: Row | None = None
    text: TextStream | None = None
    log_probability: float = 0.0

    @property
    def shape(self) -> tuple[int, Hashable]:
        """Prompts of one shape are read together."""
        assert self.row is not None
        return self.row.encoded.shape

    def withdrawn(self) -> bool:
        """See Work."""
        return self.handle.cancelled

    def end(self, outcome: Exception) -> None:
        """See Work."""
        self.handle.end(outcome)


@dataclass(slots=True, kw_only=True, eq=False)
class Judging(Work):
    """A scoring: every candidate after the prompt, and the scores of those that are done."""

    request: Scoring
    future: Future[list[CandidateScore]]
    rows: Sequence[Encoded] = field(default=(), repr=False)
    version: VersionFactors | None = None
    scores: list[float] = field(default_factory=list)
    chunks: Iterator[list[float]] | None = None

    def withdrawn(self) -> bool:
        """See Work."""
        return self.future.cancelled()

    def end(self, outcome: Exception) -> None:
        """See Work."""
        # Fails where the caller cancelled it meanwhile; nobody waits for it then.
        if self.future.running() or self.future.set_running_or_notify_cancel():
            self.future.set_exception(outcome)
