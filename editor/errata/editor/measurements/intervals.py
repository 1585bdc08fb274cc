"""Means over questions with their 95 % intervals: the percentile bootstrap, with a fixed seed."""

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

from errata.editor.measurements.findings import Line, Number

DRAWS = 1000
"""How often the questions are drawn anew."""

INTERVAL = "95 % intervals by bootstrap over questions"
"""What captions say of the intervals made here."""

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


def line(label: str, samples: Float[NDArray[np.float64], "questions points"]) -> Line:
    """The mean at each point; with its interval where there are two questions or more."""
    low, high = interval(bootstrap_means(samples)) if len(samples) > 1 else (None, None)
    return Line(label=label, values=samples.mean(0), low=low, high=high)


def number(name: str, samples: Float[NDArray[np.float64], " questions"], unit: str = "probability") -> Number:
    """The mean; with its interval where there are two questions or more."""
    return bounded(name, float(samples.mean()), unit, len(samples), bootstrap_means(samples))


def bounded(name: str, value: float, unit: str, n: int, draws: Float[NDArray[np.float64], " draws"]) -> Number:
    """A number with the interval of its `draws`, where it is of two samples or more."""
    low, high = map(float, interval(draws)) if n > 1 else (None, None)
    return Number(name=name, value=value, unit=unit, n=n, low=low, high=high)


def extreme(
    samples: Float[NDArray[np.float64], "questions layers"], unit: str, *, value: str, layer: str, lowest: bool = False
) -> tuple[Number, Number]:
    """The largest mean over layers, or the lowest, and its layer: numbers named `value` and `layer`.

    The first one's interval is of the mean at that layer, the second one's of the layer in each draw.
    """
    signed, n = -samples if lowest else samples, len(samples)
    at, draws = int(signed.mean(0).argmax()), bootstrap_means(samples)
    layers = (-draws if lowest else draws).argmax(1).astype(np.float64)
    return (
        bounded(value, float(samples[:, at].mean()), unit, n, draws[:, at]),
        bounded(layer, at, "layer", n, layers),
    )
