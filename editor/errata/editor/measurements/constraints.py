"""Questions of several constraints: what changes when an answer needs a picture and a fact in words.

Every constraint is corrupted alone and all of them together, each time with a causal trace of its own (Basu et al.
2024, §4; methods.md §1, §2), and the questions of one constraint stand beside: the paper's single against
multi-constraint figure.

A question's clean run is recorded once for all its corruptions. A restored run starts at the token that it restores, in
the corrupted run whichever spans that corrupts; what stands before the first corrupted token is clean and not run.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import chain

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

from errata.editor.datasets.records import Kind
from errata.editor.errors import CorruptionFailedError, check_numbers
from errata.editor.measurements.effects import causal_layers, check_components, layer_plot, share
from errata.editor.measurements.findings import Findings, Grid, HeatMap, Line, LinePlot, Plot, Table, described
from errata.editor.measurements.intervals import number
from errata.editor.measurements.questions import (
    Cancelled,
    Progress,
    Question,
    answered,
    check_corruptions,
    trace_each,
)
from errata.editor.model import EditableModel
from errata.editor.report.wording import COMPONENTS, counted
from errata.editor.states import Component
from errata.editor.trace import CausalTrace, CleanRun, CorruptedRun, nan_mean


class Series(StrEnum):
    """Questions of one constraint or of several, and which of them is corrupted: a line of the comparison."""

    SINGLE_VISUAL = "single visual"
    SINGLE_TEXTUAL = "single textual"
    MULTI_VISUAL = "multi visual"
    MULTI_TEXTUAL = "multi textual"
    MULTI_ALL = "multi all"


ROLES = (*(f"{kind.value} {part}" for kind in Kind for part in ("first", "middle", "last")), "other", "last")
"""What a token can be: in a constraint of either kind, the prompt's last one, or any other from the first constraint
on. A constraint of one token has only a last one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ConstraintSettings:
    """What is restored and how much of it at once.

    `window` is in layers, ≥ 1, centred on the layer it is reported under. `min_total_effect` is the least total effect,
    a probability, that every corruption of a question that counts must have. `max_rows` ≥ 1 bounds the batch, and with
    it memory.
    """

    components: tuple[Component, ...] = (Component.MLP, Component.ATTENTION, Component.LAYER)
    window: int = 1
    min_total_effect: float = 0.1
    max_rows: int = 256

    def __post_init__(self) -> None:
        check_numbers(self, at_least={"window": 1, "max_rows": 1, "min_total_effect": -1}, above={})
        check_components(self.components)


@dataclass(frozen=True, slots=True, kw_only=True)
class ConstraintTrace:
    """One question under one corruption. `corrupted` are the constraints, by their places in the question, that were.

    `spans` are the tokens of each constraint on the trace's axis, which begins at the first token of any; `kinds` say
    what each is. `together` are the indirect effects of restoring all corrupted constraints at once, each at its last
    token: where both are needed, one alone restores nothing.
    """

    index: int
    kinds: tuple[Kind, ...]
    spans: tuple[range, ...]
    corrupted: tuple[int, ...]
    trace: CausalTrace
    together: Float[NDArray[np.float64], "components layers"]

    @property
    def series(self) -> Series:
        """The line that this trace counts for."""
        if len(self.kinds) == 1:
            return Series.SINGLE_VISUAL if self.kinds[0] is Kind.VISUAL else Series.SINGLE_TEXTUAL
        if len(self.corrupted) == len(self.kinds):
            return Series.MULTI_ALL
        return Series.MULTI_VISUAL if self.kinds[self.corrupted[0]] is Kind.VISUAL else Series.MULTI_TEXTUAL

    def by_role(self, component: Component) -> Float[NDArray[np.float64], "layers roles"]:
        """Indirect effects, several tokens of one role as their mean; NaN where there is none."""
        effects = self.trace.indirect(component)
        tokens = self._tokens(effects.shape[1])
        columns = [effects[:, tokens[r]].mean(1) if tokens[r] else np.full(len(effects), np.nan) for r in ROLES]
        return np.stack(columns, axis=1)

    def _tokens(self, length: int) -> dict[str, list[int]]:
        found: dict[str, list[int]] = {role: [] for role in ROLES}
        for kind, span in zip(self.kinds, self.spans, strict=True):
            found[f"{kind.value} first"] += span[:1] if len(span) > 1 else []
            found[f"{kind.value} middle"] += span[1:-1]
            found[f"{kind.value} last"] += span[-1:]
        taken = {t for tokens in found.values() for t in tokens}
        found["other"] = [t for t in range(length - 1) if t not in taken]
        found["last"] = [t for t in (length - 1,) if t not in taken]
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class ConstraintResult:
    """The traces of every question that counts, all its corruptions one after another."""

    settings: ConstraintSettings
    traces: tuple[ConstraintTrace, ...]
    skipped: tuple[str, ...]

    @property
    def series(self) -> tuple[Series, ...]:
        """Those that have questions."""
        return tuple(s for s in Series if any(t.series is s for t in self.traces))

    def samples(self, series: Series, component: Component) -> Float[NDArray[np.float64], "questions layers roles"]:
        """Indirect effects by role, corruptions of one series in one question as their mean; NaN for no such token."""
        return np.stack([np.mean([t.by_role(component) for t in own], 0) for own in self._of(series)])

    def totals(self, series: Series) -> Float[NDArray[np.float64], " questions"]:
        """Total effects."""
        return np.array([np.mean([t.trace.total_effect for t in own]) for own in self._of(series)])

    def at(
        self, series: Series, component: Component, role: str
    ) -> tuple[Float[NDArray[np.float64], "questions layers"], Float[NDArray[np.float64], " questions"]]:
        """Indirect effects at one role, and total effects, of the questions that have such a token."""
        samples = self.samples(series, component)[:, :, ROLES.index(role)]
        having = ~np.isnan(samples).any(1)
        return samples[having], self.totals(series)[having]

    def together(self, series: Series, component: Component) -> Float[NDArray[np.float64], "questions layers"]:
        """Indirect effects of restoring all corrupted constraints at once, each at its last token."""
        c = self.settings.components.index(component)
        return np.stack([np.mean([t.together[c] for t in own], 0) for own in self._of(series)])

    def findings(self) -> Findings:
        """Single beside multi-constraint questions by layer, by role of the token, and the causal layers."""
        components = self.settings.components
        plots: tuple[Plot, ...] = (
            *(self._comparison(c) for c in components),
            *(self._at_last(c) for c in components),
            *(self._roles(c) for c in components),
        )
        return Findings(
            kind="constraints",
            title=f"Constraints corrupted alone and together, window of {counted(self.settings.window, 'layer')}",
            settings=described(self.settings),
            n=len({t.index for t in self.traces}),
            numbers=tuple(number(f"total effect, {s.value}", self.totals(s)) for s in self.series),
            plots=tuple(p for p in plots if not isinstance(p, LinePlot) or p.lines),
            tables=tuple(self._table(c) for c in components),
            skipped=self.skipped,
        )

    def _of(self, series: Series) -> list[list[ConstraintTrace]]:
        found: dict[int, list[ConstraintTrace]] = {}
        for t in self.traces:
            if t.series is series:
                found.setdefault(t.index, []).append(t)
        return list(found.values())

    def _counts(self) -> str:
        return "; ".join(f"{s.value.capitalize()}: n = {counted(len(self._of(s)), 'question')}" for s in self.series)

    def _comparison(self, component: Component) -> LinePlot:
        lines = [
            self._line(
                s, component, f"{kind.value} last", f"all, at {kind.value}" if s is Series.MULTI_ALL else s.value
            )
            for s in self.series
            for kind in _corrupted_kinds(s)
        ]
        if Series.MULTI_ALL in self.series:
            both = self.together(Series.MULTI_ALL, component)
            lines.append(share("all, together", both, self.totals(Series.MULTI_ALL)))
        return self._plot(
            f"single_multi_{component.value}", f"{COMPONENTS[component]} at the constraint's last token", lines
        )

    def _at_last(self, component: Component) -> LinePlot:
        lines = [self._line(s, component, "last", s.value) for s in self.series]
        return self._plot(
            f"single_multi_last_{component.value}", f"{COMPONENTS[component]} at the prompt's last token", lines
        )

    def _line(self, series: Series, component: Component, role: str, label: str) -> Line | None:
        samples, totals = self.at(series, component, role)
        return share(label, samples, totals) if len(samples) else None

    def _plot(self, name: str, title: str, lines: Sequence[Line | None]) -> LinePlot:
        return layer_plot(
            name,
            title,
            [line for line in lines if line is not None],
            unit="share of total effect",
            caption=self._counts(),
        )

    def _roles(self, component: Component) -> HeatMap:
        """Means over the questions that have such a token; a role that none has stays empty."""
        means = [nan_mean(self.samples(s, component)) / self.totals(s).mean() for s in self.series]
        return HeatMap(
            name=f"roles_{component.value}",
            title=f"{COMPONENTS[component]} by layer and token",
            x_label="layer",
            y_label="token",
            unit="share of the total effect",
            rows=ROLES,
            columns=tuple(str(i) for i in range(means[0].shape[0])),
            grids=tuple(Grid(label=s.value, values=m.T) for s, m in zip(self.series, means, strict=True)),
            caption=self._counts(),
        )

    def _table(self, component: Component) -> Table:
        return Table(
            name=f"causal_layers_{component.value}",
            title=f"{COMPONENTS[component]}: causal layers",
            columns=("questions", "token", "best layer", "share of the total effect", "layers that restore half"),
            rows=tuple(row for series in self.series for row in self._rows(series, component)),
        )

    def _rows(self, series: Series, component: Component) -> Iterator[tuple[str, ...]]:
        found = {
            role: self.at(series, component, role)
            for role in (*(f"{kind.value} last" for kind in _corrupted_kinds(series)), "last")
        }
        if series is Series.MULTI_ALL:
            found["all constraints, last"] = self.together(series, component), self.totals(series)
        for role, (samples, totals) in found.items():
            if len(samples):
                best = int(samples.mean(0).argmax())
                effect = float(samples[:, best].mean() / totals.mean())
                yield series.value, role, str(best), f"{effect:.3f}", causal_layers(samples, totals)


def measure_constraints(
    model: EditableModel,
    questions: Sequence[Question],
    settings: ConstraintSettings = ConstraintSettings(),
    *,
    progress: Progress | None = None,
    cancelled: Cancelled | None = None,
) -> ConstraintResult:
    """Traces the questions that the model answers as they say, of one constraint and of several.

    A question counts where each of its corruptions corrupts, so that all lines of several constraints are of the same
    questions. Raises InvalidInputError for a question that cannot be traced, CorruptionFailedError where none is left,
    CancelledError.
    """
    for i, question in enumerate(questions):
        check_corruptions(question, f"questions[{i}]")
    kept, skipped = answered(model, questions)
    traces = trace_each(
        kept,
        skipped,
        lambda i, question, answer: _traced(model, i, question, answer, settings, cancelled),
        progress=progress,
        cancelled=cancelled,
    )
    return ConstraintResult(settings=settings, traces=tuple(chain.from_iterable(traces)), skipped=tuple(skipped))


def _traced(
    model: EditableModel,
    index: int,
    question: Question,
    answer: str,
    settings: ConstraintSettings,
    cancelled: Cancelled | None,
) -> list[ConstraintTrace]:
    clean = CleanRun(model, question.prompt, question.constraints, answer, settings.components)
    n = len(question.constraints)
    together = tuple(range(n))
    # All are tried before any is traced: a question counts only where each of them corrupts.
    runs = {chosen: _corrupted(clean, question, chosen, settings) for chosen in (*((i,) for i in range(n)), together)}
    return [
        ConstraintTrace(
            index=index,
            kinds=tuple(map(question.kind, range(n))),
            spans=tuple(range(s.start - clean.start, s.stop - clean.start) for s in clean.spans),
            corrupted=chosen,
            trace=clean.trace(run, (settings.window,), max_rows=settings.max_rows, cancelled=cancelled)[0],
            together=clean.together(
                run, [clean.spans[i][-1] for i in chosen], settings.window, max_rows=settings.max_rows
            )
            - run.probabilities.whole,
        )
        for chosen, run in runs.items()
    ]


def _corrupted(
    clean: CleanRun, question: Question, chosen: tuple[int, ...], settings: ConstraintSettings
) -> CorruptedRun:
    corruptions = [c if i in chosen else None for i, c in enumerate(question.corruptions)]
    try:
        return clean.corrupt(corruptions, min_total_effect=settings.min_total_effect)
    except CorruptionFailedError as error:
        spoilt = " and ".join(repr(question.constraints[i].text) for i in chosen)
        raise CorruptionFailedError(f"{spoilt} corrupted: {error}") from None


def _corrupted_kinds(series: Series) -> tuple[Kind, ...]:
    match series:
        case Series.SINGLE_VISUAL | Series.MULTI_VISUAL:
            return (Kind.VISUAL,)
        case Series.SINGLE_TEXTUAL | Series.MULTI_TEXTUAL:
            return (Kind.TEXTUAL,)
        case Series.MULTI_ALL:
            return (Kind.VISUAL, Kind.TEXTUAL)
