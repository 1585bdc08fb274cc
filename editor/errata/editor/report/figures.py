"""Figures of causal traces and value optimisation, fit for a paper.

Drawn in the one style of `style`; nothing is coloured where there is no number.
"""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import FuncFormatter
from numpy.typing import NDArray

from errata.editor.methods import EditResult, RequestOutcome
from errata.editor.report.style import (
    COLOURS,
    GREY,
    MARKERS,
    PAGE,
    RULE,
    drawable,
    frame,
    head,
    scale,
    token,
    whole_numbers,
)
from errata.editor.report.wording import COMPONENTS, averaged_caption, loss_caption, plain, trace_caption
from errata.editor.states import Component
from errata.editor.trace import AveragedTrace, CausalTrace

# By component, whichever of them a trace has.
_LINES = {c: (COLOURS[i], MARKERS[i]) for i, c in enumerate((Component.MLP, Component.ATTENTION, Component.LAYER))}


def trace_heatmap(trace: CausalTrace, *, caption: bool = True) -> Figure:
    """The indirect effect of every site of one question: layers × tokens, one panel a component.

    The constraint's tokens are bold and end in an asterisk. `caption` writes window, n and total effect below.
    """
    labels = [token(t) + (" *" if i in trace.constraint else "") for i, t in enumerate(trace.tokens)]
    figure = _heatmaps(
        [(c, trace.indirect(c).T) for c in trace.components],
        labels,
        f"“{drawable(plain(trace.question, 90))}” → “{drawable(plain(trace.answer, 40))}”",
        f"{trace_caption(trace)};  * constraint" if caption else "",
        "indirect effect",
    )
    for label, i in zip(figure.axes[0].get_yticklabels(), figure.axes[0].get_yticks(), strict=True):
        if int(i) in trace.constraint:
            label.set_fontweight("bold")
    return figure


def aie_heatmap(trace: AveragedTrace, *, caption: bool = True) -> Figure:
    """Average indirect effects by the token's role: layers × roles, one panel a component.

    A role that no question has is left blank.
    """
    return _heatmaps(
        [(c, trace.aie(c).T) for c in trace.components],
        trace.roles,
        "Average indirect effect",
        averaged_caption(trace) if caption else "",
        "AIE",
    )


def aie_lines(trace: AveragedTrace, role: str = "constraint last", *, caption: bool = True) -> Figure:
    """The average indirect effect of each layer at one role, with the standard error of the mean.

    There are no bars where fewer than two questions have the role.
    """
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.add_subplot()
    axes.axhline(0, color=GREY, linewidth=0.8)
    at = trace.roles.index(role)
    for n, component in enumerate(trace.components):
        mean, error = trace.aie(component)[:, at], trace.spread(component)[:, at]
        if (~np.isnan(trace.samples(component)[:, 0, at])).sum() < 2:
            error = np.full_like(error, np.nan)
        colour, marker = _LINES[component]
        # Set aside a little, so that no bar hides another.
        layers = np.arange(len(mean)) + 0.09 * (n - (len(trace.components) - 1) / 2)
        axes.errorbar(
            layers, mean, error, color=colour, marker=marker, markersize=4.5, linewidth=1.4, elinewidth=1.1,
            capsize=2.5, label=COMPONENTS[component],
        )  # fmt: skip
    axes.grid(axis="y", color=RULE, linewidth=0.6)
    axes.legend(frameon=False, fontsize=PAGE.tick)
    whole_numbers(axes, "layer")
    frame(axes, f"AIE at “{role}”")
    said = f"{averaged_caption(trace)};  bars: standard error of the mean"
    head(figure, f"Average indirect effect at “{role}”", said if caption else "")
    return figure


def loss_curves(result: EditResult, *, caption: bool = True) -> Figure:
    """The target loss of each request, step by step; dashed where the value did not converge.

    Up to eight requests are named; of more, the legend only counts both kinds.
    """
    figure = Figure(figsize=(6.4, 3.8), layout="constrained")
    axes = figure.add_subplot()
    named = len(result.outcomes) <= len(COLOURS)
    for i, outcome in enumerate(result.outcomes):
        _curve(axes, outcome, COLOURS[i] if named else COLOURS[0 if outcome.value.converged else 1], named=named)
    stop = result.settings.values.stop_loss
    axes.axhline(stop, color=GREY, linewidth=1, linestyle=":", label=f"stop at {stop:g}")
    if not named:
        missed = len(result.unconverged)
        axes.plot([], [], color=COLOURS[0], label=f"converged ({len(result.outcomes) - missed})")
        axes.plot([], [], color=COLOURS[1], linestyle="--", label=f"not converged ({missed})")
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    axes.grid(axis="y", color=RULE, linewidth=0.6)
    whole_numbers(axes, "step")
    frame(axes, "target loss (nats, log scale)")
    for text in figure.legend(loc="outside right upper", frameon=False, fontsize=PAGE.tick).get_texts():
        text.set_parse_math(False)
    head(figure, "Value optimisation", f"{loss_caption(result)};  dashed: not converged" if caption else "")
    return figure


def _heatmaps(
    panels: Sequence[tuple[Component, NDArray[np.float64]]], rows: Sequence[str], title: str, caption: str, unit: str
) -> Figure:
    """Panels of rows × layers on one colour scale, the rows' labels at the left."""
    layers = panels[0][1].shape[1]
    width = min(2.8, max(1.7, 0.22 * layers))
    height = min(12.0, max(2.6, 1.5 + 0.23 * len(rows)))
    figure = Figure(figsize=(max(5.6, 1.9 + width * len(panels)), height), layout="constrained")
    norm, colours, extend = scale(np.concatenate([values for _, values in panels]))
    image: AxesImage | None = None
    all_axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, (component, values) in zip(all_axes, panels, strict=True):
        image = axes.imshow(values, norm=norm, cmap=colours, aspect="auto", interpolation="nearest")
        axes.set_title(COMPONENTS[component], fontsize=PAGE.label)
        whole_numbers(axes, "layer")
        axes.tick_params(labelsize=PAGE.tick, left=axes is all_axes[0])
    # More labels than fit would overlap: every n-th then.
    every = range(0, len(rows), 1 + len(rows) // 56)
    all_axes[0].set_yticks(list(every), [rows[i] for i in every], fontsize=PAGE.tick, parse_math=False)
    assert image is not None
    bar = figure.colorbar(image, ax=list(all_axes), extend=extend, pad=0.02, aspect=18)
    bar.set_label(unit, fontsize=PAGE.label)
    bar.ax.tick_params(labelsize=PAGE.tick)
    head(figure, title, caption)
    return figure


def _curve(axes: Axes, outcome: RequestOutcome, colour: str, *, named: bool) -> None:
    losses = np.array(outcome.value.losses, dtype=float)
    converged = outcome.value.converged
    axes.plot(
        np.clip(losses, 1e-4, None),  # a log scale has no 0
        color=colour,
        linestyle="-" if converged else "--",
        linewidth=1.5 if named else 0.8,
        marker="o" if len(losses) == 1 else None,
        alpha=1.0 if named else 0.6,
        # A leading underscore would keep it out of the legend.
        label=" " + drawable(plain(outcome.name, 24)) if named else "_",
    )
