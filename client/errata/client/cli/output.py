"""What a command says: its result to stdout, as text or as one JSON document; all else to stderr.

Text has colours only on a terminal, fits its width, and is clean of control characters, whoever wrote it.
"""

import json
import os
from collections.abc import Iterable, Sequence
from typing import NoReturn

from rich.console import Console, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from errata.client.cli.plain import clean, plain
from errata.client.results import MetricScore

PIPE_WIDTH = 200
"""Columns where nobody sees the lines: enough that tables are not folded."""
_NARROW, _WIDEST = 70, 1000


class _Console(Console):
    def on_broken_pipe(self) -> NoReturn:
        raise BrokenPipeError


def console(*, stderr: bool = False) -> Console:
    """A console on stdout or stderr that takes texts as they are."""
    made = _Console(stderr=stderr, markup=False, highlight=False, emoji=False)
    if not made.is_terminal and "COLUMNS" not in os.environ:
        made.width = PIPE_WIDTH
    return made


class Output:
    """Where a command's result goes. `as_json`: one document on stdout."""

    def __init__(self, *, as_json: bool, verbose: bool) -> None:
        self.as_json, self.verbose = as_json, verbose
        self.console, self.errors = console(), console(stderr=True)

    def show(self, result: object, *parts: RenderableType) -> None:
        """Says the result: as JSON, or else its parts one below the other."""
        if self.as_json:
            self.document(result)
        elif self.console.is_terminal:
            for part in parts:
                self.console.print(part)
        else:
            self._write("".join(f"{row.rstrip()}\n" for part in parts for row in self._rows(part)))

    def document(self, result: object) -> None:
        """Writes one JSON document."""
        written = json.dumps(plain(result), ensure_ascii=False, indent=2)
        # GitHub's runner takes "##[" for a command, wherever it stands; it can only stand in a string.
        self._write(written.replace("##[", "#\\u0023[") + "\n")

    def _write(self, text: str) -> None:
        self.console.file.write(text)
        self.console.file.flush()

    def _rows(self, part: RenderableType) -> list[str]:
        with self.console.capture() as captured:
            self.console.print(part)
        return captured.get().removesuffix("\n").split("\n")

    def say(self, text: str) -> None:
        """Says one more line of the result, however long."""
        self.console.print(Text(clean(text)), soft_wrap=True)

    def note(self, text: str) -> None:
        """Says something beside the result, to stderr."""
        self.errors.print(Text(clean(text)), soft_wrap=True)

    def alarm(self, text: str) -> None:
        """Says to stderr what must not be passed over."""
        self.errors.print(Text(clean(text), style="bold red"), soft_wrap=True)

    def table(self, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> RenderableType:
        """Rows below each other; where they do not fit, one block a row."""
        cells = [[Text(clean(cell), overflow="fold") for cell in row] for row in rows]
        made = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
        for column in columns:
            made.add_column(Text(column, style="bold", overflow="fold"))
        for row in cells:
            made.add_row(*row)
        wanted = self.console.measure(made, options=self.console.options.update(max_width=_WIDEST)).maximum
        return _blocks(columns, cells) if wanted > self.console.width < _NARROW else made

    def scores(self, scores: Sequence[MetricScore]) -> RenderableType:
        """Figures by metric."""
        columns = ("metric", "n", "before", "after", "95 %")
        rows = (
            (s.metric.replace("_", " "), str(s.n), f"{s.before:.2f}", f"{s.after:.2f}", f"{s.low:.2f}–{s.high:.2f}")
            for s in scores
        )
        return self.table(columns, rows)


def facts(given: Iterable[tuple[str, str]]) -> RenderableType:
    """Names and values below each other; what is empty is left out."""
    made = Table.grid(padding=(0, 2, 0, 0))
    for name, value in given:
        if value:
            made.add_row(Text(name, style="bold", no_wrap=True), Text(clean(value), overflow="fold"))
    return made


def line(text: str, style: str = "") -> RenderableType:
    """A line, folded where it is too long."""
    return Text(clean(text), style=style, overflow="fold")


def indented(texts: Iterable[str], by: int = 2) -> RenderableType:
    """Lines that belong to what stands above them."""
    return Padding(Text(clean("\n".join(texts)), overflow="fold"), (0, 0, 0, by))


def _blocks(columns: Sequence[str], rows: Sequence[Sequence[Text]]) -> RenderableType:
    made = Table.grid(padding=(0, 1, 0, 0))
    for i, row in enumerate(rows):
        if i:
            made.add_row()
        for column, cell in zip(columns, row, strict=True):
            if cell.plain:
                made.add_row(Text(column, style="bold", no_wrap=True), cell)
    return made
