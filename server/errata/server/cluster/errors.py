"""What goes wrong between machines, and how errors come back from them.

ErrataError (errata.editor.errors)
├── ClusterError                     there is no cluster there, or it lacks what is needed
├── WorkFailedError                  a worker failed at a shard in a way that nobody foresaw
└── WorkerLostError                  a shard's workers died, twice
"""

from collections.abc import Mapping
from dataclasses import dataclass

from errata.editor.errors import ErrataError


class ClusterError(ErrataError):
    """The cluster cannot be used."""

    reason = "CLUSTER"


class WorkFailedError(ErrataError):
    """What a worker was given ended with an error that nobody raised on purpose; that worker goes on."""

    reason = "WORK_FAILED"


class WorkerLostError(ErrataError):
    """The worker that had a shard died, and so did the one that had it next."""

    reason = "WORKER_LOST"


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """An error on its way between processes, whole: pickle would call its class with the message alone."""

    kind: type[ErrataError]
    message: tuple[object, ...]
    attributes: Mapping[str, object]

    @classmethod
    def of(cls, error: ErrataError) -> "Fault":
        """The error, to be sent."""
        return cls(kind=type(error), message=error.args, attributes=dict(vars(error)))

    @property
    def error(self) -> ErrataError:
        """The error, as it was raised."""
        made = self.kind.__new__(self.kind, *self.message)
        vars(made).update(self.attributes)
        return made
