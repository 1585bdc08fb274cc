"""AUTO layers: which layers to edit, read from an averaged causal trace. Never edits in vain."""

from dataclasses import dataclass

import numpy as np

from errata.editor.errors import InvalidInputError, NoCausalSiteError
from errata.editor.model import EditableModel
from errata.editor.states import Component
from errata.editor.trace import AveragedTrace

_SITE = "constraint last"
"""Where an edit's key is read: the only place where it can act."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerChoice:
    """The layers to edit and what speaks for them: each one's AIE as a share of the total effect."""

    layers: tuple[int, ...]
    shares: tuple[float, ...]
    total_effect: float


MOST_LAYERS = 5
"""Layers of one edit."""


def most_layers(model: EditableModel) -> int:
    """How many layers one edit may change: one where a norm stands behind the MLPs, as edits do not add up then."""
    return 1 if model.family.normed_mlp(model.model) else MOST_LAYERS


def choose_layers(
    averaged: AveragedTrace, *, min_share: float = 0.2, near_peak: float = 0.5, most: int = MOST_LAYERS
) -> LayerChoice:
    """The consecutive layers around the peak of the MLP's AIE at the constraint's last token.

    A layer belongs to them while its AIE is at least `near_peak` of the peak's; there are at most `most`
    (`most_layers` of the model). Raises
    NoCausalSiteError, with the numbers and the sites that do carry the fact, where even the peak restores less than
    `min_share` of the total effect.
    """
    if Component.MLP not in averaged.components:
        raise InvalidInputError("the trace has no MLP component; trace it to choose layers", field="trace.components")
    column = averaged.roles.index(_SITE)
    aie = averaged.aie(Component.MLP)[:, column]
    peak = int(np.argmax(aie))
    total = averaged.total_effect
    if aie[peak] < min_share * total:
        raise NoCausalSiteError(
            f"no MLP at the constraint's last token carries the fact: the best, layer {peak}, restores "
            f"{aie[peak]:.3f} of a total effect of {total:.3f} ({aie[peak] / total:.0%}, needed {min_share:.0%}) over "
            f"{len(averaged.traces)} question(s), window {averaged.window}. What does restore it: "
            f"{_strongest(averaged)}. Give the layers explicitly, or trace with a wider window"
        )
    low = high = peak
    while low > 0 and aie[low - 1] >= near_peak * aie[peak] and high - low + 1 < most:
        low -= 1
    while high + 1 < len(aie) and aie[high + 1] >= near_peak * aie[peak] and high - low + 1 < most:
        high += 1
    layers = tuple(range(low, high + 1))
    return LayerChoice(layers=layers, shares=tuple(float(aie[i] / total) for i in layers), total_effect=total)


def _strongest(averaged: AveragedTrace, most: int = 3) -> str:
    """The sites with the largest AIE over all components and roles, in words."""
    sites = [
        (
            effects[layer, role],
            f"{component.value} of layer {layer} at {averaged.roles[role]} ({effects[layer, role]:.3f})",
        )
        for component in averaged.components
        for effects in (averaged.aie(component),)
        for layer, role in np.argwhere(~np.isnan(effects))
    ]
    return "; ".join(words for _, words in sorted(sites, key=lambda s: -s[0])[:most])
