"""Evaluations of one version beside another."""

from asyncio import to_thread
from collections.abc import AsyncIterator
from contextlib import aclosing

from errata.server.conversion import Decoder, EvaluationOrder, evaluation_message, planned_evaluation
from errata.server.errors import MalformedError
from errata.server.ledger.rows import JobKind, JobRow, VersionRow
from errata.server.names import version_ref
from errata.server.services.calls import Context
from errata.server.services.jobs import Jobs, Queue
from errata.v1 import evaluation_pb2, evaluation_pb2_grpc


class EvaluationService(evaluation_pb2_grpc.EvaluationServiceServicer):
    """Evaluations are checked and queued here; `jobs.evaluations` does them."""

    def __init__(self, queue: Queue, decoder: Decoder) -> None:
        self._jobs, self._decoder = Jobs(JobKind.EVALUATION, queue), decoder

    async def CreateEvaluation(  # noqa: N802
        self, request: evaluation_pb2.CreateEvaluationRequest, context: Context
    ) -> evaluation_pb2.CreateEvaluationResponse:
        """Queues an evaluation."""
        return evaluation_pb2.CreateEvaluationResponse(evaluation=await to_thread(self._create, request))

    async def GetEvaluation(  # noqa: N802
        self, request: evaluation_pb2.GetEvaluationRequest, context: Context
    ) -> evaluation_pb2.GetEvaluationResponse:
        """One evaluation, with every probe's result."""
        row = await self._jobs.get(request.name)
        return evaluation_pb2.GetEvaluationResponse(evaluation=evaluation_message(row))

    async def ListEvaluations(  # noqa: N802
        self, request: evaluation_pb2.ListEvaluationsRequest, context: Context
    ) -> evaluation_pb2.ListEvaluationsResponse:
        """A model's evaluations, the newest first."""
        rows, token = await self._jobs.page("ListEvaluations", request)
        return evaluation_pb2.ListEvaluationsResponse(evaluations=map(_listed, rows), next_page_token=token)

    async def CancelEvaluation(  # noqa: N802
        self, request: evaluation_pb2.CancelEvaluationRequest, context: Context
    ) -> evaluation_pb2.CancelEvaluationResponse:
        """Asks an evaluation to stop."""
        row = await self._jobs.cancel(request.name)
        return evaluation_pb2.CancelEvaluationResponse(evaluation=evaluation_message(row))

    async def WatchEvaluation(  # noqa: N802
        self, request: evaluation_pb2.WatchEvaluationRequest, context: Context
    ) -> AsyncIterator[evaluation_pb2.WatchEvaluationResponse]:
        """The evaluation now and at each change, until it has ended."""
        async with aclosing(self._jobs.watch(request.name)) as rows:
            async for row in rows:
                yield evaluation_pb2.WatchEvaluationResponse(evaluation=evaluation_message(row))

    def _create(self, request: evaluation_pb2.CreateEvaluationRequest) -> evaluation_pb2.Evaluation:
        if first := self._jobs.repeated(version_ref(request.version, "version").model, request):
            return evaluation_message(first)
        pinned = self._decoder.pinned(request)
        order = self._decoder.evaluation(pinned)
        version = self._jobs.resolved(order.version, "version")
        baseline = self._baseline(order, version)
        planned = planned_evaluation(version.model, version.number, baseline)
        if order.validate_only:
            return planned
        pinned.version, pinned.baseline = planned.version, planned.baseline
        made = self._jobs.create(version, pinned, order.request_id, planned, sent=request, also=(baseline,))
        return evaluation_message(made)

    def _baseline(self, order: EvaluationOrder, version: VersionRow) -> int:
        if order.baseline:
            return self._jobs.resolved(order.baseline, "baseline").number
        if version.parent is None:
            raise MalformedError(
                "the base has no parent to be compared with; name a `baseline`",
                field="baseline",
                reason="MISSING_FIELD",
            )
        return version.parent


def _listed(row: JobRow) -> evaluation_pb2.Evaluation:
    message = evaluation_message(row, full=False)
    message.MergeFromString(row.summary)
    return message
