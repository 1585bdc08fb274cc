"""Measurements as `fake_server.Fake` serves them: one plot of each kind, and a file for each figure."""

# ruff: noqa: N802  (methods are named as the protos name them)

from typing import Any

import grpc

from errata.v1 import common_pb2, measurement_pb2, measurement_pb2_grpc

FILES = {
    "aie.png": b"PNG",
    "aie.svg": b"<svg/>",
    "findings.json": b"{}",
    "numbers.csv": b"name",
    "page.html": b"<!doctype html>",
}
NAN = float("nan")


class FakeMeasurements(measurement_pb2_grpc.MeasurementServiceServicer):
    """For the fake server, whose versions and work it uses."""

    plots: tuple[measurement_pb2.Plot, ...] = (
        measurement_pb2.Plot(
            name="aie",
            title="Restored",
            line_plot=measurement_pb2.LinePlot(
                x_label="layer", y_label="AIE", x=[0, 1], lines=[measurement_pb2.PlotLine(label="mlp", values=[1, NAN])]
            ),
        ),
    )

    def CreateMeasurement(self: Any, request: Any, context: grpc.ServicerContext) -> Any:
        version = self.resolve(request.version, context)
        measurement = measurement_pb2.Measurement(
            version=version, kind=request.WhichOneof("settings"), questions=len(request.questions)
        )
        work = self.made_work(measurement, self._measure)
        return measurement_pb2.CreateMeasurementResponse(
            measurement=self._create(request, "measurements", work, context)
        )

    def _measure(self: Any, measurement: Any) -> None:
        found = measurement.findings
        found.title, found.n = "Measured", measurement.questions
        found.settings.add(name="draws", value="5")
        found.numbers.add(name="total effect", value=0.5, unit="probability", n=1, low=0.25, high=0.75)
        found.numbers.add(name="layer of the highest AIE", value=2, unit="layer", n=1)
        found.plots.extend(self.plots)
        found.tables.add(name="words", title="Words", columns=["token", "p"]).rows.add(cells=["Oslo", "0.5"])
        found.skipped.append("questions[1]: 'Where?' is answered 'here', not 'there'")
        measurement.files.extend(FILES)
        measurement.job.state = common_pb2.STATE_SUCCEEDED

    def GetMeasurement(self: Any, request: Any, context: grpc.ServicerContext) -> Any:
        found = self._look(request.name, "MEASUREMENT", context)
        return measurement_pb2.GetMeasurementResponse(measurement=found)

    def ListMeasurements(self: Any, request: Any, context: grpc.ServicerContext) -> Any:
        page, token = self._list("measurements", request, context)
        return measurement_pb2.ListMeasurementsResponse(measurements=page, next_page_token=token)

    def CancelMeasurement(self: Any, request: Any, context: grpc.ServicerContext) -> Any:
        found = self._cancel(request.name, "MEASUREMENT", context)
        return measurement_pb2.CancelMeasurementResponse(measurement=found)

    def WatchMeasurement(self: Any, request: Any, context: grpc.ServicerContext) -> Any:
        for found in self._watch(request.name, "MEASUREMENT", context):
            yield measurement_pb2.WatchMeasurementResponse(measurement=found)

    def GetMeasurementFile(self: Any, request: Any, context: grpc.ServicerContext) -> Any:
        if request.file not in FILES:
            self._not_found("FILE", request.file, context)
        return measurement_pb2.GetMeasurementFileResponse(data=FILES[request.file])
