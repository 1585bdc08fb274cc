"""Where a study keeps its results, and findings read again from there.

`findings.json` is what the API says of a measurement; the pictures of overlays, which that leaves out, lie beside it.
"""

import io
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from google.protobuf.json_format import MessageToJson, Parse
from jaxtyping import Float
from numpy.typing import NDArray
from PIL import Image

from errata.editor.measurements.drawing import plate, section
from errata.editor.measurements.findings import (
    Findings,
    Grid,
    HeatMap,
    Line,
    LinePlot,
    Number,
    Overlay,
    Plot,
    Scatter,
    Table,
)
from errata.server.conversion.findings import findings_message
from errata.server.jobs.findings import FINDINGS
from errata.v1 import measurement_pb2

SECTION = "section.html"
"""A cell's part of the study's page."""

_PICTURE = "{}.image.png"
"""An overlay's own image, by the plot's name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """The folder of a study's results."""

    out: Path

    @property
    def cells(self) -> Path:
        """Of the store that has a folder for each finished cell."""
        return self.out / "cells"

    @property
    def statistics(self) -> Path:
        """Key statistics, kept for other cells."""
        return self.out / "statistics"

    @property
    def stop(self) -> Path:
        """A file that is there while running cells are to stop."""
        return self.out / ".stop"

    @property
    def page(self) -> Path:
        """Everything on one page."""
        return self.out / "index.html"

    def has(self, cell_id: str) -> bool:
        """Whether a cell is finished."""
        return (self.cells / cell_id / SECTION).is_file()


def cell_files(findings: Findings, anchor: str) -> dict[str, bytes]:
    """All files of a cell: each plot as PNG and SVG, the findings, and their part of the page."""
    plates = [plate(findings, plot) for plot in findings.plots]
    files = {FINDINGS: _said(findings), SECTION: section(findings, anchor=anchor, plates=plates).encode()}
    for each, plot in zip(plates, findings.plots, strict=True):
        files |= {f"{each.name}.png": each.png, f"{each.name}.svg": each.svg}
        if isinstance(plot, Overlay):
            files[_PICTURE.format(plot.name)] = _encoded(plot.image)
    return files


def _said(findings: Findings) -> bytes:
    said = MessageToJson(findings_message(findings), preserving_proto_field_name=True, ensure_ascii=False)
    return said.encode()


def _encoded(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def read_findings(folder: Path, kind: str) -> Findings:
    """What a measurement left in a folder. Raises OSError and ParseError for a folder without whole findings."""
    said = Parse((folder / FINDINGS).read_bytes(), measurement_pb2.Findings())
    return Findings(
        kind=kind,
        title=said.title,
        settings={each.name: each.value for each in said.settings},
        n=said.n,
        numbers=tuple(map(_number, said.numbers)),
        plots=tuple(_plot(each, folder) for each in said.plots),
        tables=tuple(_table(each) for each in said.tables),
        skipped=tuple(said.skipped),
    )


def _number(said: measurement_pb2.MeasuredNumber) -> Number:
    return Number(
        name=said.name,
        value=said.value,
        unit=said.unit,
        n=said.n,
        low=said.low if said.HasField("low") else None,
        high=said.high if said.HasField("high") else None,
    )


def _plot(said: measurement_pb2.Plot, folder: Path) -> Plot:
    match said.WhichOneof("kind"):
        case "line_plot":
            return _line_plot(said)
        case "heat_map":
            return _heat_map(said)
        case "scatter":
            return Scatter(
                name=said.name,
                title=said.title,
                x_label=said.scatter.x_label,
                y_label=said.scatter.y_label,
                x=_array(said.scatter.x),
                y=_array(said.scatter.y),
                labels=tuple(said.scatter.labels),
                caption=said.caption,
            )
    with Image.open(folder / _PICTURE.format(said.name)) as image:
        return Overlay(
            name=said.name,
            title=said.title,
            unit=said.overlay.unit,
            image=image.copy(),
            patches=_array(said.overlay.values).reshape(said.overlay.rows, said.overlay.columns),
            caption=said.caption,
        )


def _line_plot(said: measurement_pb2.Plot) -> LinePlot:
    own = said.line_plot
    lines = (
        Line(
            label=line.label,
            values=_array(line.values),
            low=_array(line.low) if line.low else None,
            high=_array(line.high) if line.high else None,
        )
        for line in own.lines
    )
    return LinePlot(
        name=said.name,
        title=said.title,
        x_label=own.x_label,
        y_label=own.y_label,
        x=_array(own.x),
        lines=tuple(lines),
        caption=said.caption,
    )


def _heat_map(said: measurement_pb2.Plot) -> HeatMap:
    own = said.heat_map
    shape = len(own.rows), len(own.columns)
    return HeatMap(
        name=said.name,
        title=said.title,
        x_label=own.x_label,
        y_label=own.y_label,
        unit=own.unit,
        rows=tuple(own.rows),
        columns=tuple(own.columns),
        grids=tuple(Grid(label=g.label, values=_array(g.values).reshape(shape)) for g in own.grids),
        caption=said.caption,
    )


def _table(said: measurement_pb2.FindingsTable) -> Table:
    return Table(
        name=said.name,
        title=said.title,
        columns=tuple(said.columns),
        rows=tuple(tuple(row.cells) for row in said.rows),
    )


def _array(values: Iterable[float]) -> Float[NDArray[np.float64], " n"]:
    return np.array(list(values), dtype=np.float64)
