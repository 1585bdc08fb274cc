"""Edits. Each makes a version."""

from asyncio import to_thread
from collections.abc import AsyncIterator
from contextlib import aclosing

from errata.server.conversion import Decoder, EditOrder, edit_message, planned_edit
from errata.server.errors import MalformedError
from errata.server.ledger.rows import JobKind, JobRow, JobState
from errata.server.names import version_ref
from errata.server.services.calls import Context
from errata.server.services.jobs import Jobs, Queue
from errata.v1 import edit_pb2, edit_pb2_grpc


class EditService(edit_pb2_grpc.EditServiceServicer):
    """Edits are checked and queued here; `jobs.edits` does them."""

    def __init__(self, queue: Queue, decoder: Decoder) -> None:
        self._jobs, self._decoder = Jobs(JobKind.EDIT, queue), decoder

    async def CreateEdit(  # noqa: N802
        self, request: edit_pb2.CreateEditRequest, context: Context
    ) -> edit_pb2.CreateEditResponse:
        """Queues an edit."""
        return edit_pb2.CreateEditResponse(edit=await to_thread(self._create, request))

    async def GetEdit(  # noqa: N802
        self, request: edit_pb2.GetEditRequest, context: Context
    ) -> edit_pb2.GetEditResponse:
        """One edit, with its outcomes."""
        return edit_pb2.GetEditResponse(edit=edit_message(await self._jobs.get(request.name)))

    async def ListEdits(  # noqa: N802
        self, request: edit_pb2.ListEditsRequest, context: Context
    ) -> edit_pb2.ListEditsResponse:
        """A model's edits, the newest first."""
        rows, token = await self._jobs.page("ListEdits", request)
        return edit_pb2.ListEditsResponse(edits=map(_listed, rows), next_page_token=token)

    async def CancelEdit(  # noqa: N802
        self, request: edit_pb2.CancelEditRequest, context: Context
    ) -> edit_pb2.CancelEditResponse:
        """Asks an edit to stop."""
        return edit_pb2.CancelEditResponse(edit=edit_message(await self._jobs.cancel(request.name)))

    async def WatchEdit(  # noqa: N802
        self, request: edit_pb2.WatchEditRequest, context: Context
    ) -> AsyncIterator[edit_pb2.WatchEditResponse]:
        """The edit now and at each change, until it has ended."""
        async with aclosing(self._jobs.watch(request.name)) as rows:
            async for row in rows:
                yield edit_pb2.WatchEditResponse(edit=edit_message(row))

    def _create(self, request: edit_pb2.CreateEditRequest) -> edit_pb2.Edit:
        if first := self._jobs.repeated(version_ref(request.parent, "parent").model, request):
            return edit_message(first)
        pinned = self._decoder.pinned(request)
        order = self._decoder.edit(pinned)
        parent = self._jobs.resolved(order.parent, "parent")
        self._check_layers(order)
        planned = planned_edit(pinned, parent.model, parent.number)
        if order.validate_only:
            return planned
        pinned.parent = planned.parent
        return edit_message(self._jobs.create(parent, pinned, order.request_id, planned, sent=request))

    def _check_layers(self, order: EditOrder) -> None:
        if order.layers:
            field = f"layers.explicit.layers[{len(order.layers) - 1}]"
            self._jobs.check_layer(order.parent.model, order.layers[-1], field)
        if order.trace:
            trace = self._jobs.other(JobKind.TRACE, order.parent.model, order.trace, "layers.trace")
            if trace.state is not JobState.SUCCEEDED:
                raise MalformedError(
                    f"the trace is {trace.state}; wait until it has succeeded, or name another",
                    field="layers.trace",
                    reason="TRACE_NOT_DONE",
                )


def _listed(row: JobRow) -> edit_pb2.Edit:
    message = edit_message(row, full=False)
    message.MergeFromString(row.summary)
    return message
