"""Plots of a measurement in the terminal, as blocks and shades. The figures say it exactly."""

import math
from collections.abc import Iterable, Sequence

from rich.console import RenderableType
from rich.text import Text

from errata.client.cli.plain import clean
from errata.client.findings import FindingsPlot, HeatMap, HeatMapGrid, LinePlot

_BARS = "▁▂▃▄▅▆▇█"
_SHADES = " ░▒▓█"
_LABEL = 36
_MOST_LINES, _MOST_ROWS = 12, 40
_HARDLY = 0.1
"""A share of the largest value: what differs by less is drawn as alike."""


def drawn(plot: FindingsPlot, width: int) -> list[RenderableType]:
    """A plot as lines of at most `width` columns; nothing for those that a terminal cannot show."""
    match plot:
        case LinePlot():
            lines = _line_plot(plot, width)
        case HeatMap():
            lines = _heat_map(plot, width)
        case _:
            return []
    return [Text(clean(plot.title), style="italic", overflow="fold"), *map(_whole, lines)] if lines else []


def _whole(text: str) -> Text:
    return Text(clean(text), no_wrap=True, overflow="crop")


def _line_plot(plot: LinePlot, width: int) -> list[str]:
    values = [value for line in plot.lines for value in line.values if math.isfinite(value)]
    if not values:
        return []
    low, high = _bounds(values)
    # What falls from 0 is shown by how far it falls.
    foot, top = (high, low) if high < -low / 10 else (low, high)
    label = _room((line.label for line in plot.lines), width)
    step = _step(len(plot.x), width - label - 1)
    rows = [
        f"{_cut(line.label, label):>{label}} {''.join(_bar(v, foot, top) for v in line.values[::step])}"
        for line in plot.lines[:_MOST_LINES]
    ]
    if len(plot.lines) > _MOST_LINES:
        rows.append(f"{'':{label}} and {len(plot.lines) - _MOST_LINES} more lines")
    across = f"{plot.x_label} {plot.x[0]:g} to {plot.x[-1]:g}"
    told = _told(foot, top) if foot == low else f"from {_told(foot, top).replace(' to ', ' down to ')}"
    return [*rows, f"across: {across}", f"up: {plot.y_label}, {told}"]


def _heat_map(plot: HeatMap, width: int) -> list[str]:
    values = [v for grid in plot.grids for row in grid.values for v in row if math.isfinite(v)]
    if not values or len(plot.rows) > _MOST_ROWS:
        return []
    low, high = _bounds(values)
    label = _room(plot.rows, width)
    step = _step(len(plot.columns), width - label - 1)
    lines = [line for grid in plot.grids for line in _grid(plot.rows, grid, label, step, (low, high))]
    across = f"{plot.x_label} {plot.columns[0]} to {plot.columns[-1]}"
    return [*lines, f"across: {across}", f"light to dark: {plot.unit}, {_told(low, high)}"]


def _grid(names: Sequence[str], grid: HeatMapGrid, label: int, step: int, bounds: tuple[float, float]) -> Iterable[str]:
    if grid.label:
        yield f"{'':{label}} {grid.label}"
    for name, row in zip(names, grid.values, strict=True):
        yield f"{_cut(name, label):>{label}} {''.join(_shade(v, *bounds) for v in row[::step])}"


def _bounds(values: Sequence[float]) -> tuple[float, float]:
    """Between which values are shown; wider than they lie where they hardly differ."""
    low, high = min(values), max(values)
    largest = max(abs(low), abs(high))
    return (min(low, high - _HARDLY * largest), high) if low < high else (low, high)


def _told(first: float, last: float) -> str:
    """Both ends; what is nothing beside the other is 0."""
    least = max(abs(first), abs(last)) / 1000
    return " to ".join("0" if abs(end) < least else f"{end:.3g}" for end in (first, last))


def _bar(value: float, low: float, high: float) -> str:
    return _BARS[round(_share(value, low, high) * (len(_BARS) - 1))] if math.isfinite(value) else " "


def _shade(value: float, low: float, high: float) -> str:
    return _SHADES[round(_share(value, low, high) * (len(_SHADES) - 1))] * 2 if math.isfinite(value) else "  "


def _share(value: float, low: float, high: float) -> float:
    return (value - low) / (high - low) if high != low else 1.0


def _room(labels: Iterable[str], width: int) -> int:
    return min(max(map(len, labels), default=0), _LABEL, width // 2)


def _step(points: int, room: int) -> int:
    """Every how many points one is shown, so that a cell of two columns each fits."""
    return max(1, math.ceil(2 * points / max(room, 1)))


def _cut(label: str, room: int) -> str:
    return label if len(label) <= room else label[: room - 1] + "…"
