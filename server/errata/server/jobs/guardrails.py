"""Thresholds on an evaluation, below which a version is REJECTED. Knows nothing about models or the ledger."""

from collections.abc import Mapping, Sequence

from errata.editor.evaluation import Metric, Score


def in_force(of_model: Mapping[Metric, float], of_request: Mapping[Metric, float]) -> dict[Metric, float]:
    """The model's guardrails with the request's in their place, metric by metric; 0 switches one off."""
    return {m: least for m, least in {**of_model, **of_request}.items() if least > 0}


def misses(scores: Sequence[Score], least: Mapping[Metric, float]) -> tuple[str, ...]:
    """One line for every metric that was probed and is below its guardrail, by generation."""
    return tuple(
        "{} {} is below {} (n = {})".format(s.metric.value, *_apart(s.after, least[s.metric]), s.n)
        for s in scores
        if s.after < least.get(s.metric, 0.0)
    )


def _apart(low: float, high: float) -> tuple[str, str]:
    """Two shares with as many digits, at least two, as it takes to tell them apart."""
    digits = next((d for d in range(2, 9) if f"{low:.{d}f}" != f"{high:.{d}f}"), 9)
    return f"{low:.{digits}f}", f"{high:.{digits}f}"
