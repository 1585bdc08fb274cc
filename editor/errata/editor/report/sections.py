"""The parts of a page that repeat: bars of scores, cards of facts, probes by metric. Values only; no markup."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from PIL import Image

from errata.editor.evaluation import Evaluation, Metric, ProbeResult, Score
from errata.editor.methods import EditResult
from errata.editor.report.facts import Fact, edited_facts
from errata.editor.report.pictures import Pictures
from errata.editor.report.wording import MEANINGS, interval

MAX_ROWS = 1000
"""Probes listed of one metric, and facts of one page."""

MAX_PICTURES = 150
"""Distinct pictures among the probes of one metric, and facts with a picture."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreRow:
    """A score with its interval in words and in percent of a bar's width."""

    score: Score
    meaning: str
    interval: str
    low: float
    high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class FactCard:
    """A fact and the class of its picture, None without one."""

    fact: Fact
    picture: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeRow:
    """A probe's result, the class of its first picture (None: not shown) and how many further pictures it has."""

    result: ProbeResult
    picture: str | None
    more: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeGroup:
    """One metric's probes, and how many of them, and of their pictures, are left out."""

    metric: Metric
    meaning: str
    n: int
    failed: int
    failures: tuple[ProbeRow, ...]
    passes: tuple[ProbeRow, ...]
    rows_left_out: int
    pictures_left_out: int

    @property
    def pictured(self) -> bool:
        """Whether any row shows a picture."""
        return any(r.picture for r in (*self.failures, *self.passes))


def score_rows(evaluation: Evaluation) -> list[ScoreRow]:
    """One row for every metric that was probed."""
    return [
        ScoreRow(
            score=s,
            meaning=MEANINGS[s.metric],
            interval=interval(s.interval),
            low=100 * s.interval[0],
            high=100 * s.interval[1],
        )
        for s in evaluation.scores
    ]


def fact_cards(
    result: EditResult, evaluation: Evaluation, by_name: Mapping[str, Image.Image], pictures: Pictures
) -> list[FactCard]:
    """One card for each request, those that did not take first."""
    facts = sorted(edited_facts(result, evaluation), key=lambda f: f.installed)[:MAX_ROWS]
    side = 192 if len(facts) <= 40 else 96
    return [
        FactCard(fact=f, picture=_fact_picture(f, by_name, pictures, side) if i < MAX_PICTURES else None)
        for i, f in enumerate(facts)
    ]


def probe_groups(evaluation: Evaluation, pictures: Pictures) -> list[ProbeGroup]:
    """The probes of each metric, failures first."""
    return [_group(m, rows, pictures) for m in Metric if (rows := _of(evaluation.results, m))]


def _of(results: Iterable[ProbeResult], metric: Metric) -> list[ProbeResult]:
    return sorted((r for r in results if r.probe.metric is metric), key=lambda r: r.passed)


def _fact_picture(fact: Fact, by_name: Mapping[str, Image.Image], pictures: Pictures, side: int) -> str | None:
    image = by_name.get(fact.outcome.name)
    if image is None and fact.shown is not None:
        image = next(iter(fact.shown.probe.prompt.images), None)
    return pictures.css_class(image, side) if image is not None else None


def _group(metric: Metric, results: Sequence[ProbeResult], pictures: Pictures) -> ProbeGroup:
    shown: set[str] = set()
    rows = [_row(r, pictures, shown) for r in results[:MAX_ROWS]]
    return ProbeGroup(
        metric=metric,
        meaning=MEANINGS[metric],
        n=len(results),
        failed=sum(not r.passed for r in results),
        failures=tuple(r for r in rows if not r.result.passed),
        passes=tuple(r for r in rows if r.result.passed),
        rows_left_out=len(results) - len(rows),
        pictures_left_out=sum(r.picture is None and bool(r.result.probe.prompt.images) for r in rows),
    )


def _row(result: ProbeResult, pictures: Pictures, shown: set[str]) -> ProbeRow:
    images = result.probe.prompt.images
    picture = pictures.css_class(images[0], new=len(shown) < MAX_PICTURES) if images else None
    if picture:
        shown.add(picture)
    return ProbeRow(result=result, picture=picture, more=max(0, len(images) - 1))
