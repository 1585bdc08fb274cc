"""Tables for a terminal of 80 columns or more. They say the same without colour, so they can be piped.

Architecture invariant: a model's words reach rich only as `Text`, never as markup.
"""

import math

import matplotlib
import numpy as np
from numpy.typing import NDArray
from rich import box
from rich.color import Color
from rich.console import Group
from rich.style import Style
from rich.table import Table
from rich.text import Text

from errata.editor.evaluation import Evaluation
from errata.editor.methods import EditResult
from errata.editor.report.facts import edited_facts
from errata.editor.report.wording import MISSING, averaged_caption, interval, loss, loss_caption, percent, plain
from errata.editor.states import Component
from errata.editor.trace import AveragedTrace

_GOOD, _BAD = "green", "bold red"


def scores_table(evaluation: Evaluation) -> Table:
    """Every metric: probes, share right before and after by generation, 95 % interval, teacher forced."""
    table = _table(
        "Scores",
        f"before, after: generated answers; forced: teacher forced, before → after\n"
        f"harmonic mean {percent(evaluation.harmonic_mean)}   drift {evaluation.drift:.4f} nats\n"
        f"fluency {evaluation.fluency_before:.2f} → {evaluation.fluency:.2f} bits",
    )
    table.add_column("metric")
    for heading in ("n", "before", "after", "95 %", "forced"):
        table.add_column(heading, justify="right", no_wrap=True)
    for s in evaluation.scores:
        table.add_row(
            s.metric.value,
            f"{s.n:,}",
            percent(s.before),
            Text(percent(s.after), style="bold"),
            interval(s.interval),
            f"{percent(s.forced_before)} → {percent(s.forced)}",
        )
    return table


def answers_table(result: EditResult, evaluation: Evaluation) -> Table:
    """Each request's own question before and after the edit; one that failed stands for its request."""
    facts = edited_facts(result, evaluation)
    table = _table("Answers", f"{sum(f.installed for f in facts)} of {len(facts)} facts are answered as asked")
    for heading in ("request", "question", "before", "after", "target"):
        table.add_column(heading, overflow="fold")
    table.add_column("right", overflow="fold")
    for fact in facts:
        probe = fact.shown
        table.add_row(
            _text(fact.outcome.name),
            _text(probe.probe.prompt.text if probe else MISSING),
            _text(probe.before if probe else fact.outcome.before),
            _text(probe.after if probe else MISSING),
            _text(probe.expected if probe else fact.outcome.target),
            Text(fact.verdict, style=_GOOD if fact.installed else _BAD),
        )
    return table


def outcomes_table(result: EditResult) -> Table:
    """How each value's optimisation went: loss first → last, steps, and whether it converged."""
    table = _table("Values", f"{loss_caption(result)}; losses in nats")
    table.add_column("request", overflow="fold")
    table.add_column("target", overflow="fold")
    table.add_column("loss", justify="right", no_wrap=True)
    table.add_column("steps", justify="right", no_wrap=True)
    table.add_column("KL", justify="right", no_wrap=True)
    table.add_column("outcome", no_wrap=True)
    for o in result.outcomes:
        losses = o.value.losses
        table.add_row(
            _text(o.name),
            _text(o.target),
            f"{loss(losses[0])} → {loss(losses[-1])}" if losses else MISSING,
            str(max(0, len(losses) - 1)),
            loss(o.value.kl),
            Text("converged", style=_GOOD) if o.value.converged else Text("NOT converged", style=_BAD),
        )
    return table


def aie_tables(trace: AveragedTrace) -> Group:
    """Average indirect effects of each component as coloured numbers, layers × roles; the largest has an asterisk."""
    high = max(0.01, max(float(np.nanmax(np.abs(trace.aie(c)), initial=0.0)) for c in trace.components))
    return Group(*(part for c in trace.components for part in (_aie_table(trace, c, high), "")))


def _aie_table(trace: AveragedTrace, component: Component, high: float) -> Table:
    table = _table(f"Average indirect effect: {component.value}", averaged_caption(trace))
    table.add_column("layer", justify="right")
    for role in trace.roles:
        table.add_column(role, justify="right", width=10)
    effects = trace.aie(component)
    largest = float(np.nanmax(effects, initial=-math.inf))
    for layer, row in enumerate(effects):
        table.add_row(str(layer), *(_cell(e, high, largest=e == largest) for e in _floats(row)))
    return table


def _floats(row: NDArray[np.float64]) -> list[float]:
    return [float(e) for e in row]


def _cell(effect: float, high: float, *, largest: bool) -> Text:
    """One number on its colour, red above 0 and blue below; nothing where there is none."""
    if math.isnan(effect):
        return Text("")
    r, g, b, _ = matplotlib.colormaps["RdBu_r"](0.5 + 0.5 * effect / high)
    dark = 0.299 * r + 0.587 * g + 0.114 * b < 0.5
    style = Style(
        color="#ffffff" if dark else "#000000",
        bgcolor=Color.from_rgb(255 * r, 255 * g, 255 * b),
        bold=largest,
    )
    # −0.00 is 0.00.
    return Text(f"{'*' if largest else ''}{round(effect, 2) + 0.0:.2f}".replace("-", "−").rjust(10), style=style)


def _table(title: str, caption: str) -> Table:
    return Table(
        title=Text(title, style="bold"),
        caption=Text(caption, style="dim"),
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )


def _text(words: str) -> Text:
    return Text(plain(words, 120))
