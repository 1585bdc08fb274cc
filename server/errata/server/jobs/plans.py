"""What a derivation adds up, found out from the ledger alone: before it is queued, and again before it is worked on.

Raises MalformedError whose reason says what cannot be derived, with the field that names it.
"""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from errata.editor.errors import CorruptDeltaError, WrongBaseError
from errata.server.conversion.history import (
    KINDS,
    ComposeOrder,
    ImportOrder,
    Operation,
    RebaseOrder,
    RevertOrder,
    SquashOrder,
    same_model,
)
from errata.server.errors import MalformedError, NotFoundError
from errata.server.jobs.conflicts import contradictions
from errata.server.jobs.lineages import Lineages, Part
from errata.server.ledger.ledger import Ledger
from errata.server.ledger.rows import JobKind, VersionRow
from errata.server.models import Models
from errata.server.names import VersionRef, version_name
from errata.v1 import history_pb2

PROVENANCE = "errata.json"
"""In the folder of a checkpoint that was merged from a version: which deltas it holds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A derivation whose parts are all there.

    `weight` is that of every part's delta. `standing` are the parent's own parts, which must not suffer, `later` those
    that were computed on top of a reverted one, and `judging` all whose edits' probes judge the version made: none that
    is taken away in it. `answers_as` is the version that knows the parts' edits, of another model for a rebase; None:
    each part's own. `conflicts` are those that the requests alone show.
    """

    operation: Operation
    parent: VersionRow
    parts: tuple[Part, ...] = field(repr=False)
    facts: tuple[str, ...]
    weight: float = 1.0
    standing: tuple[Part, ...] = field(default=(), repr=False)
    later: tuple[Part, ...] = field(default=(), repr=False)
    judging: tuple[Part, ...] = field(default=(), repr=False)
    answers_as: VersionRow | None = None
    conflicts: tuple[history_pb2.Conflict, ...] = ()

    def message(self) -> history_pb2.Derivation:
        """The derivation before it has a name."""
        return history_pb2.Derivation(
            parent=version_name(self.parent.model, self.parent.number),
            kind=KINDS[type(self.operation)],
            sources=[version_name(p.row.model, p.row.number) for p in self.parts],
            facts=self.facts,
            conflicts=self.conflicts,
        )


class Planner:
    """Makes plans. Blocks while the ledger is asked."""

    def __init__(self, ledger: Ledger, models: Models) -> None:
        self._ledger, self._models, self._lineages = ledger, models, Lineages(ledger)

    def plan(self, parent: VersionRow, operation: Operation) -> Plan:
        """What the operation does to the parent. Raises MalformedError, NotFoundError, DeltaError."""
        match operation:
            case RevertOrder():
                return self._revert(parent, operation)
            case ComposeOrder():
                return self._compose(parent, operation)
            case RebaseOrder():
                return self._rebase(parent, operation)
            case SquashOrder():
                return self._squash(parent, operation)
            case ImportOrder():
                return self._import(parent, operation)

    def _revert(self, parent: VersionRow, order: RevertOrder) -> Plan:
        where = "revert.version"
        row = self._own(order.version, parent, where)
        lineage = self._lineages.of(parent.model, parent.number)
        if row.number not in {r.number for r in lineage}:
            raise _refused(
                f"version {row.number} is not in the lineage of version {parent.number}; GetLineage names those that "
                "can be reverted there",
                where,
                "NOT_IN_LINEAGE",
            )
        live = self._lineages.live(lineage)
        if row.number not in {r.number for r in live}:
            raise _refused(
                f"version {row.number} was reverted already; to bring it back, revert the version that did",
                where,
                "ALREADY_REVERTED",
            )
        later = tuple(self._lineages.part(r) for r in live if r.number > row.number and not self._lineages.reverts(r))
        back = self._lineages.taken_away(row)
        return Plan(
            operation=order,
            parent=parent,
            parts=(self._lineages.part(row),),
            facts=tuple(f"revert {fact}" for fact in row.facts or (f"version {row.number}",)),
            weight=-1.0,
            later=later,
            judging=(*(self._lineages.part(r) for r in lineage if r.number in back), *later),
        )

    def _compose(self, parent: VersionRow, order: ComposeOrder) -> Plan:
        lineage = self._lineages.of(parent.model, parent.number)
        live = self._lineages.live(lineage)
        held = {made.edit: parent.number for row in live for made in self._lineages.edits(row.model, row.number)}
        ancestors = {row.number for row in lineage}
        parts: list[Part] = []
        for i, ref in enumerate(order.versions):
            where = f"compose.versions[{i}]"
            row = self._own(ref, parent, where)
            if row.number in {p.row.number for p in parts}:
                raise _refused(f"version {row.number} is named twice; add each once", where, "SOURCE_TWICE")
            if row.number in ancestors:
                raise _refused(
                    f"version {row.number} is in the parent's lineage already; where it was reverted there, revert "
                    "the version that did",
                    where,
                    "IN_LINEAGE",
                )
            part = self._lineages.part(row)
            for made in part.edits:
                if made.edit in held:
                    again = held[made.edit] == parent.number
                    raise _refused(
                        f"version {row.number} holds an edit that {'the parent' if again else 'another source'} holds "
                        f"too, through a derivation; its delta would be added twice",
                        where,
                        "IN_LINEAGE" if again else "SOURCE_TWICE",
                    )
            held |= {made.edit: row.number for made in part.edits}
            parts.append(part)
        self._check_taken_away(live, parts)
        # Of the lineage, too, what a part takes away does not stand any more.
        left = {row.number for row in self._lineages.live([*lineage, *(p.row for p in parts)])}
        standing = tuple(self._lineages.part(row) for row in lineage if row.number in left)
        return self._sum(parent, order, parts, standing)

    def _check_taken_away(self, live: Sequence[VersionRow], parts: Sequence[Part]) -> None:
        """Raises where a part would take away what is not there, or what another part takes away, too."""
        there = {row.number for row in live} | {p.row.number for p in parts}
        for i, part in enumerate(parts):
            taken = self._lineages.taken_away(part.row)
            if missing := sorted(taken - there):
                raise _refused(
                    f"version {part.row.number} takes version {missing[0]} away, which neither the parent nor another "
                    "source holds; leave it out",
                    f"compose.versions[{i}]",
                    "NOT_IN_LINEAGE",
                )
            there -= taken

    def _rebase(self, parent: VersionRow, order: RebaseOrder) -> Plan:
        where = "rebase.version"
        if order.version.model == parent.model:
            raise _refused(
                f"the version is of the parent's own model {parent.model!r}; name one of the model that the parent's "
                "checkpoint was merged from, or compose",
                where,
                "NOT_MERGED_FROM",
            )
        row = self._resolved(order.version, where)
        merged = self._merged_into(parent, row, where)
        rest: list[VersionRow] = []
        for each in self._lineages.of(row.model, row.number):
            if merged[each.delta_sha256]:
                merged[each.delta_sha256] -= 1
            else:
                rest.append(each)
        if not rest:
            raise _refused(
                f"all of version {row.number} of {row.model!r} is merged into the parent's checkpoint already",
                where,
                "NOTHING_TO_DERIVE",
            )
        parts = [self._lineages.part(each) for each in rest]
        standing = self._standing(parent)
        held = {made.edit for part in standing for made in part.edits}
        if twice := [p.row.number for p in parts if any(made.edit in held for made in p.edits)]:
            raise _refused(
                f"version {twice[0]} of {row.model!r} was moved to version {parent.number} already; its delta would be "
                "added twice. Rebase onto a version below",
                where,
                "IN_LINEAGE",
            )
        return self._sum(parent, order, parts, standing, answers_as=row)

    def _merged_into(self, parent: VersionRow, row: VersionRow, field: str) -> Counter[str]:
        """The deltas that the parent's checkpoint holds, by their hashes."""
        folder = Path(self._models.settings(parent.model).source)
        try:
            told = json.loads((folder / PROVENANCE).read_text(encoding="utf-8"))
            base, merged = str(told["base_sha256"]), [str(sha256) for sha256 in told["merged"]]
        except (OSError, ValueError, KeyError, TypeError):
            raise _refused(
                f"the checkpoint of model {parent.model!r} does not say what was merged into it ({PROVENANCE} beside "
                "its weights does, where Errata exported it)",
                field,
                "NOT_MERGED_FROM",
            ) from None
        if base != row.base_sha256:
            raise _refused(
                f"the checkpoint of model {parent.model!r} was merged from the base {base[:12]}…, and model "
                f"{row.model!r} stands on {row.base_sha256[:12]}…",
                field,
                "NOT_MERGED_FROM",
            )
        return Counter(merged)

    def _squash(self, parent: VersionRow, order: SquashOrder) -> Plan:
        where = "squash.version"
        row = self._own(order.version, parent, where, base=True)
        lineage = self._ledger.lineage(row.model, row.number)
        if row.number == parent.number or parent.number not in {r.number for r in lineage}:
            raise _refused(
                f"version {row.number} does not descend from version {parent.number}; name one that does",
                where,
                "NOT_IN_LINEAGE",
            )
        chain = [r for r in reversed(lineage) if r.number > parent.number]
        if order.resolve and (derived := [r.number for r in chain if r.made_by is not JobKind.EDIT]):
            raise _refused(
                f"version {derived[0]} of the chain is no edit, so it has no requests to solve again; leave `resolve` "
                "out to add the deltas up",
                "squash.resolve",
                "NOT_ALL_EDITS",
            )
        live = {r.number for r in self._lineages.live(chain)}
        facts = (fact for r in chain if r.number in live for fact in r.facts)
        parts = tuple(map(self._lineages.part, chain))
        judging = tuple(p for p in parts if p.row.number in live)
        return Plan(operation=order, parent=parent, parts=parts, facts=tuple(facts), judging=judging)

    def _import(self, parent: VersionRow, order: ImportOrder) -> Plan:
        try:
            base = str(json.loads(order.manifest)["base_sha256"]) if order.manifest else order.base_sha256
        except (ValueError, KeyError, TypeError, RecursionError):
            raise CorruptDeltaError("adapter.manifest names no base; give the errata.json of an export") from None
        known = self._ledger.model(parent.model).base_sha256
        if known and base != known:
            raise WrongBaseError(
                f"the adapter was made for the base {base[:12]}…, and model {parent.model!r} stands on {known[:12]}…"
            )
        return Plan(operation=order, parent=parent, parts=(), facts=order.facts)

    def _sum(
        self,
        parent: VersionRow,
        operation: Operation,
        parts: Sequence[Part],
        standing: tuple[Part, ...],
        answers_as: VersionRow | None = None,
    ) -> Plan:
        left = {row.number for row in self._lineages.live([p.row for p in parts])}
        live = tuple(p for p in parts if p.row.number in left)
        return Plan(
            operation=operation,
            parent=parent,
            parts=tuple(parts),
            facts=tuple(fact for part in live for fact in part.row.facts),
            standing=standing,
            judging=(*standing, *live),
            answers_as=answers_as,
            conflicts=tuple(contradictions(standing, live)),
        )

    def _standing(self, parent: VersionRow) -> tuple[Part, ...]:
        live = self._lineages.live(self._lineages.of(parent.model, parent.number))
        return tuple(map(self._lineages.part, live))

    def _own(self, ref: VersionRef, parent: VersionRow, field: str, *, base: bool = False) -> VersionRow:
        """A version of the parent's model; the base where `base` allows it."""
        same_model(ref, parent.model, field)
        row = self._resolved(ref, field)
        if row.number == 0 and not base:
            raise _refused(
                "version 0 is the base, which has no delta; name a version that an edit made", field, "IS_BASE"
            )
        return row

    def _resolved(self, ref: VersionRef, field: str) -> VersionRow:
        try:
            self._models.settings(ref.model)
            return self._ledger.resolve(ref.model, ref.number, ref.alias)
        except NotFoundError as error:
            error.field = error.field or field
            raise


def _refused(message: str, field: str, reason: str) -> MalformedError:
    return MalformedError(message, field=field, reason=reason)
