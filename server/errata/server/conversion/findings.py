"""What a measurement found → protos. What is stored of one is its findings and the names of its files."""

from collections.abc import Iterable

from errata.editor.measurements.findings import (
    Findings,
    HeatMap,
    Line,
    LinePlot,
    Number,
    Overlay,
    Plot,
    Scatter,
    Table,
)
from errata.server.conversion.encode import job_message
from errata.server.ledger.rows import JobKind, JobRow
from errata.server.names import job_name, version_name
from errata.v1 import measurement_pb2


def measurement_message(row: JobRow, *, full: bool = True) -> measurement_pb2.Measurement:
    """A measurement as it stands; what it found where `full`."""
    message = measurement_pb2.Measurement.FromString(row.summary)
    if full and row.result:
        message.MergeFromString(row.result)
    message.name = job_name(JobKind.MEASUREMENT, row.model, row.id)
    message.mlflow_run_id = row.mlflow_run_id
    message.job.CopyFrom(job_message(row))
    return message


def planned_measurement(
    request: measurement_pb2.CreateMeasurementRequest, model: str, number: int
) -> measurement_pb2.Measurement:
    """A measurement before it has a name: what a call that only validates gives back."""
    return measurement_pb2.Measurement(
        version=version_name(model, number), kind=request.WhichOneof("settings") or "", questions=len(request.questions)
    )


def measurement_outcome(findings: Findings, files: Iterable[str]) -> measurement_pb2.Measurement:
    """What a measurement's job stores as its result."""
    return measurement_pb2.Measurement(findings=findings_message(findings), files=sorted(files))


def findings_message(findings: Findings) -> measurement_pb2.Findings:
    """Everything that was found."""
    return measurement_pb2.Findings(
        title=findings.title,
        n=findings.n,
        settings=[measurement_pb2.FindingsSetting(name=k, value=v) for k, v in findings.settings.items()],
        numbers=map(_number, findings.numbers),
        plots=map(_plot, findings.plots),
        tables=map(_table, findings.tables),
        skipped=findings.skipped,
    )


def _number(number: Number) -> measurement_pb2.MeasuredNumber:
    return measurement_pb2.MeasuredNumber(
        name=number.name, value=number.value, unit=number.unit, n=number.n, low=number.low, high=number.high
    )


def _plot(plot: Plot) -> measurement_pb2.Plot:
    message = measurement_pb2.Plot(name=plot.name, title=plot.title, caption=plot.caption)
    match plot:
        case LinePlot():
            lines = measurement_pb2.LinePlot(
                x_label=plot.x_label, y_label=plot.y_label, x=plot.x, lines=map(_line, plot.lines)
            )
            message.line_plot.CopyFrom(lines)
        case HeatMap():
            message.heat_map.CopyFrom(_heat_map(plot))
        case Scatter():
            points = measurement_pb2.Scatter(
                x_label=plot.x_label, y_label=plot.y_label, x=plot.x, y=plot.y, labels=plot.labels
            )
            message.scatter.CopyFrom(points)
        case Overlay():
            rows, columns = plot.patches.shape
            overlay = measurement_pb2.Overlay(unit=plot.unit, rows=rows, columns=columns, values=plot.patches.ravel())
            message.overlay.CopyFrom(overlay)
    return message


def _line(line: Line) -> measurement_pb2.PlotLine:
    low, high = (() if bound is None else bound for bound in (line.low, line.high))
    return measurement_pb2.PlotLine(label=line.label, values=line.values, low=low, high=high)


def _heat_map(plot: HeatMap) -> measurement_pb2.HeatMap:
    return measurement_pb2.HeatMap(
        x_label=plot.x_label,
        y_label=plot.y_label,
        unit=plot.unit,
        rows=plot.rows,
        columns=plot.columns,
        grids=[measurement_pb2.HeatMapGrid(label=g.label, values=g.values.ravel()) for g in plot.grids],
    )


def _table(table: Table) -> measurement_pb2.FindingsTable:
    return measurement_pb2.FindingsTable(
        name=table.name,
        title=table.title,
        columns=table.columns,
        rows=[measurement_pb2.FindingsRow(cells=row) for row in table.rows],
    )
