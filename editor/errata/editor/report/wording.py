"""Numbers, answers and captions, worded the same in every figure, table and page."""

import math

from errata.editor.evaluation import Metric
from errata.editor.methods import EditResult
from errata.editor.states import Component
from errata.editor.trace import AveragedTrace, CausalTrace

MEANINGS = {
    Metric.EFFICACY: "the edited questions themselves",
    Metric.IMAGE_GENERALIZATION: "the same questions about other pictures of the same thing",
    Metric.PHRASING_GENERALIZATION: "the same facts asked for in other words",
    Metric.OTHER_SUBJECTS: "the same questions about other things, whose answers must stay",
    Metric.SAME_IMAGE: "other questions about the edited pictures, whose answers must stay",
    Metric.UNRELATED: "prompts that have nothing to do with the edit, whose answers must stay",
    Metric.PORTABILITY: "questions whose answers follow from the new facts",
}
"""What the probes of each metric ask."""

COMPONENTS = {Component.MLP: "MLP", Component.ATTENTION: "Attention", Component.LAYER: "Whole layer"}
"""What figures call them."""

MISSING = "–"
"""Stands where there is no number."""


def percent(share: float) -> str:
    """A share between 0 and 1 in whole percent. Only all is 100 % and only none is 0 %."""
    if not math.isfinite(share):
        return MISSING
    if 0 < share < 1:
        return f"{min(99.9, max(0.1, 100 * share)):.{1 if share < 0.01 or share > 0.99 else 0}f} %"
    return f"{100 * share:.0f} %"


def interval(bounds: tuple[float, float]) -> str:
    """An interval of shares in whole percent, without the sign: `81–99`."""
    return "–".join(f"{100 * b:.0f}" for b in bounds)


def loss(nats: float) -> str:
    """A loss in nats: `8.31`, `0.017`, `2.1e-04`."""
    if not math.isfinite(nats) or nats == 0:
        return f"{nats:.0f}"
    if 0.001 <= nats < 1000:
        return f"{nats:.2f}" if nats >= 1 else f"{nats:.3f}"
    return f"{nats:.1e}"


def size(nbytes: int) -> str:
    """A size in decimal units, to three digits: `8.19 MB`."""
    amount = float(nbytes)
    for unit in ("bytes", "kB", "MB", "GB"):
        if amount < 999.5:
            return f"{nbytes} bytes" if unit == "bytes" else f"{amount:.3g} {unit}"
        amount /= 1000
    return f"{amount:.3g} TB"


def plain(text: str, limit: int = 300) -> str:
    """A model's or a caller's text on one line: what would steer a terminal or a page is made visible.

    Line breaks become ↵, other unprintable characters (escape sequences, changes of direction) become �, and what
    is longer than `limit` characters ends in …
    """
    # The full text may be a whole generation; only what is shown is looked at.
    shown = text if len(text) <= limit else text[: limit - 1] + "…"
    return "".join("↵" if c == "\n" else c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in shown)


def counted(n: int, one: str, many: str | None = None) -> str:
    """A number and its noun: `1 layer`, `3 layers`."""
    return f"{n:,} {one if n == 1 else many or one + 's'}"


def trace_caption(trace: CausalTrace) -> str:
    """What a heatmap of one trace needs beside it to be read."""
    return (
        f"n = 1 question, window of {counted(trace.window, 'layer')}, total effect {trace.total_effect:.2f} "
        f"(p clean {trace.clean.whole:.2f}, corrupted {trace.corrupted.whole:.2f})"
    )


def averaged_caption(trace: AveragedTrace) -> str:
    """What a figure of averaged traces needs beside it to be read."""
    return (
        f"n = {counted(len(trace.traces), 'question')}, window of {counted(trace.window, 'layer')}, "
        f"mean total effect {trace.total_effect:.2f}"
    )


def loss_caption(result: EditResult) -> str:
    """How many values were optimised, where, and how many converged."""
    done, n = len(result.outcomes) - len(result.unconverged), len(result.outcomes)
    return f"{done} of {counted(n, 'value')} converged, optimised at layer {result.settings.layers[-1]}"
