"""Measurements."""

from asyncio import to_thread
from collections.abc import AsyncIterator
from contextlib import aclosing

from errata.server.conversion import Decoder, measurement_message, planned_measurement
from errata.server.errors import NotFoundError
from errata.server.ledger.rows import JobKind
from errata.server.names import version_ref
from errata.server.services.calls import Context
from errata.server.services.jobs import Jobs, Queue
from errata.server.store import ArtifactStore
from errata.v1 import measurement_pb2, measurement_pb2_grpc


class MeasurementService(measurement_pb2_grpc.MeasurementServiceServicer):
    """Measurements are checked and queued here; `jobs.measurements` does them."""

    def __init__(self, queue: Queue, decoder: Decoder, artifacts: ArtifactStore) -> None:
        self._jobs, self._decoder, self._artifacts = Jobs(JobKind.MEASUREMENT, queue), decoder, artifacts

    async def CreateMeasurement(  # noqa: N802
        self, request: measurement_pb2.CreateMeasurementRequest, context: Context
    ) -> measurement_pb2.CreateMeasurementResponse:
        """Queues a measurement."""
        return measurement_pb2.CreateMeasurementResponse(measurement=await to_thread(self._create, request))

    async def GetMeasurement(  # noqa: N802
        self, request: measurement_pb2.GetMeasurementRequest, context: Context
    ) -> measurement_pb2.GetMeasurementResponse:
        """One measurement, with what it found."""
        row = await self._jobs.get(request.name)
        return measurement_pb2.GetMeasurementResponse(measurement=measurement_message(row))

    async def ListMeasurements(  # noqa: N802
        self, request: measurement_pb2.ListMeasurementsRequest, context: Context
    ) -> measurement_pb2.ListMeasurementsResponse:
        """A model's measurements, the newest first."""
        rows, token = await self._jobs.page("ListMeasurements", request)
        listed = (measurement_message(row, full=False) for row in rows)
        return measurement_pb2.ListMeasurementsResponse(measurements=listed, next_page_token=token)

    async def CancelMeasurement(  # noqa: N802
        self, request: measurement_pb2.CancelMeasurementRequest, context: Context
    ) -> measurement_pb2.CancelMeasurementResponse:
        """Asks a measurement to stop."""
        row = await self._jobs.cancel(request.name)
        return measurement_pb2.CancelMeasurementResponse(measurement=measurement_message(row))

    async def WatchMeasurement(  # noqa: N802
        self, request: measurement_pb2.WatchMeasurementRequest, context: Context
    ) -> AsyncIterator[measurement_pb2.WatchMeasurementResponse]:
        """The measurement now and at each change, until it has ended."""
        async with aclosing(self._jobs.watch(request.name)) as rows:
            async for row in rows:
                yield measurement_pb2.WatchMeasurementResponse(measurement=measurement_message(row))

    async def GetMeasurementFile(  # noqa: N802
        self, request: measurement_pb2.GetMeasurementFileRequest, context: Context
    ) -> measurement_pb2.GetMeasurementFileResponse:
        """One of its files."""
        row = await self._jobs.get(request.name)
        files = measurement_message(row).files
        if request.file not in files:
            raise NotFoundError(
                f"{request.name} has no file {request.file[:100]!a}; it has {', '.join(files) or 'none yet'}",
                field="file",
                reason="FILE_NOT_FOUND",
            )
        data = await to_thread(self._artifacts.read, row.id, request.file)
        return measurement_pb2.GetMeasurementFileResponse(data=data)

    def _create(self, request: measurement_pb2.CreateMeasurementRequest) -> measurement_pb2.Measurement:
        if first := self._jobs.repeated(version_ref(request.version, "version").model, request):
            return measurement_message(first)
        pinned = self._decoder.pinned(request)
        order = self._decoder.measurement(pinned)
        version = self._jobs.resolved(order.version, "version")
        planned = planned_measurement(pinned, version.model, version.number)
        if order.validate_only:
            return planned
        pinned.version = planned.version
        return measurement_message(self._jobs.create(version, pinned, order.request_id, planned, sent=request))
