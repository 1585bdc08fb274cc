"""95 % intervals of means over questions: the percentile bootstrap, with a fixed seed."""

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

DRAWS = 1000
"""How often the questions are drawn anew."""

_SEED = 0


def bootstrap_means(samples: Float[NDArray[np.float64], "questions ..."]) -> Float[NDArray[np.float64], "draws ..."]:
    """The means of as many questions, drawn with replacement. `samples` must hold no NaN."""
    n = len(samples)
    counts = np.random.default_rng(_SEED).multinomial(n, np.full(n, 1 / n), size=DRAWS)
    means: NDArray[np.float64] = np.tensordot(counts / n, samples, axes=1)
    return means


def interval(
    draws: Float[NDArray[np.float64], "draws ..."],
) -> tuple[Float[NDArray[np.float64], "..."], Float[NDArray[np.float64], "..."]]:
    """The bounds between which 95 % of the draws lie."""
    low, high = np.quantile(draws, (0.025, 0.975), axis=0)
    return low, high
