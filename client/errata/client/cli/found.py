"""What a measurement found, for people: numbers, tables and plots, each as much as a screen takes.

The whole of it is in `--json`, and on the page that `errata measure --out FOLDER` writes.
"""

import re
from collections.abc import Iterator, Sequence

from rich.console import RenderableType

from errata.client.cli import plots
from errata.client.cli.output import Output, facts, line
from errata.client.cli.plain import short
from errata.client.findings import Findings, FindingsPlot, FindingsTable, MeasuredNumber, Measurement

_MOST_NUMBERS, _MOST_LINES, _MOST_PLOTS, _MOST_SKIPPED = 24, 14, 4, 5
_PLACES = ("layer", "rank")
"""Units of numbers that count places."""
_INTERVAL = re.compile(r" \(-?[\d.]+–-?[\d.]+\)$")
"""Behind a number in a table's cell."""
_NOTHING = ("", "–")
"""Cells of columns that this measurement has nothing for."""


def show_measurement(output: Output, done: Measurement) -> None:
    """Says what a measurement found."""
    found = done.findings
    assert found is not None
    output.show(done, *_parts(output, done, found))


def _parts(output: Output, done: Measurement, found: Findings) -> Iterator[RenderableType]:
    yield line(found.title, "bold")
    asked = ("questions", f"{found.n} of {done.questions}") if done.questions else ("requests", str(found.n))
    yield facts([asked, ("version", short(done.version)), ("measurement", done.name)])
    if found.numbers:
        yield line("")
        columns = ("number", "value", "95 %", "unit", "n")
        yield output.table(columns, map(_number, found.numbers[:_MOST_NUMBERS]))
        yield from _more(len(found.numbers) - _MOST_NUMBERS, "number")
    for table in found.tables:
        yield line("")
        yield from _table(output, table)
    yield from _plots(output, found.plots)
    if found.skipped:
        yield line("")
        yield from (line(f"left out: {each}", "dim") for each in found.skipped[:_MOST_SKIPPED])
        yield from _more(len(found.skipped) - _MOST_SKIPPED, "question")


def _number(number: MeasuredNumber) -> tuple[str, str, str, str, str]:
    bounded = number.low is not None and number.high is not None
    interval = f"{_figure(number.low)} to {_figure(number.high)}" if bounded else ""
    if number.unit not in _PLACES:
        return number.name, _figure(number.value), interval, number.unit, str(number.n)
    said = "" if number.unit in number.name else f"{number.unit} "
    return number.name, f"{said}{_figure(number.value)}", interval, "", str(number.n)


def _figure(value: float | None) -> str:
    """To three digits, without a power of ten where there are more."""
    if value is None:
        return ""
    return f"{value:,.0f}" if 999.5 <= abs(value) < 1e9 else f"{value:.3g}"


def _table(output: Output, table: FindingsTable) -> Iterator[RenderableType]:
    """As many rows as fit `_MOST_LINES`; where the width is too small, numbers without intervals. No empty columns."""
    said = [at for at in range(len(table.columns)) if any(row[at] not in _NOTHING for row in table.rows)]
    columns = [table.columns[at] for at in said]
    rows, note = tuple(tuple(row[at] for at in said) for row in table.rows), ""
    whole = output.table(columns, rows)
    if (
        output.console.measure(whole, options=output.console.options.update(max_width=1000)).maximum
        > output.console.width
    ):
        bare = tuple(tuple(_INTERVAL.sub("", cell) for cell in row) for row in rows)
        rows, note = bare, "" if bare == rows else ", without intervals"
    yield line(table.title + note, "italic")
    shown = next((n for n in range(min(len(rows), _MOST_LINES), 1, -1) if _fits(output, columns, rows[:n])), 1)
    yield output.table(columns, rows[:shown])
    yield from _more(len(rows) - shown, "row")


def _fits(output: Output, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> bool:
    return len(output.console.render_lines(output.table(columns, rows), pad=False)) <= _MOST_LINES


def _plots(output: Output, given: Sequence[FindingsPlot]) -> Iterator[RenderableType]:
    shown = [drawn for plot in given if (drawn := plots.drawn(plot, output.console.width))][:_MOST_PLOTS]
    for drawn in shown:
        yield line("")
        yield from drawn
    if left := len(given) - len(shown):
        yield line("")
        yield line(
            f"{left} more {'plot is' if left == 1 else 'plots are'} not drawn here; --out FOLDER writes all", "dim"
        )


def _more(left: int, what: str) -> Iterator[RenderableType]:
    if left > 0:
        yield line(f"… and {left} more {what}{'s' if left > 1 else ''}: --json, or the page of --out FOLDER", "dim")
