"""What changed, as tables for a terminal of 80 columns or more."""

from collections.abc import Iterator

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from errata.client.check.judging import Change, Outcome, Report, Verdict
from errata.client.check.output.words import compared, question, state, verdict
from errata.client.cli.output import facts
from errata.client.cli.plain import clean

_NARROW = 70
_WIDEST_ID, _MARK, _GAPS = 34, len("tolerated"), 8
"""Columns of text: the widest that an id is kept whole at, a probe's state, and what is between the five of a row."""

_STYLES = {"broken": "bold red", "failing": "red", "fixed": "green", "passed": "dim"}


def tables(report: Report, *, everything: bool, width: int) -> Iterator[RenderableType]:
    """What changed and what fails, or every probe; the thresholds; the notes; the verdict. In `width` columns."""
    shown = [o for o in report.outcomes if everything or o.faults or o.change is Change.FIXED]
    if shown:
        yield _probes(report, shown, width) if width >= _NARROW else _blocks(shown)
        yield Text()
    if report.shares:
        yield _shares(report)
        yield Text()
    for note in report.notes:
        yield _text(f"note: {note}", "yellow")
    yield _text(verdict(report), "bold green" if report.passed else "bold red")


def _probes(report: Report, shown: list[Outcome], width: int) -> Table:
    made = _table(f"{compared(report)}: {report.checks.path}", "", "probe", "wanted", "before", "now")
    # Ids are what one searches for, so the columns after them are folded first.
    named = min(max(len(f"{o.probe.id} :{o.probe.line}") for o in shown), _WIDEST_ID)
    for column in made.columns[2:]:
        column.max_width = max((width - _MARK - named - _GAPS) // 3, 1)
    for outcome in shown:
        probe, word = outcome.probe, state(outcome)
        mark = _text(word, _STYLES[word])
        if outcome.verdict is Verdict.TOLERATED:
            mark.append("\ntolerated", "yellow")
        asked = _text(probe.id, "bold").append(f" :{probe.line}\n{clean(question(probe))}", "dim not bold")
        before = "" if outcome.before is None else outcome.before
        made.add_row(mark, asked, _text(probe.wanted), _text(before), _text(outcome.answer))
    return made


def _blocks(shown: list[Outcome]) -> RenderableType:
    """One below the other, where a row has no room."""
    parts: list[RenderableType] = []
    for outcome in shown:
        probe = outcome.probe
        rows = [(state(outcome), f"{probe.id} :{probe.line}"), ("question", question(probe)), ("wanted", probe.wanted)]
        parts += [facts([*rows, ("before", outcome.before or ""), ("now", outcome.answer)]), Text()]
    return Group(*parts[:-1])


def _shares(report: Report) -> Table:
    made = _table("Thresholds", "", "tag", "probes", "share", "least")
    for share in report.shares:
        mark = _text("met", "green") if share.met else _text("missed", "bold red")
        cells = (share.tag, str(share.probes), f"{share.share:.3f}", f"{share.least:g}")
        made.add_row(mark, *map(_text, cells))
    return made


def _table(title: str, *columns: str) -> Table:
    made = Table(title=Text(clean(title)), title_justify="left", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in columns:
        made.add_column(Text(column, style="bold"), overflow="fold")
    made.title_style = "bold"
    return made


def _text(text: str, style: str = "") -> Text:
    return Text(clean(text), style=style, overflow="fold")
