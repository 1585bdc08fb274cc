"""Lines over one axis, with 95 % intervals as bars where there is room for them and as bands elsewhere."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import blended_transform_factory
from numpy.typing import NDArray

from errata.editor.measurements.canvas import CHARACTER, WIDTH, framed, no_values, shown
from errata.editor.measurements.findings import Line, LinePlot
from errata.editor.report.style import COLOURS, COLUMN, GREY, MARKERS, RULE


def line_plot(plot: LinePlot) -> tuple[Figure, list[str]]:
    """The figure, and what its marks mean."""
    figure = Figure(figsize=(WIDTH, 2.4 + 0.13 * _legend_rows(plot.lines)), layout="constrained")
    axes = figure.add_subplot()
    ends = [v for line in plot.lines for v in (line.values, line.low, line.high) if v is not None]
    finite = np.concatenate([v[np.isfinite(v)] for v in ends]) if ends else np.zeros(0)
    if finite.size and finite.min() <= 0 <= finite.max():
        axes.axhline(0, color=GREY, linewidth=0.7, zorder=1)
    bars = _has_room_for_bars(plot)
    for i, line in enumerate(plot.lines):
        _line(axes, plot.x, line, i, len(plot.lines), bars=bars)
    _abscissa(axes, plot)
    _ordinate(axes, finite)
    axes.grid(axis="y", color=RULE, linewidth=0.5)
    framed(axes, plot.x_label, plot.y_label)
    if not finite.size:
        no_values(axes)
    if plot.lines:
        _legend(figure, axes, plot.lines)
    bounded = [line for line in plot.lines if line.low is not None and np.isfinite(line.low).any()]
    told = bounded and "95 %" not in plot.caption
    return figure, [f"{'bars' if bars else 'bands'}: 95 % interval"] if told else []


def _has_room_for_bars(plot: LinePlot) -> bool:
    return len(plot.x) <= 12 and len(plot.lines) <= 3


def _line(axes: Axes, x: NDArray[np.float64], line: Line, i: int, n: int, *, bars: bool) -> None:
    colour = COLOURS[i % len(COLOURS)]
    # Twice as many as there are colours before two look alike.
    dashes = ("-", (0, (4, 1.5)), (0, (1, 1)))[i // len(COLOURS) % 3]
    step = float(np.diff(np.unique(x)).min(initial=1.0))
    # Set aside a little, so that no bar hides another.
    at = x + (0.08 * step * (i - (n - 1) / 2) if bars else 0.0)
    every = max(1, len(x) // 10)
    axes.plot(
        at, line.values, color=colour, linestyle=dashes, linewidth=1.2, marker=MARKERS[i % len(MARKERS)],
        markersize=3.6, markevery=(i * every // max(1, n) if len(x) > 20 else 0, every if len(x) > 20 else 1), zorder=3,
    )  # fmt: skip
    if line.low is None or line.high is None:
        return
    if bars:
        axes.vlines(at, line.low, line.high, color=colour, linewidth=0.9, zorder=2)
    else:
        axes.fill_between(at, line.low, line.high, color=colour, alpha=0.16, linewidth=0, zorder=2)


def _abscissa(axes: Axes, plot: LinePlot) -> None:
    x = plot.x[np.isfinite(plot.x)]
    if len(np.unique(x)) == 1:
        axes.set_xlim(x[0] - 1, x[0] + 1)
    if len(x) and np.all(x == np.round(x)) and np.ptp(x) != 1:
        axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True, min_n_ticks=1))
    if len(np.unique(x)) <= 8 and np.all(x == np.round(x)):
        axes.set_xticks(np.unique(x))


def _ordinate(axes: Axes, values: NDArray[np.float64]) -> None:
    """Values that hardly differ are shown as such, not spread over the whole axis."""
    if not values.size:
        return
    largest, middle = float(np.abs(values).max()), float(values.max() + values.min()) / 2
    if 0 < np.ptp(values) < 0.05 * largest:
        axes.set_ylim(middle - 0.05 * largest, middle + 0.05 * largest)


def _labels(lines: Sequence[Line]) -> list[str]:
    limit = 46 if len(lines) <= 6 else 26
    missing = ["" if np.isfinite(line.values).any() else " (no values)" for line in lines]
    return [(shown(line.label, limit) or "–") + said for line, said in zip(lines, missing, strict=True)]


def _legend_columns(labels: Sequence[str]) -> int:
    """The most columns, each as wide as its widest label, that the figure has room for."""
    for most in (4, 3, 2):
        rows = max(1, -(-len(labels) // most))
        columns = -(-len(labels) // rows)
        # As matplotlib deals the labels out.
        widest = [max(map(len, part)) for part in np.array_split(np.array(labels), columns or 1) if len(part)]
        if sum(0.34 + CHARACTER * COLUMN.tick * each for each in widest) < WIDTH:
            return max(1, columns)
    return 1


def _legend_rows(lines: Sequence[Line]) -> int:
    return -(-len(lines) // max(1, _legend_columns(_labels(lines))))


def _legend(figure: Figure, axes: Axes, lines: Sequence[Line]) -> None:
    """Over the plot, where it hides nothing; none for a single line without a name."""
    if len(lines) == 1 and not lines[0].label:
        return
    labels = _labels(lines)
    # By position: a label that starts with an underscore would be left out.
    handles = [line for line in axes.lines if line.get_zorder() == 3]
    # From the figure's left edge on: it may be wider than the plot.
    corner = blended_transform_factory(figure.transFigure, axes.transAxes)
    legend = axes.legend(
        handles, labels, loc="lower left", bbox_to_anchor=(0.0, 1.0), bbox_transform=corner, frameon=False,
        ncols=_legend_columns(labels), fontsize=COLUMN.tick, handlelength=1.9, handletextpad=0.5, columnspacing=0.9,
        labelspacing=0.25, borderaxespad=0.2,
    )  # fmt: skip
    for text in legend.get_texts():
        text.set_parse_math(False)
