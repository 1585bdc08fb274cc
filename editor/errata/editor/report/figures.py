"""Figures of causal traces and value optimisation, fit for a paper.

Made with matplotlib's objects alone: no pyplot, no global state, so calls may run in any thread. Colours are told
apart by colour-blind readers and in grey; nothing is coloured where there is no number.
"""

import io
from collections.abc import Sequence
from functools import cache
from textwrap import fill

import numpy as np
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import FuncFormatter, MaxNLocator
from numpy.typing import NDArray

from errata.editor.methods import EditResult, RequestOutcome
from errata.editor.report.wording import averaged_caption, loss_caption, plain, trace_caption
from errata.editor.states import Component
from errata.editor.trace import AveragedTrace, CausalTrace

_NAMES = {Component.MLP: "MLP", Component.ATTENTION: "Attention", Component.LAYER: "Whole layer"}
# Okabe & Ito's colours; the markers tell the lines apart without them.
_LINES = {Component.MLP: ("#0072B2", "o"), Component.ATTENTION: ("#D55E00", "s"), Component.LAYER: ("#009E73", "^")}
_CURVES = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#7A6A00", "#000000")
_GREY = "#555555"
_TITLE, _LABEL, _TICK = 11, 10, 9


def trace_heatmap(trace: CausalTrace, *, caption: bool = True) -> Figure:
    """The indirect effect of every site of one question: layers × tokens, one panel a component.

    The constraint's tokens are bold and end in an asterisk. `caption` writes window, n and total effect below.
    """
    labels = [_token(t) + (" *" if i in trace.constraint else "") for i, t in enumerate(trace.tokens)]
    figure = _heatmaps(
        [(c, trace.indirect(c).T) for c in trace.components],
        labels,
        f"“{_drawable(plain(trace.question, 90))}” → “{_drawable(plain(trace.answer, 40))}”",
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
    axes.axhline(0, color=_GREY, linewidth=0.8)
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
            capsize=2.5, label=_NAMES[component],
        )  # fmt: skip
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    axes.legend(frameon=False, fontsize=_TICK)
    _whole_numbers(axes, "layer")
    _style(axes, f"AIE at “{role}”")
    said = f"{averaged_caption(trace)};  bars: standard error of the mean"
    _head(figure, f"Average indirect effect at “{role}”", said if caption else "")
    return figure


def loss_curves(result: EditResult, *, caption: bool = True) -> Figure:
    """The target loss of each request, step by step; dashed where the value did not converge.

    Up to eight requests are named; of more, the legend only counts both kinds.
    """
    figure = Figure(figsize=(6.4, 3.8), layout="constrained")
    axes = figure.add_subplot()
    named = len(result.outcomes) <= len(_CURVES)
    for i, outcome in enumerate(result.outcomes):
        _curve(axes, outcome, _CURVES[i] if named else _CURVES[0 if outcome.value.converged else 5], named=named)
    stop = result.settings.values.stop_loss
    axes.axhline(stop, color=_GREY, linewidth=1, linestyle=":", label=f"stop at {stop:g}")
    if not named:
        missed = len(result.unconverged)
        axes.plot([], [], color=_CURVES[0], label=f"converged ({len(result.outcomes) - missed})")
        axes.plot([], [], color=_CURVES[5], linestyle="--", label=f"not converged ({missed})")
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    _whole_numbers(axes, "step")
    _style(axes, "target loss (nats, log scale)")
    for text in figure.legend(loc="outside right upper", frameon=False, fontsize=_TICK).get_texts():
        text.set_parse_math(False)
    _head(figure, "Value optimisation", f"{loss_caption(result)};  dashed: not converged" if caption else "")
    return figure


def png(figure: Figure, dpi: int = 160) -> bytes:
    """The figure as a PNG file; the same figure gives the same bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi, facecolor="white", metadata={"Software": None})
    return buffer.getvalue()


def _heatmaps(
    panels: Sequence[tuple[Component, NDArray[np.float64]]], rows: Sequence[str], title: str, caption: str, unit: str
) -> Figure:
    """Panels of rows × layers on one colour scale, the rows' labels at the left."""
    layers = panels[0][1].shape[1]
    width = min(2.8, max(1.7, 0.22 * layers))
    height = min(12.0, max(2.6, 1.5 + 0.23 * len(rows)))
    figure = Figure(figsize=(max(5.6, 1.9 + width * len(panels)), height), layout="constrained")
    norm, colours, extend = _scale(np.concatenate([values for _, values in panels]))
    image: AxesImage | None = None
    all_axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, (component, values) in zip(all_axes, panels, strict=True):
        image = axes.imshow(values, norm=norm, cmap=colours, aspect="auto", interpolation="nearest")
        axes.set_title(_NAMES[component], fontsize=_LABEL)
        _whole_numbers(axes, "layer")
        axes.tick_params(labelsize=_TICK, left=axes is all_axes[0])
    # More labels than fit would overlap: every n-th then.
    every = range(0, len(rows), 1 + len(rows) // 56)
    all_axes[0].set_yticks(list(every), [rows[i] for i in every], fontsize=_TICK, parse_math=False)
    assert image is not None
    bar = figure.colorbar(image, ax=list(all_axes), extend=extend, pad=0.02, aspect=18)
    bar.set_label(unit, fontsize=_LABEL)
    bar.ax.tick_params(labelsize=_TICK)
    _head(figure, title, caption)
    return figure


def _scale(values: NDArray[np.float64]) -> tuple[Normalize, str, str]:
    """From 0 up, perceptually uniform; around 0 and diverging where restoring does real harm somewhere."""
    finite = values[np.isfinite(values)]
    # A map of nothing must not look like a map of something.
    high, low = max(0.01, finite.max(initial=0.0)), finite.min(initial=0.0)
    if low < -0.1 * high:
        bound = max(high, -low)
        return Normalize(-bound, bound), "RdBu_r", "neither"
    return Normalize(0, high), "viridis", "min" if low < -0.001 else "neither"


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
        label=" " + _drawable(plain(outcome.name, 24)) if named else "_",
    )


def _head(figure: Figure, title: str, caption: str) -> None:
    """A title, and at the foot, smaller, what the figure must say wherever it is pasted."""
    width = figure.get_size_inches()[0]
    title, caption = fill(title, int(9.5 * width)), fill(caption, int(15 * width))
    figure.suptitle(title, x=0.01, ha="left", fontsize=_TITLE, fontweight="bold", parse_math=False)
    if caption:
        figure.supxlabel(caption, x=0.01, ha="left", fontsize=_TICK, color=_GREY, parse_math=False)


def _style(axes: Axes, ylabel: str) -> None:
    axes.set_ylabel(ylabel, fontsize=_LABEL)
    axes.tick_params(labelsize=_TICK)
    axes.spines[["top", "right"]].set_visible(False)


def _whole_numbers(axes: Axes, label: str) -> None:
    axes.set_xlabel(label, fontsize=_LABEL)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True, min_n_ticks=1))


def _token(token: str) -> str:
    return _drawable(plain(token, 22)).strip() or "␣"


@cache
def _known() -> frozenset[int]:
    return frozenset(font_manager.get_font(font_manager.findfont("DejaVu Sans")).get_charmap())


def _drawable(text: str) -> str:
    """The text with what the font cannot draw replaced; matplotlib would warn and draw boxes."""
    return "".join(c if ord(c) in _known() else "\N{REPLACEMENT CHARACTER}" for c in text)
