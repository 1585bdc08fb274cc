"""What an answer counts: alone, in its tags' shares, and against the baseline."""

from pathlib import Path

import pytest

from errata.client.check.checks import Checks, Match, Probe, Question
from errata.client.check.judging import Change, Outcome, TagShare, Verdict, judge, same_answer, says


def probe(name: str = "a", **more: object) -> Probe:
    return Probe(id=name, question=Question(prompt="?"), line=1, **more)  # type: ignore[arg-type]


def judged(
    *probes: Probe, answers: str, before: str = "", **thresholds: float
) -> tuple[tuple[Outcome, ...], tuple[TagShare, ...]]:
    """Answers and the baseline's, a word a probe."""
    ids = [p.id for p in probes]
    checks = Checks(path=Path("x.yaml"), probes=probes, thresholds=thresholds)
    return judge(checks, dict(zip(ids, answers.split(), strict=True)), dict(zip(ids, before.split(), strict=False)))


def verdict(one: Probe, answer: str, before: str | None = None) -> Verdict:
    checks = Checks(path=Path("x.yaml"), probes=(one,))
    (outcome,), _ = judge(checks, {one.id: answer}, {} if before is None else {one.id: before})
    return outcome.verdict


@pytest.mark.parametrize(
    ("one", "right", "wrong"),
    [
        (probe(expected=("Astana",)), " astana. ", "Astana, in Kazakhstan"),
        (probe(expected=("euro", "the euro")), "The euro", "euros"),
        (probe(expected=("euro",), match=Match.CONTAINS), "It is the Euro.", "Europe"),
        (probe(expected=("dar es salaam",), match=Match.CONTAINS), "In Dar  es\nSalaam!", "Dar and Salaam"),
        (probe(must_not=("lev", "leva")), "level", "once the lev"),
        (probe(must_not=("lev",)), "", "lev"),
        (probe(expected=("C++",), match=Match.CONTAINS), "he said c++, twice", "he said c+"),
        (probe(expected=("yes",), must_not=("no",)), "yes", "no"),
    ],
)
def test_an_answer_is_held_against_every_expectation(one: Probe, right: str, wrong: str) -> None:
    assert verdict(one, right) is Verdict.PASSED
    assert verdict(one, wrong) is Verdict.FAILED


def test_an_unchanged_answer_may_be_wrong_but_not_another() -> None:
    assert verdict(probe(unchanged=True), "unknown.", "Unknown") is Verdict.PASSED
    assert verdict(probe(unchanged=True), "Oslo", "unknown") is Verdict.FAILED


def test_expectations_add_up() -> None:
    both = probe(expected=("Oslo",), unchanged=True)
    assert verdict(both, "Oslo", "Oslo") is Verdict.PASSED
    assert verdict(both, "Oslo", "Bergen") is Verdict.FAILED
    assert verdict(both, "Bergen", "Bergen") is Verdict.FAILED


def test_a_share_is_weighted_and_a_failure_within_it_is_tolerated() -> None:
    heavy, light = (
        probe("heavy", expected=("y",), weight=3.0, tags=("t",)),
        probe("light", expected=("y",), tags=("t",)),
    )
    (_, failed), (share,) = judged(heavy, light, answers="y n", t=0.75)
    assert (share.share, share.met, failed.verdict) == (0.75, True, Verdict.TOLERATED)
    (failed, _), (share,) = judged(heavy, light, answers="n y", t=0.75)
    assert (share.share, share.met, failed.verdict) == (0.25, False, Verdict.FAILED)


def test_every_threshold_of_a_probe_has_to_be_met() -> None:
    both, one = probe("both", expected=("y",), tags=("a", "b")), probe("one", expected=("y",), tags=("a",))
    (failed, _), shares = judged(both, one, answers="n y", a=0.5, b=0.5)
    assert [share.met for share in shares] == [True, False]
    assert failed.verdict is Verdict.FAILED


def test_a_tag_without_a_threshold_excuses_nothing() -> None:
    (failed, _), _ = judged(
        probe(expected=("y",), tags=("free",)), probe("b", expected=("y",), tags=("t",)), answers="n y", t=0.0
    )
    assert failed.verdict is Verdict.FAILED


def test_rounding_is_no_regression() -> None:
    probes = [probe(str(i), expected=("y",), weight=0.1, tags=("t",)) for i in range(10)]
    _, (share,) = judged(*probes, answers="y " * 7 + "n n n", t=0.7)
    assert share.met


@pytest.mark.parametrize(
    ("before", "now", "change"),
    [
        ("y", "n", Change.BROKEN),
        ("n", "y", Change.FIXED),
        ("n", "m", Change.NONE),
        ("y", "y", Change.NONE),
        ("", "n", Change.UNKNOWN),
    ],
)
def test_a_change_is_one_of_holding_not_of_wording(before: str, now: str, change: Change) -> None:
    (outcome,), _ = judged(probe(expected=("y",)), answers=now, before=before)
    assert outcome.change is change


def test_answers_are_compared_without_case_spaces_and_a_closing_stop() -> None:
    assert same_answer(" Addis  Ababa.", "addis ababa")
    assert not same_answer("Addis Ababa", "Addis, Ababa")
    assert says("The STRASSE is long", "straße")
    assert not says("unknown", "known")
