"""What versions are made of: their edits, through any number of derivations. Knows the ledger and its protos only."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from errata.server.ledger.ledger import Ledger
from errata.server.ledger.rows import JobKind, VersionRow
from errata.server.names import version_of
from errata.v1 import edit_pb2, history_pb2


@dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    """An edit by the job that made it, and what was asked of it."""

    edit: str
    request: edit_pb2.CreateEditRequest = field(repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A version whose own delta is one term of a sum, and the edits whose facts that delta installs.

    `knows` are the versions that it was computed on top of, itself included.
    """

    row: VersionRow
    edits: tuple[Made, ...]
    knows: frozenset[int]


class Lineages:
    """Looks versions up. Blocks."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    def of(self, model: str, number: int) -> list[VersionRow]:
        """A version and its ancestors without the base, the oldest first."""
        return [row for row in reversed(self._ledger.lineage(model, number)) if row.number]

    def live(self, rows: Sequence[VersionRow]) -> list[VersionRow]:
        """Those of a lineage, given the oldest first, that no later one of them took away."""
        gone = self._gone([(row.model, row.number) for row in rows])
        return [row for row in rows if row.number not in gone]

    def reverts(self, row: VersionRow) -> bool:
        """Whether a version only takes another one away."""
        done = self._derivation(row.model, row.number)
        return done is not None and done.kind == history_pb2.DERIVATION_KIND_REVERT

    def taken_away(self, row: VersionRow) -> frozenset[int]:
        """The versions of its model, by number, that a version's own delta takes away from what it is added to."""
        return self._taken_away(row.model, row.number)

    def part(self, row: VersionRow) -> Part:
        """A version as one term of a sum."""
        knows = frozenset(r.number for r in self._ledger.lineage(row.model, row.number))
        return Part(row=row, edits=self.edits(row.model, row.number), knows=knows)

    def edits(self, model: str, number: int) -> tuple[Made, ...]:
        """The edits whose facts the version's own delta installs, the oldest first. A revert installs none."""
        job = self._ledger.maker(model, number)
        if job is None:
            return ()
        if job.kind is JobKind.EDIT:
            request = self._ledger.job(job.kind, job.model, job.id).request
            return (Made(edit=job.id, request=edit_pb2.CreateEditRequest.FromString(request)),)
        done = history_pb2.Derivation.FromString(job.summary)
        if done.kind == history_pb2.DERIVATION_KIND_REVERT:
            return ()
        sources = [version_of(name, "version") for name in done.sources]
        gone = self._gone(sources)
        return tuple(made for m, n in sources if n not in gone for made in self.edits(m, n))

    def concerned(self, model: str, number: int) -> tuple[Made, ...]:
        """The edits whose facts the version's own delta installs or takes away."""
        taken = (made for n in sorted(self._taken_away(model, number)) for made in self.concerned(model, n))
        return (*self.edits(model, number), *taken)

    def _gone(self, lineage: Sequence[tuple[str, int]]) -> set[int]:
        """Versions of a lineage, given the oldest first, that later ones took away."""
        gone: set[int] = set()
        # The newest is there; a revert that was itself taken away takes nothing away.
        for model, number in reversed(lineage):
            if number not in gone:
                gone |= self._taken_away(model, number)
        return gone

    def _taken_away(self, model: str, number: int) -> frozenset[int]:
        done = self._derivation(model, number)
        if done is None:
            return frozenset()
        sources = [version_of(name, "version") for name in done.sources]
        if done.kind == history_pb2.DERIVATION_KIND_REVERT:
            return frozenset({sources[0][1]})
        # What one source takes away of another is within the sum; what a rebase takes over is another model's.
        own = [(m, n) for m, n in sources if m == model]
        return frozenset(self._gone(own) - {n for _, n in own})

    def _derivation(self, model: str, number: int) -> history_pb2.Derivation | None:
        job = self._ledger.maker(model, number)
        return history_pb2.Derivation.FromString(job.summary) if job and job.kind is JobKind.DERIVATION else None
