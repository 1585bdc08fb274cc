"""Window study: average indirect effects by how many layers are restored at once (Basu et al. 2024, §4; methods.md §2).

Questions with a picture and questions in words alone are two groups. Asked of a multimodal model, the second group is
its own text-only decoder on the same facts: the paper's LLaVA against LLaMA.

Every question is recorded clean and corrupted once. The restored runs of all windows climb the layers together, and a
run that two windows share at the model's ends is made once.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

from errata.editor.errors import InvalidInputError, check_numbers
from errata.editor.measurements.effects import at_role, causal_layers, check_components
from errata.editor.measurements.findings import Findings, Grid, HeatMap, Line, LinePlot, Number, Table, described
from errata.editor.measurements.intervals import INTERVAL, bootstrap_means, interval, number
from errata.editor.measurements.questions import (
    Cancelled,
    Progress,
    Question,
    answered,
    check_corruptions,
    of_one_constraint,
    trace_each,
)
from errata.editor.model import EditableModel
from errata.editor.report.wording import COMPONENTS, counted
from errata.editor.states import Component
from errata.editor.trace import AveragedTrace, CausalTrace, CleanRun, average

_ROLE = "constraint last"
_WIDEST = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class WindowSettings:
    """Which windows are restored and how much of it at once.

    `windows` are in layers, each ≥ 1 and given once, centred on the layer they are reported under; none: 1 to 10, or to
    the model's number of layers. `min_total_effect` is the least total effect, a probability, of a question that
    counts. `max_rows` ≥ 1 bounds the batch, and with it memory.
    """

    windows: tuple[int, ...] = ()
    components: tuple[Component, ...] = (Component.MLP, Component.ATTENTION)
    min_total_effect: float = 0.1
    max_rows: int = 256

    def __post_init__(self) -> None:
        check_numbers(self, at_least={"max_rows": 1, "min_total_effect": -1}, above={})
        if any(type(w) is not int or w < 1 for w in self.windows) or len(set(self.windows)) < len(self.windows):
            raise InvalidInputError(
                f"the windows {self.windows} are not layers to restore; give each once, at least 1", field="windows"
            )
        check_components(self.components)


@dataclass(frozen=True, slots=True, kw_only=True)
class WindowGroup:
    """The questions of one kind: their average indirect effects, one for each window."""

    label: str
    averages: tuple[AveragedTrace, ...]

    @property
    def n(self) -> int:
        """Questions."""
        return len(self.averages[0].traces)

    @property
    def totals(self) -> Float[NDArray[np.float64], " questions"]:
        """Total effects."""
        return np.array([t.total_effect for t in self.averages[0].traces])

    def samples(self, component: Component) -> Float[NDArray[np.float64], "questions windows layers"]:
        """Indirect effects at the constraint's last token."""
        return np.stack([at_role(a, component, _ROLE) for a in self.averages], axis=1)

    def best(self, component: Component) -> Line:
        """By window, the effect of the best layer as a share of the total effect; the interval knows of the choice."""
        samples = self.samples(component)
        low, high = None, None
        if len(samples) > 1:
            low, high = interval(bootstrap_means(samples).max(-1) / bootstrap_means(self.totals)[:, None])
        return Line(
            label=self.label,
            values=samples.mean(0).max(-1) / self.totals.mean(),
            low=low,
            high=high,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class WindowResult:
    """The groups that had questions that count, those with a picture first."""

    settings: WindowSettings
    windows: tuple[int, ...]
    groups: tuple[WindowGroup, ...]
    skipped: tuple[str, ...]

    def findings(self) -> Findings:
        """By window, the best layer's effect of both groups; by window and layer, all effects; the causal layers."""
        components = self.settings.components
        return Findings(
            kind="windows",
            title=f"Windows of {self.windows[0]} to {self.windows[-1]} layers restored",
            settings={**described(self.settings), "windows": ", ".join(str(w) for w in self.windows)},
            n=sum(g.n for g in self.groups),
            numbers=tuple(self._numbers()),
            plots=(*(self._by_window(c) for c in components), *(self._by_layer(c) for c in components)),
            tables=tuple(self._table(c) for c in components),
            skipped=self.skipped,
        )

    def _numbers(self) -> Iterator[Number]:
        for group in self.groups:
            yield number(f"total effect, {group.label}", group.totals)
            for component in self.settings.components:
                best = group.best(component)
                for i in sorted({0, len(self.windows) - 1}):
                    yield Number(
                        name=f"{COMPONENTS[component]}, {group.label}: best layer, window {self.windows[i]}",
                        value=float(best.values[i]),
                        unit="share of the total effect",
                        n=group.n,
                        low=None if best.low is None else float(best.low[i]),
                        high=None if best.high is None else float(best.high[i]),
                    )

    def _counts(self) -> str:
        return "; ".join(f"{g.label}: n = {counted(g.n, 'question')}" for g in self.groups)

    def _by_window(self, component: Component) -> LinePlot:
        return LinePlot(
            name=f"windows_{component.value}",
            title=f"{COMPONENTS[component]}: best layer at the constraint's last token",
            x_label="window (layers)",
            y_label="AIE (share of total effect)",
            x=np.array(self.windows, dtype=np.float64),
            lines=tuple(g.best(component) for g in self.groups),
            caption=f"Average indirect effect; the layer is chosen for each window; {self._counts()}; {INTERVAL}",
        )

    def _by_layer(self, component: Component) -> HeatMap:
        shares = [g.samples(component).mean(0) / g.totals.mean() for g in self.groups]
        return HeatMap(
            name=f"windows_layers_{component.value}",
            title=f"{COMPONENTS[component]} restored at the constraint's last token",
            x_label="layer",
            y_label="window (layers)",
            unit="share of the total effect",
            rows=tuple(str(w) for w in self.windows),
            columns=tuple(str(i) for i in range(shares[0].shape[1])),
            grids=tuple(Grid(label=g.label, values=s) for g, s in zip(self.groups, shares, strict=True)),
            caption=self._counts(),
        )

    def _table(self, component: Component) -> Table:
        rows = []
        for group in self.groups:
            samples = group.samples(component)
            for w, window in enumerate(self.windows):
                by_layer = samples[:, w]
                best = int(by_layer.mean(0).argmax())
                effect = by_layer[:, best].mean()
                rows.append(
                    (
                        group.label,
                        str(window),
                        str(best),
                        f"{effect:.3f}",
                        f"{effect / group.totals.mean():.3f}",
                        causal_layers(by_layer, group.totals),
                    )
                )
        return Table(
            name=f"windows_{component.value}",
            title=f"{COMPONENTS[component]} by window",
            columns=("questions", "window", "best layer", "AIE", "share", "layers that restore half"),
            rows=tuple(rows),
        )


def measure_windows(
    model: EditableModel,
    questions: Sequence[Question],
    settings: WindowSettings = WindowSettings(),
    *,
    progress: Progress | None = None,
    cancelled: Cancelled | None = None,
) -> WindowResult:
    """Traces the questions that the model answers as they say, each with one corrupted constraint, by every window.

    Raises InvalidInputError for a question that cannot be traced, CorruptionFailedError where none is left,
    CancelledError.
    """
    for i, question in enumerate(questions):
        check_corruptions(question, f"questions[{i}]")
    windows = settings.windows or tuple(range(1, min(_WIDEST, len(model.layers)) + 1))
    answers, skipped = answered(model, questions)
    kept = of_one_constraint(answers, skipped, "windows are studied with one")
    traces = trace_each(
        kept,
        skipped,
        lambda _, question, answer: _traced(model, question, answer, windows, settings, cancelled),
        progress=progress,
        cancelled=cancelled,
    )
    return WindowResult(settings=settings, windows=windows, groups=_groups(traces), skipped=tuple(skipped))


def _traced(
    model: EditableModel,
    question: Question,
    answer: str,
    windows: Sequence[int],
    settings: WindowSettings,
    cancelled: Cancelled | None,
) -> tuple[str, tuple[CausalTrace, ...]]:
    """The group that the question is in, and its trace by each window."""
    clean = CleanRun(model, question.prompt, question.constraints, answer, settings.components)
    corrupted = clean.corrupt(question.corruptions, min_total_effect=settings.min_total_effect)
    label = "with the picture" if question.prompt.images else "in words alone"
    return label, clean.trace(corrupted, windows, max_rows=settings.max_rows, cancelled=cancelled)


def _groups(traces: Sequence[tuple[str, tuple[CausalTrace, ...]]]) -> tuple[WindowGroup, ...]:
    """The average of each group that has questions, with the picture first."""
    labels = sorted({label for label, _ in traces}, reverse=True)
    return tuple(
        WindowGroup(
            label=label,
            averages=tuple(average(of_window) for of_window in zip(*(t for g, t in traces if g == label), strict=True)),
        )
        for label in labels
    )
