"""Indirect effects of many questions as the lines, numbers and grids of findings.

Samples are questions × points and hold no NaN: `at_role` leaves out the questions without such a token.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

from errata.editor.errors import InvalidInputError
from errata.editor.measurements.findings import Grid, HeatMap, Line, LinePlot
from errata.editor.measurements.intervals import INTERVAL, bootstrap_means, interval
from errata.editor.report.wording import COMPONENTS, counted
from errata.editor.states import Component
from errata.editor.trace import AveragedTrace


def check_components(components: Sequence[Component]) -> None:
    """Raises InvalidInputError unless there is a component to restore, and each is given once."""
    if not components or len(set(components)) < len(components):
        raise InvalidInputError(
            "give at least one component to restore, mlp, attention or layer, and none twice", field="components"
        )


def share(
    label: str,
    samples: Float[NDArray[np.float64], "questions points"],
    totals: Float[NDArray[np.float64], " questions"],
) -> Line:
    """The mean effect at each point as a share of the mean total effect, both of the same questions."""
    low, high = None, None
    if len(samples) > 1:
        low, high = interval(bootstrap_means(samples) / bootstrap_means(totals)[:, None])
    return Line(label=label, values=samples.mean(0) / totals.mean(), low=low, high=high)


def layer_plot(name: str, title: str, lines: Sequence[Line], *, unit: str, caption: str) -> LinePlot:
    """Average indirect effects by layer."""
    return LinePlot(
        name=name,
        title=title,
        x_label="layer",
        y_label=f"AIE ({unit})",
        x=np.arange(len(lines[0].values) if lines else 0, dtype=np.float64),
        lines=tuple(lines),
        caption=f"Average indirect effect; {caption}; {INTERVAL}",
    )


def causal_layers(
    samples: Float[NDArray[np.float64], "questions layers"], totals: Float[NDArray[np.float64], " questions"]
) -> str:
    """The layers that restore half of the total effect or more, as they are to be read."""
    half = np.flatnonzero(samples.mean(0) >= totals.mean() / 2)
    return ", ".join(str(i) for i in half) or "none"


def role_grids(name: str, averaged: AveragedTrace) -> HeatMap:
    """Average indirect effects by layer and role of the token, a panel for each component."""
    return HeatMap(
        name=name,
        title="Average indirect effect by layer and token",
        x_label="layer",
        y_label="token",
        unit="probability",
        rows=averaged.roles,
        columns=tuple(str(i) for i in range(averaged.traces[0].restored.shape[1])),
        grids=tuple(Grid(label=COMPONENTS[c], values=averaged.aie(c).T) for c in averaged.components),
        caption=f"Means, n = {counted(len(averaged.traces), 'question')}",
    )


def at_role(averaged: AveragedTrace, component: Component, role: str) -> Float[NDArray[np.float64], "questions layers"]:
    """Indirect effects at one role of the questions that have such a token."""
    samples = averaged.samples(component)[:, :, averaged.roles.index(role)]
    having: NDArray[np.float64] = samples[~np.isnan(samples).any(1)]
    return having
