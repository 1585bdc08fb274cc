import pytest

from errata.editor.evaluation import Metric, Score
from errata.server.jobs.guardrails import in_force, misses


def _score(metric: Metric, after: float, n: int = 4) -> Score:
    return Score(metric=metric, n=n, before=0.0, after=after, forced_before=0.0, forced=after)


def test_a_requests_guardrail_replaces_the_models_for_its_metric_only() -> None:
    of_model = {Metric.EFFICACY: 0.9, Metric.UNRELATED: 0.8}
    assert in_force(of_model, {Metric.EFFICACY: 0.5}) == {Metric.EFFICACY: 0.5, Metric.UNRELATED: 0.8}


def test_a_guardrail_of_zero_is_off() -> None:
    assert in_force({Metric.EFFICACY: 0.9}, {Metric.EFFICACY: 0.0}) == {}


def test_a_miss_says_the_share_the_threshold_and_the_number_of_probes() -> None:
    assert misses([_score(Metric.EFFICACY, 0.5)], {Metric.EFFICACY: 0.9}) == ("efficacy 0.50 is below 0.90 (n = 4)",)


def test_what_reaches_its_guardrail_passes() -> None:
    assert misses([_score(Metric.EFFICACY, 0.9)], {Metric.EFFICACY: 0.9}) == ()


def test_a_metric_that_was_not_probed_is_not_judged() -> None:
    assert misses([_score(Metric.EFFICACY, 1.0)], {Metric.PORTABILITY: 1.0}) == ()


@pytest.mark.parametrize(("after", "said"), [(0.8999, "0.8999 is below 0.9000"), (0.4, "0.40 is below 0.90")])
def test_two_shares_are_never_said_to_be_the_same(after: float, said: str) -> None:
    assert said in misses([_score(Metric.EFFICACY, after)], {Metric.EFFICACY: 0.9})[0]
