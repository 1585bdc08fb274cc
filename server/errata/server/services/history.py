"""The history of versions: made of one another, compared and searched."""

import threading
from asyncio import get_running_loop, shield, to_thread, wrap_future
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing

from errata.editor.delta import Delta, empty_delta
from errata.editor.errors import CancelledError
from errata.editor.evaluation import Metric, Probe
from errata.editor.quantization import dense_weight
from errata.server.conversion import Decoder
from errata.server.conversion.history import (
    ComparisonOrder,
    bisection_message,
    bisection_order,
    comparison_order,
    derivation_message,
    derivation_order,
    history_summary,
)
from errata.server.errors import MalformedError
from errata.server.jobs.answering import answers
from errata.server.jobs.lineages import Lineages
from errata.server.jobs.plans import Plan, Planner
from errata.server.ledger.rows import JobKind, VersionRow
from errata.server.models import LoadedModel
from errata.server.names import version_name, version_ref
from errata.server.security import Role
from errata.server.services.calls import Context, caller
from errata.server.services.jobs import Jobs, Queue
from errata.server.store import DeltaStore
from errata.v1 import history_pb2, history_pb2_grpc

_MOST_PROBES = 1000

_COMPARISONS = 4
"""At once; others wait. In threads of their own: each takes long, and every call's admission needs a common one."""


class HistoryService(history_pb2_grpc.HistoryServiceServicer):
    """Derivations and bisections are checked and queued here; `jobs` does them. Comparisons are answered at once."""

    def __init__(self, queue: Queue, decoder: Decoder, deltas: DeltaStore) -> None:
        self._derivations, self._bisections = Jobs(JobKind.DERIVATION, queue), Jobs(JobKind.BISECTION, queue)
        self._decoder, self._deltas, self._models, self._ledger = decoder, deltas, queue.models, queue.ledger
        self._planner, self._lineages = Planner(queue.ledger, queue.models), Lineages(queue.ledger)
        self._comparing = ThreadPoolExecutor(_COMPARISONS, thread_name_prefix="compare")

    async def CreateDerivation(  # noqa: N802
        self, request: history_pb2.CreateDerivationRequest, context: Context
    ) -> history_pb2.CreateDerivationResponse:
        """Queues a derivation."""
        return history_pb2.CreateDerivationResponse(derivation=await to_thread(self._derive, request))

    async def GetDerivation(  # noqa: N802
        self, request: history_pb2.GetDerivationRequest, context: Context
    ) -> history_pb2.GetDerivationResponse:
        """One derivation, with its conflicts and later edits."""
        row = await self._derivations.get(request.name)
        return history_pb2.GetDerivationResponse(derivation=derivation_message(row))

    async def ListDerivations(  # noqa: N802
        self, request: history_pb2.ListDerivationsRequest, context: Context
    ) -> history_pb2.ListDerivationsResponse:
        """A model's derivations, the newest first."""
        rows, token = await self._derivations.page("ListDerivations", request)
        return history_pb2.ListDerivationsResponse(derivations=map(derivation_message, rows), next_page_token=token)

    async def CancelDerivation(  # noqa: N802
        self, request: history_pb2.CancelDerivationRequest, context: Context
    ) -> history_pb2.CancelDerivationResponse:
        """Asks a derivation to stop."""
        row = await self._derivations.cancel(request.name)
        return history_pb2.CancelDerivationResponse(derivation=derivation_message(row))

    async def WatchDerivation(  # noqa: N802
        self, request: history_pb2.WatchDerivationRequest, context: Context
    ) -> AsyncIterator[history_pb2.WatchDerivationResponse]:
        """The derivation now and at each change, until it has ended."""
        async with aclosing(self._derivations.watch(request.name)) as rows:
            async for row in rows:
                yield history_pb2.WatchDerivationResponse(derivation=derivation_message(row))

    async def CreateBisection(  # noqa: N802
        self, request: history_pb2.CreateBisectionRequest, context: Context
    ) -> history_pb2.CreateBisectionResponse:
        """Queues a search."""
        return history_pb2.CreateBisectionResponse(bisection=await to_thread(self._bisect, request))

    async def GetBisection(  # noqa: N802
        self, request: history_pb2.GetBisectionRequest, context: Context
    ) -> history_pb2.GetBisectionResponse:
        """One search, with its steps so far."""
        row = await self._bisections.get(request.name)
        return history_pb2.GetBisectionResponse(bisection=bisection_message(row))

    async def ListBisections(  # noqa: N802
        self, request: history_pb2.ListBisectionsRequest, context: Context
    ) -> history_pb2.ListBisectionsResponse:
        """A model's searches, the newest first."""
        rows, token = await self._bisections.page("ListBisections", request)
        return history_pb2.ListBisectionsResponse(bisections=map(bisection_message, rows), next_page_token=token)

    async def CancelBisection(  # noqa: N802
        self, request: history_pb2.CancelBisectionRequest, context: Context
    ) -> history_pb2.CancelBisectionResponse:
        """Asks a search to stop."""
        row = await self._bisections.cancel(request.name)
        return history_pb2.CancelBisectionResponse(bisection=bisection_message(row))

    async def WatchBisection(  # noqa: N802
        self, request: history_pb2.WatchBisectionRequest, context: Context
    ) -> AsyncIterator[history_pb2.WatchBisectionResponse]:
        """The search now and at each change, until it has ended."""
        async with aclosing(self._bisections.watch(request.name)) as rows:
            async for row in rows:
                yield history_pb2.WatchBisectionResponse(bisection=bisection_message(row))

    async def CompareVersions(  # noqa: N802
        self, request: history_pb2.CompareVersionsRequest, context: Context
    ) -> history_pb2.CompareVersionsResponse:
        """What two versions differ in."""
        order = await to_thread(comparison_order, request, self._decoder)
        loading = self._models.load(order.first.model)
        # Shielded: others wait for the same model.
        loaded = await shield(wrap_future(loading))
        left = threading.Event()

        def check() -> None:
            if left.is_set():
                raise CancelledError("nobody waits for the comparison any more")

        try:
            return await get_running_loop().run_in_executor(self._comparing, self._compared, order, loaded, check)
        finally:
            left.set()  # a caller that leaves ends this task, but no thread

    def _derive(self, request: history_pb2.CreateDerivationRequest) -> history_pb2.Derivation:
        if first := self._derivations.repeated(version_ref(request.parent, "parent").model, request):
            return derivation_message(first)
        pinned = self._decoder.pinned(request)
        order = derivation_order(pinned, self._decoder)
        if pinned.HasField("rebase"):
            # The gate has looked at the parent's model only.
            caller().require(Role.READER, version_ref(pinned.rebase.version, "rebase.version").model)
        parent = self._derivations.resolved(order.parent, "parent")
        plan = self._planner.plan(parent, order.operation)
        planned = plan.message()
        if order.validate_only:
            return planned
        pinned.parent = planned.parent
        _pin(pinned, plan)
        sources = {part.row.number for part in plan.parts if part.row.model == parent.model}
        summary = history_pb2.Derivation.FromString(history_summary(planned))
        row = self._derivations.create(parent, pinned, order.request_id, summary, sent=request, also=sources)
        made = derivation_message(row)
        if not made.conflicts and not row.state.ended:
            made.conflicts.extend(planned.conflicts)
        return made

    def _bisect(self, request: history_pb2.CreateBisectionRequest) -> history_pb2.Bisection:
        if first := self._bisections.repeated(version_ref(request.bad, "bad").model, request):
            return bisection_message(first)
        pinned = self._decoder.pinned(request)
        order = bisection_order(pinned, self._decoder)
        bad, good = self._bisections.resolved(order.bad, "bad"), self._bisections.resolved(order.good, "good")
        lineage = self._ledger.lineage(bad.model, bad.number)
        if good.number == bad.number:
            raise MalformedError(
                f"`good` and `bad` are both version {bad.number}; name a good one below the bad one",
                field="good",
                reason="NOT_IN_LINEAGE",
            )
        if good.number not in {row.number for row in lineage}:
            raise MalformedError(
                f"version {good.number} is no ancestor of version {bad.number}; name one of its lineage, or leave "
                "`good` out for the base",
                field="good",
                reason="NOT_IN_LINEAGE",
            )
        pinned.bad, pinned.good = _name(bad), _name(good)
        planned = history_pb2.Bisection(bad=pinned.bad, good=pinned.good)
        if order.validate_only:
            return planned
        return bisection_message(self._bisections.create(bad, pinned, order.request_id, planned, sent=request))

    def _compared(
        self, order: ComparisonOrder, loaded: LoadedModel, check: Callable[[], None]
    ) -> history_pb2.CompareVersionsResponse:
        first = self._derivations.resolved(order.first, "first")
        second = self._derivations.resolved(order.second, "second")
        lineages = [self._lineages.of(row.model, row.number) for row in (first, second)]
        shared = {row.number for row in lineages[0]} & {row.number for row in lineages[1]}
        only = [[row for row in rows if row.number not in shared] for rows in lineages]
        probes = order.probes or tuple(self._first_questions([*only[0], *only[1]]))
        asked = [(row.number, probe.prompt) for probe in probes for row in (first, second)]
        told = answers(loaded.engine, asked, check)
        return history_pb2.CompareVersionsResponse(
            first=_name(first),
            second=_name(second),
            only_first=_facts(only[0]),
            only_second=_facts(only[1]),
            layers=_differences(self._difference(loaded, *only), loaded),
            answers=[
                history_pb2.AnswerPair(
                    question=probe.prompt.text,
                    expected=probe.expected or "",
                    first=said,
                    second=says,
                    request=probe.request or "",
                )
                for probe, said, says in zip(probes, told[::2], told[1::2], strict=True)
            ],
        )

    def _difference(
        self, loaded: LoadedModel, only_first: Sequence[VersionRow], only_second: Sequence[VersionRow]
    ) -> Delta:
        """What the second version has more than the first: what both have is left out, so that it cancels exactly."""
        difference = empty_delta(loaded.base)
        for rows, weight in ((only_second, 1.0), (only_first, -1.0)):
            for row in rows:
                difference = difference + self._deltas.get(row.delta_sha256) * weight
        return difference.compressed()

    def _first_questions(self, rows: Sequence[VersionRow]) -> Iterator[Probe]:
        """The first questions of each edit installed or taken away, once, with what it installed: at most 1000."""
        seen: set[str] = set()
        left = _MOST_PROBES
        for made in (made for row in rows for made in self._lineages.concerned(row.model, row.number)):
            if made.edit in seen:
                continue
            seen.add(made.edit)
            for request in self._decoder.edit(made.request).requests[:left]:
                left -= 1
                context = request.contexts[0]
                expected = context.answer or request.target
                yield Probe(metric=Metric.EFFICACY, prompt=context.prompt, expected=expected, request=request.name)


def _pin(request: history_pb2.CreateDerivationRequest, plan: Plan) -> None:
    """Puts numbers in place of the aliases that the operation names: they may move before its turn comes."""
    names = [_name(part.row) for part in plan.parts]
    match request.WhichOneof("operation"):
        case "revert":
            request.revert.version = names[0]
        case "compose":
            request.compose.versions[:] = names
        case "rebase" if plan.answers_as:
            request.rebase.version = _name(plan.answers_as)
        case "squash":
            request.squash.version = names[-1]


def _differences(difference: Delta, loaded: LoadedModel) -> Iterator[history_pb2.LayerDifference]:
    for layer, low in difference.layers.items():
        weight = float(dense_weight(loaded.base.down_projection(layer)).detach().double().norm())
        yield history_pb2.LayerDifference(layer=layer, relative_norm=low.norm() / weight, rank=low.rank)


def _facts(rows: Sequence[VersionRow]) -> list[history_pb2.VersionFact]:
    return [history_pb2.VersionFact(version=_name(row), fact=fact) for row in rows for fact in row.facts or ("",)]


def _name(row: VersionRow) -> str:
    return version_name(row.model, row.number)
