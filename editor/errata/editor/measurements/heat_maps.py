"""Grids over the same rows and columns, on one scale of colours."""

from collections.abc import Iterator, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from errata.editor.measurements.canvas import CHARACTER, WIDTH, colour_bar, folded
from errata.editor.measurements.findings import Grid, HeatMap
from errata.editor.report.style import COLUMN, scale, token


def heat_map(plot: HeatMap) -> tuple[Figure, list[str]]:
    """The figure, and what its marks mean."""
    across, down = _panels(plot)
    rows, columns = ([token(label, 26) for label in labels] for labels in (plot.rows, plot.columns))
    height = min(6.5 / down, max(0.7, 0.125 * len(rows)))
    width = (WIDTH - 0.5 - _width(rows)) / across
    characters = int(width / (CHARACTER * COLUMN.label))
    titles = max((folded(grid.label, max(8, characters)).count("\n") + 1 for grid in plot.grids), default=0)
    below = _width(columns) if _upright(columns) else 0.1
    panel = height + 0.06 + 0.14 * titles
    figure = Figure(figsize=(WIDTH, 1.05 + below + down * panel + (down - 1) * (0.3 + below)), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.03, h_pad=0.03)  # type: ignore[union-attr, call-arg]
    values = np.concatenate([np.zeros(0), *(grid.values.ravel() for grid in plot.grids)])
    norm, colours, extend = scale(values, least=1e-6)
    panels = figure.subplots(down, across, sharex=True, sharey=True, squeeze=False).tolist()
    in_order = [axes for row in panels for axes in row]
    for axes, grid in zip(in_order, plot.grids, strict=False):
        _grid(axes, grid, norm, colours, characters)
    for spare in in_order[len(plot.grids) :]:
        spare.set_visible(False)
    _ticks(in_order[0], "y", rows, int(height / 0.115))
    _ticks(in_order[0], "x", columns, int(width / (0.115 if _upright(columns) else 0.2)))
    _name_axes(panels, plot, int(11 * height) + 4, upright=_upright(columns))
    colour_bar(figure, in_order, ScalarMappable(norm, colours), plot.unit, extend)
    return figure, ["hatched: no value"] if np.isnan(values).any() else []


def _name_axes(panels: list[list[Axes]], plot: HeatMap, characters: int, *, upright: bool) -> None:
    for axes, *_ in panels:
        axes.set_ylabel(folded(plot.y_label, characters), fontsize=COLUMN.label, parse_math=False)
    for axes in _lowest(panels, len(plot.grids)):
        axes.set_xlabel(folded(plot.x_label, 46 // len(panels[0])), fontsize=COLUMN.label, parse_math=False)
        axes.tick_params(labelbottom=True)
    for axes in (axes for row in panels for axes in row):
        axes.tick_params(axis="x", labelrotation=90 if upright else 0)


def _panels(plot: HeatMap) -> tuple[int, int]:
    """How many panels stand side by side, and in how many rows."""
    n = max(1, len(plot.grids))
    if len(plot.columns) > 16:
        across = 1 if n * len(plot.rows) <= 52 or len(plot.columns) > 48 else 2
    else:
        across = 2 if n in (2, 4) else 3
    across = min(n, across)
    return across, -(-n // across)


def _width(labels: Sequence[str]) -> float:
    """Of the widest label, in inches."""
    return CHARACTER * COLUMN.tick * max(map(len, labels), default=0)


def _upright(columns: Sequence[str]) -> bool:
    return max(map(len, columns), default=0) > 3


def _grid(axes: Axes, grid: Grid, norm: Normalize, colours: str, characters: int) -> None:
    # What is transparent, because it has no value, shows the hatching beneath.
    axes.patch.set(hatch="//////", edgecolor="#bbbbbb", facecolor="white", linewidth=0)
    axes.imshow(grid.values, norm=norm, cmap=colours, aspect="auto", interpolation="nearest")
    if grid.label:
        axes.set_title(folded(grid.label, max(8, characters)), fontsize=COLUMN.label, parse_math=False, pad=3)
    axes.tick_params(labelsize=COLUMN.tick, length=2)
    axes.spines[:].set_visible(False)


def _ticks(axes: Axes, which: str, labels: Sequence[str], room: int) -> None:
    """Labels each row or column; where they would overlap, every n-th."""
    step = next((n for n in (1, 2, 5, 10, 20, 50, 100) if len(labels) <= n * max(1, room)), 1000)
    at = list(range(0, len(labels), step))
    set_ticks = axes.set_xticks if which == "x" else axes.set_yticks
    set_ticks(at, [labels[i] for i in at], fontsize=COLUMN.tick, parse_math=False)


def _lowest(panels: list[list[Axes]], n: int) -> Iterator[Axes]:
    """In each column of panels the one with none beneath it."""
    across = len(panels[0])
    for column in range(across):
        yield panels[(n - 1 - column) // across if n > column else 0][column]
