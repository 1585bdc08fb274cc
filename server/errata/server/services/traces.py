"""Causal traces."""

from asyncio import to_thread
from collections.abc import AsyncIterator
from contextlib import aclosing

from errata.server.conversion import Decoder, planned_trace, trace_message
from errata.server.ledger.rows import JobKind, JobRow
from errata.server.names import version_ref
from errata.server.services.calls import Context
from errata.server.services.jobs import Jobs, Queue
from errata.v1 import trace_pb2, trace_pb2_grpc


class TraceService(trace_pb2_grpc.TraceServiceServicer):
    """Traces are checked and queued here; `jobs.traces` does them."""

    def __init__(self, queue: Queue, decoder: Decoder) -> None:
        self._jobs, self._decoder = Jobs(JobKind.TRACE, queue), decoder

    async def CreateTrace(  # noqa: N802
        self, request: trace_pb2.CreateTraceRequest, context: Context
    ) -> trace_pb2.CreateTraceResponse:
        """Queues a trace."""
        return trace_pb2.CreateTraceResponse(trace=await to_thread(self._create, request))

    async def GetTrace(  # noqa: N802
        self, request: trace_pb2.GetTraceRequest, context: Context
    ) -> trace_pb2.GetTraceResponse:
        """One trace, with its effects."""
        return trace_pb2.GetTraceResponse(trace=trace_message(await self._jobs.get(request.name)))

    async def ListTraces(  # noqa: N802
        self, request: trace_pb2.ListTracesRequest, context: Context
    ) -> trace_pb2.ListTracesResponse:
        """A model's traces, the newest first."""
        rows, token = await self._jobs.page("ListTraces", request)
        return trace_pb2.ListTracesResponse(traces=map(_listed, rows), next_page_token=token)

    async def CancelTrace(  # noqa: N802
        self, request: trace_pb2.CancelTraceRequest, context: Context
    ) -> trace_pb2.CancelTraceResponse:
        """Asks a trace to stop."""
        return trace_pb2.CancelTraceResponse(trace=trace_message(await self._jobs.cancel(request.name)))

    async def WatchTrace(  # noqa: N802
        self, request: trace_pb2.WatchTraceRequest, context: Context
    ) -> AsyncIterator[trace_pb2.WatchTraceResponse]:
        """The trace now and at each change, until it has ended."""
        async with aclosing(self._jobs.watch(request.name)) as rows:
            async for row in rows:
                yield trace_pb2.WatchTraceResponse(trace=trace_message(row))

    def _create(self, request: trace_pb2.CreateTraceRequest) -> trace_pb2.CausalTrace:
        if first := self._jobs.repeated(version_ref(request.version, "version").model, request):
            return trace_message(first)
        pinned = self._decoder.pinned(request)
        order = self._decoder.trace(pinned)
        version = self._jobs.resolved(order.version, "version")
        planned = planned_trace(pinned, version.model, version.number)
        if order.validate_only:
            return planned
        pinned.version = planned.version
        return trace_message(self._jobs.create(version, pinned, order.request_id, planned, sent=request))


def _listed(row: JobRow) -> trace_pb2.CausalTrace:
    message = trace_message(row, full=False)
    message.MergeFromString(row.summary)
    return message
