"""The work of a derivation: one delta made of deltas, judged by the probes of the edits concerned, and its version.

Until the one transaction in the ledger nothing of it can be seen, so it can be stopped anywhere and done again.

Whose probes judge it: those of all edits concerned that it does not take away. For a revert these are the edits made on
top of the reverted one, and what it brings back. The reverted one's own probes are asked and told: what is right there
is what the version before that edit answers. They judge where nothing else does, as what was installed has to be gone;
below later edits they count for nothing, as a later one may have changed the same answers.
"""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import reduce
from operator import add
from pathlib import Path

from errata.editor.adapters import read_adapter
from errata.editor.delta import Delta, applied, check_base, check_fit, empty_delta
from errata.editor.errors import CorruptDeltaError
from errata.editor.evaluation import Evaluation, Probe, next_token_logits
from errata.editor.methods import Method, edit
from errata.editor.model import EditableModel, same_answer
from errata.editor.requests import EditRequest
from errata.server.conversion import (
    Decoder,
    EditOrder,
    configured_guardrails,
    probe_result_message,
    score_message,
)
from errata.server.conversion.history import (
    ComposeOrder,
    DerivationOrder,
    ImportOrder,
    RebaseOrder,
    RevertOrder,
    SquashOrder,
    derivation_order,
    history_summary,
)
from errata.server.errors import EditsConflictError, MalformedError
from errata.server.jobs.artifacts import derivation_files
from errata.server.jobs.comparison import compare
from errata.server.jobs.conflicts import Asked, joined, suffering, superseded
from errata.server.jobs.edits import own_probes
from errata.server.jobs.guardrails import in_force, misses
from errata.server.jobs.lineages import Made, Part
from errata.server.jobs.plans import Plan, Planner
from errata.server.jobs.publishing import Publisher
from errata.server.jobs.running import RunningJob
from errata.server.ledger.ledger import Ledger
from errata.server.ledger.rows import Failure, JobState, VersionRow
from errata.server.models import LoadedModel, Models
from errata.server.names import version_name
from errata.server.store import DeltaStore
from errata.v1 import history_pb2


@dataclass(frozen=True, slots=True, kw_only=True)
class Sources:
    """Where the parts of a derivation are looked up."""

    models: Models
    deltas: DeltaStore
    decoder: Decoder


@dataclass(frozen=True, slots=True, kw_only=True)
class _Owned:
    """A probe and the part whose edit it belongs to; None: the request's own."""

    probe: Probe
    part: Part | None


class DerivationWork:
    """Makes one version of others."""

    def __init__(self, ledger: Ledger, sources: Sources, publish: Publisher) -> None:
        self._ledger, self._sources, self._publish = ledger, sources, publish
        self._planner = Planner(ledger, sources.models)

    def __call__(self, job: RunningJob) -> None:
        """Ends the job SUCCEEDED or REJECTED with a version, or FAILED by conflicts. Raises what else stops it."""
        message = history_pb2.CreateDerivationRequest.FromString(job.row.request)
        order = derivation_order(message, self._sources.decoder)
        plan = self._planner.plan(self._ledger.version(job.row.model, job.row.version), order.operation)
        job.stage("loading")
        loaded = job.result_of(self._sources.models.load(job.row.model))
        made = _Derived(self._sources, job, loaded, order, plan)
        with loaded.borrow() as model, job.watching(model):
            delta = made.solve(model)
            if made.outcome.conflicts and not order.allow_conflicts:
                self._fail(job, made.outcome)
                return
            evaluation = made.judge(model, delta)
        job.stage("publish")
        outcome = made.outcome
        self._publish(
            job,
            loaded,
            delta,
            derivation_files(evaluation, message, outcome),
            facts=plan.facts,
            scores=evaluation.scores,
            rejections=tuple(outcome.rejections),
            result=outcome.SerializeToString(deterministic=True),
            summary=history_summary(outcome),
            alias=message.alias,
        )

    def _fail(self, job: RunningJob, outcome: history_pb2.Derivation) -> None:
        pairs = "; ".join(f"{_said(c.first)} and {_said(c.second)}" for c in outcome.conflicts[:3])
        more = f", and {len(outcome.conflicts) - 3} more" if len(outcome.conflicts) > 3 else ""
        failure = Failure(
            reason=EditsConflictError.reason,
            message=f"edits conflict: {pairs}{more}; leave one of each pair out, or allow conflicts. Nothing was made",
        )
        self._ledger.finish(
            job.row.id,
            JobState.FAILED,
            result=outcome.SerializeToString(deterministic=True),
            failure=failure,
            summary=history_summary(outcome),
        )


class _Derived:
    """A derivation on its way: first its delta and conflicts, then what it does to the parent; told in `outcome`."""

    def __init__(
        self, sources: Sources, job: RunningJob, loaded: LoadedModel, order: DerivationOrder, plan: Plan
    ) -> None:
        self._sources, self._job, self._loaded, self._order, self._plan = sources, job, loaded, order, plan
        self._parent = loaded.deltas_of(plan.parent.number)
        self._decoded: dict[str, EditOrder] = {}
        self.outcome = plan.message()

    def solve(self, model: EditableModel) -> Delta:
        """Makes the delta, and looks for conflicts where deltas are added that did not know each other."""
        self._job.stage("solve")
        delta = self._delta(model)
        if not delta.layers:
            raise MalformedError(
                "the deltas cancel: nothing is left to make a version of", field="operation", reason="NOTHING_TO_DERIVE"
            )
        self.outcome.layers.extend(delta.layers)
        if isinstance(self._plan.operation, ComposeOrder | RebaseOrder):
            self._job.stage("conflicts")
            found = self._conflicts(model, delta)
            del self.outcome.conflicts[:]
            self.outcome.conflicts.extend(found)
        return delta

    def _delta(self, model: EditableModel) -> Delta:
        match self._plan.operation:
            case ImportOrder() as order:
                return _imported(order, model)
            case SquashOrder(resolve=True):
                return self._solved_again(model)
            case SquashOrder():
                return self._sum().compressed()
            case _:
                return self._sum()

    def _sum(self) -> Delta:
        return reduce(add, (self._delta_of(part) * self._plan.weight for part in self._plan.parts))

    def _delta_of(self, part: Part) -> Delta:
        """A part's own delta, bound to the parent's base. Raises DeltaError where it does not fit."""
        delta = self._sources.deltas.get(part.row.delta_sha256)
        if part.row.model != self._loaded.name:
            delta = replace(delta, base_sha256=self._loaded.base.base_sha256)
            check_fit(delta, self._loaded.base)
        check_base(delta, self._loaded.base)
        return delta

    def judge(self, model: EditableModel, delta: Delta) -> Evaluation:
        """Asks parent and child, and fills in the outcome."""
        self._job.stage("evaluate")
        plan, outcome = self._plan, self.outcome
        judged = self._judging()
        reverted: list[Probe] = []
        if isinstance(plan.operation, RevertOrder):
            reverted = self._reverted(model)
            if not plan.judging:
                judged += [_Owned(probe=probe, part=plan.parts[0]) for probe in reverted]
        after = (*self._parent, delta)
        evaluation = compare(model, [o.probe for o in judged], self._parent, after)
        least = in_force(configured_guardrails(self._loaded.settings.guardrails), self._order.guardrails)
        outcome.scores.extend(map(score_message, evaluation.scores))
        outcome.rejections.extend(misses(evaluation.scores, least))
        owner = {id(o.probe): o.part for o in judged}
        for part in plan.later:
            mine = replace(evaluation, results=tuple(r for r in evaluation.results if owner[id(r.probe)] is part))
            later = outcome.later.add(version=_name(part.row), facts=part.row.facts)
            later.scores.extend(map(score_message, mine.scores))
        if reverted:
            asked = compare(model, reverted, self._parent, after)
            outcome.reverted.extend(map(probe_result_message, asked.results))
        if isinstance(plan.operation, SquashOrder):
            outcome.equality.CopyFrom(self._equality(model, [o.probe for o in judged], delta))
        return evaluation

    def _orders(self, part: Part) -> list[tuple[Made, EditOrder]]:
        for made in part.edits:
            if made.edit not in self._decoded:
                self._decoded[made.edit] = self._sources.decoder.edit(made.request)
        return [(made, self._decoded[made.edit]) for made in part.edits]

    def _judging(self) -> list[_Owned]:
        """All that judges it. An answer that a later edit replaced, knowing it, is not expected any more."""
        gone = superseded(self._plan.judging)
        owned = [
            _Owned(probe=probe, part=part)
            for part in self._plan.judging
            for made, order in self._orders(part)
            for probe in _probes(order)
            if probe.expected is None or (made.edit, probe.request) not in gone
        ]
        return [*owned, *(_Owned(probe=probe, part=None) for probe in self._order.probes)]

    def _reverted(self, model: EditableModel) -> list[Probe]:
        """The reverted edit's probes, each expecting what was answered before that edit."""
        [part] = self._plan.parts
        probes = [probe for _, order in self._orders(part) for probe in _probes(order)]
        with applied(model, *self._loaded.deltas_of(part.row.parent or 0)):
            answers = model.generate([p.prompt for p in probes])
        return [replace(p, expected=a.text, believed=None) for p, a in zip(probes, answers, strict=True)]

    def _conflicts(self, model: EditableModel, delta: Delta) -> list[history_pb2.Conflict]:
        plan = self._plan
        parts = (*plan.standing, *plan.parts)
        deltas = {id(part): self._delta_of(part) for part in parts}
        gone = superseded(plan.judging)
        questions = [
            (part, request, decoded)
            for part in plan.judging
            for made, order in self._orders(part)
            for request, decoded in zip(made.request.requests, order.requests, strict=True)
            if (made.edit, request.name) not in gone
        ]
        own = self._own_answers(model, [(part, decoded) for part, _, decoded in questions])
        with applied(model, *self._parent, delta):
            composed = model.generate([decoded.contexts[0].prompt for _, _, decoded in questions])
        asked = [
            Asked(part=part, request=request, own=mine, composed=answer.text)
            for (part, request, _), mine, answer in zip(questions, own, composed, strict=True)
        ]

        def delta_of(part: Part) -> Delta:
            return deltas[id(part)]

        return joined(plan.conflicts, list(suffering(asked, parts, delta_of)), parts, delta_of)

    def _own_answers(self, model: EditableModel, questions: Sequence[tuple[Part, EditRequest]]) -> list[str]:
        """Each first question's answer by the version that knows the edit: the parent for what stands there."""
        standing = {id(part) for part in self._plan.standing}
        knowing = [
            self._plan.parent if id(part) in standing else self._plan.answers_as or part.row for part, _ in questions
        ]
        answers = [""] * len(questions)
        for model_name, number in dict.fromkeys((row.model, row.number) for row in knowing):
            mine = [i for i, row in enumerate(knowing) if (row.model, row.number) == (model_name, number)]
            with self._answering(model, model_name, number) as asked:
                told = asked.generate([questions[i][1].contexts[0].prompt for i in mine])
            for i, answer in zip(mine, told, strict=True):
                answers[i] = answer.text
        return answers

    @contextmanager
    def _answering(self, model: EditableModel, name: str, number: int) -> Iterator[EditableModel]:
        """While open, a model that answers as a version, which may be another model's."""
        if name == self._loaded.name:
            with applied(model, *self._loaded.deltas_of(number)):
                yield model
            return
        other = self._job.result_of(self._sources.models.load(name))
        with other.borrow() as borrowed, self._job.watching(borrowed), applied(borrowed, *other.deltas_of(number)):
            yield borrowed

    def _equality(self, model: EditableModel, probes: Sequence[Probe], delta: Delta) -> history_pb2.Equality:
        prompts = [p.prompt for p in probes]
        chain = self._sum()
        with applied(model, *self._parent, chain):
            before, said = next_token_logits(model, prompts), model.generate(prompts)
        with applied(model, *self._parent, delta):
            after, says = next_token_logits(model, prompts), model.generate(prompts)
        differences = (float((a - b).abs().max()) for a, b in zip(after, before, strict=True))
        return history_pb2.Equality(
            max_logit_difference=max(differences, default=0.0),
            n=len(prompts),
            same_answers=sum(a.text == b.text for a, b in zip(said, says, strict=True)),
            rank_before=sum(chain.ranks.values()),
            rank_after=sum(delta.ranks.values()),
        )

    def _solved_again(self, model: EditableModel) -> Delta:
        """All requests of the chain in one batch, as the newest edit was made: its method, settings and layers.

        A request that a later one tells another answer is left out, and one whose answer the parent gives already.
        """
        plan = self._plan
        orders = [(part, made, order) for part in plan.parts for made, order in self._orders(part)]
        gone = superseded(plan.parts)
        asked = [(part, r) for part, made, order in orders for r in order.requests if (made.edit, r.name) not in gone]
        with applied(model, *self._parent):
            answers = model.generate([r.contexts[0].prompt for _, r in asked])
        requests = [
            replace(r, name=f"{r.name} ({part.row.number})")
            for (part, r), answer in zip(asked, answers, strict=True)
            if not same_answer(answer.text, r.contexts[0].answer or r.target)
        ]
        if not requests:
            return empty_delta(model)
        settings = replace(orders[-1][-1].settings, layers=plan.parts[-1].row.layers)
        statistics = None
        if settings.method is not Method.MULTEDIT:
            references = [context for *_, order in orders for context in order.references]
            statistics = self._loaded.statistics(model, settings.layers, references, progress=self._job.step)
        parent = self._loaded.composed(plan.parent.number)
        return edit(model, requests, settings, statistics, parent=parent, cancelled=self._job.cancelled).delta


def _probes(order: EditOrder) -> tuple[Probe, ...]:
    return (*own_probes(order.requests), *order.probes)


def _imported(order: ImportOrder, model: EditableModel) -> Delta:
    """The adapter's delta. Raises DeltaError and its kinds for one that is not this model's."""
    with tempfile.TemporaryDirectory() as scratch:
        files = {
            "errata.json": order.manifest,
            "adapter_config.json": order.config,
            "adapter_model.safetensors": order.weights,
        }
        for name, data in files.items():
            if data:
                Path(scratch, name).write_bytes(data)
        try:
            return read_adapter(Path(scratch), model, base_sha256=order.base_sha256)
        except CorruptDeltaError as error:
            # Where it lay for a moment is nobody's business.
            raise CorruptDeltaError(str(error).replace(scratch, "the upload")) from None


def _name(row: VersionRow) -> str:
    return version_name(row.model, row.number)


def _said(fact: history_pb2.VersionFact) -> str:
    return f"{fact.fact!r} ({fact.version})"
