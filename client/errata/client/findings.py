"""What a measurement found, frozen, and how it is read off the wire. NaN where a plot has no value."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from errata.client.responses import job
from errata.client.results import Job
from errata.v1 import measurement_pb2

Values: TypeAlias = tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredNumber:
    """One number of `n` samples. `low` and `high` bound its 95 % interval, None where it has none."""

    name: str
    value: float
    unit: str
    n: int
    low: float | None
    high: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class PlotLine:
    """One line of a plot; the bounds of its 95 % interval are empty where it has none."""

    label: str
    values: Values = field(repr=False)
    low: Values = field(repr=False)
    high: Values = field(repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class LinePlot:
    """Lines over one axis."""

    name: str
    title: str
    caption: str
    x_label: str
    y_label: str
    x: Values = field(repr=False)
    lines: tuple[PlotLine, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class HeatMapGrid:
    """One panel of a heat map, row by row."""

    label: str
    values: tuple[Values, ...] = field(repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class HeatMap:
    """Grids over the same rows and columns, on one colour scale."""

    name: str
    title: str
    caption: str
    x_label: str
    y_label: str
    unit: str
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    grids: tuple[HeatMapGrid, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Scatter:
    """Points with a label each, empty for none."""

    name: str
    title: str
    caption: str
    x_label: str
    y_label: str
    x: Values = field(repr=False)
    y: Values = field(repr=False)
    labels: tuple[str, ...] = field(repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Overlay:
    """A value for each patch of an image, row by row; the picture itself is among the files."""

    name: str
    title: str
    caption: str
    unit: str
    values: tuple[Values, ...] = field(repr=False)


FindingsPlot: TypeAlias = LinePlot | HeatMap | Scatter | Overlay
"""A plot. Its figures are the files `{name}.png` and `{name}.svg`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FindingsTable:
    """Cells as they are to be read."""

    name: str
    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...] = field(repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Findings:
    """Everything one measurement found. `n` is its questions, `skipped` a line for each that was left out."""

    title: str
    n: int
    settings: Mapping[str, str] = field(hash=False)
    numbers: tuple[MeasuredNumber, ...]
    plots: tuple[FindingsPlot, ...]
    tables: tuple[FindingsTable, ...]
    skipped: tuple[str, ...]

    def number(self, name: str) -> MeasuredNumber:
        """The number of that name. Raises KeyError with those that there are."""
        found = next((each for each in self.numbers if each.name == name), None)
        if found is None:
            raise KeyError(f"there is no number {name!r}; there are {', '.join(each.name for each in self.numbers)}")
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """A measurement of a version. `findings` is None, and `files` empty, until it succeeded, and in lists.

    `mlflow_run_id` is empty until it is in MLflow.
    """

    name: str
    version: str
    kind: str
    questions: int
    job: Job
    findings: Findings | None
    files: tuple[str, ...]
    mlflow_run_id: str


def measurement(said: measurement_pb2.Measurement) -> Measurement:
    """A measurement."""
    return Measurement(
        name=said.name,
        version=said.version,
        kind=said.kind,
        questions=said.questions,
        job=job(said.job),
        findings=_findings(said.findings) if said.HasField("findings") else None,
        files=tuple(said.files),
        mlflow_run_id=said.mlflow_run_id,
    )


def _findings(said: measurement_pb2.Findings) -> Findings:
    return Findings(
        title=said.title,
        n=said.n,
        settings={each.name: each.value for each in said.settings},
        numbers=tuple(map(_number, said.numbers)),
        plots=tuple(plot for each in said.plots if (plot := _plot(each)) is not None),
        tables=tuple(
            FindingsTable(
                name=each.name,
                title=each.title,
                columns=tuple(each.columns),
                rows=tuple(tuple(row.cells) for row in each.rows),
            )
            for each in said.tables
        ),
        skipped=tuple(said.skipped),
    )


def _number(said: measurement_pb2.MeasuredNumber) -> MeasuredNumber:
    return MeasuredNumber(
        name=said.name,
        value=said.value,
        unit=said.unit,
        n=said.n,
        low=said.low if said.HasField("low") else None,
        high=said.high if said.HasField("high") else None,
    )


def _plot(said: measurement_pb2.Plot) -> FindingsPlot | None:
    """A plot; None for a kind that a newer server has."""
    match said.WhichOneof("kind"):
        case "line_plot":
            return _line_plot(said, said.line_plot)
        case "heat_map":
            return _heat_map(said, said.heat_map)
        case "scatter":
            return _scatter(said, said.scatter)
        case "overlay":
            values = _rows(said.overlay.values, said.overlay.columns)
            return Overlay(
                name=said.name, title=said.title, caption=said.caption, unit=said.overlay.unit, values=values
            )
    return None


def _line_plot(said: measurement_pb2.Plot, plot: measurement_pb2.LinePlot) -> LinePlot:
    return LinePlot(
        name=said.name,
        title=said.title,
        caption=said.caption,
        x_label=plot.x_label,
        y_label=plot.y_label,
        x=tuple(plot.x),
        lines=tuple(
            PlotLine(label=each.label, values=tuple(each.values), low=tuple(each.low), high=tuple(each.high))
            for each in plot.lines
        ),
    )


def _heat_map(said: measurement_pb2.Plot, plot: measurement_pb2.HeatMap) -> HeatMap:
    return HeatMap(
        name=said.name,
        title=said.title,
        caption=said.caption,
        x_label=plot.x_label,
        y_label=plot.y_label,
        unit=plot.unit,
        rows=tuple(plot.rows),
        columns=tuple(plot.columns),
        grids=tuple(HeatMapGrid(label=each.label, values=_rows(each.values, len(plot.columns))) for each in plot.grids),
    )


def _scatter(said: measurement_pb2.Plot, plot: measurement_pb2.Scatter) -> Scatter:
    return Scatter(
        name=said.name,
        title=said.title,
        caption=said.caption,
        x_label=plot.x_label,
        y_label=plot.y_label,
        x=tuple(plot.x),
        y=tuple(plot.y),
        labels=tuple(plot.labels),
    )


def _rows(values: Sequence[float], columns: int) -> tuple[Values, ...]:
    return tuple(tuple(values[start : start + columns]) for start in range(0, len(values), max(columns, 1)))
