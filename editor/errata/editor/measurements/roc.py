"""How well scores tell wrong from right: ROC curves and the area under them, with a stratified bootstrap.

A score is higher where right is likelier. A threshold flags whatever scores no more than it; tied scores are flagged
together.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float
from numpy.typing import NDArray

GRID: Float[NDArray[np.float64], " points"] = np.linspace(0, 1, 101)
"""The shares of right ones flagged at which a curve is given."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Draws:
    """How often each wrong and each right one is drawn: in every draw as many of a kind as there are."""

    wrong: Float[NDArray[np.float64], "draws wrong"]
    right: Float[NDArray[np.float64], "draws right"]


def stratified(right: Bool[NDArray[np.bool_], " n"], draws: int, seed: int) -> Draws:
    """As many wrong and as many right ones as there are, each drawn with replacement among their own kind."""
    rng = np.random.default_rng(seed)

    def drawn(n: int) -> NDArray[np.float64]:
        return rng.multinomial(n, np.full(n, 1 / n), size=draws).astype(np.float64)

    return Draws(wrong=drawn(int((~right).sum())), right=drawn(int(right.sum())))


def _all(right: NDArray[np.bool_]) -> Draws:
    """Each once."""
    return Draws(wrong=np.ones((1, int((~right).sum()))), right=np.ones((1, int(right.sum()))))


def auroc(
    scores: Float[NDArray[np.float64], " n"], right: Bool[NDArray[np.bool_], " n"], draws: Draws | None = None
) -> Float[NDArray[np.float64], " draws"]:
    """The probability that a wrong one scores lower than a right one, ties half (Mann–Whitney's U); in each draw, or
    once over all.
    """
    wrong = scores[~right, None]
    pairs = (wrong < scores[right]) + 0.5 * (wrong == scores[right])
    draws = draws or _all(right)
    areas: NDArray[np.float64] = ((draws.wrong @ pairs) * draws.right).sum(1) / pairs.size
    return areas


def roc(
    scores: Float[NDArray[np.float64], " n"], right: Bool[NDArray[np.bool_], " n"], draws: Draws | None = None
) -> Float[NDArray[np.float64], "draws points"]:
    """The share of wrong ones flagged where GRID's share of right ones is; in each draw, or once over all."""
    levels, at = np.unique(scores, return_inverse=True)
    draws = draws or _all(right)

    def flagged(mask: NDArray[np.bool_], counts: NDArray[np.float64]) -> NDArray[np.float64]:
        by_level = np.bincount(at[mask], weights=counts, minlength=len(levels))
        return np.concatenate([[0.0], np.cumsum(by_level) / len(counts)])

    # Where a curve rises straight up, interp takes the upper end.
    return np.stack(
        [np.interp(GRID, flagged(right, r), flagged(~right, w)) for w, r in zip(draws.wrong, draws.right, strict=True)]
    )
