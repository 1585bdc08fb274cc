"""The edited facts: each request's outcome beside what the child answers to its own question."""

from collections import defaultdict
from dataclasses import dataclass, field

from errata.editor.evaluation import Evaluation, Metric, ProbeResult
from errata.editor.methods import EditResult, RequestOutcome


@dataclass(frozen=True, slots=True, kw_only=True)
class Fact:
    """One request, and the efficacy probes that ask for it; none where the evaluation did not ask."""

    outcome: RequestOutcome
    asked: tuple[ProbeResult, ...] = field(repr=False)

    @property
    def shown(self) -> ProbeResult | None:
        """The probe that stands for all: the first that failed, else the first."""
        return next((r for r in self.asked if not r.passed), self.asked[0] if self.asked else None)

    @property
    def right(self) -> int:
        """How many of the probes are answered as asked."""
        return sum(r.passed for r in self.asked)

    @property
    def verdict(self) -> str:
        """Whether the edit took, in a word or two."""
        if not self.asked:
            return "not asked"
        if len(self.asked) == 1:
            return "yes" if self.right else "NO"
        return f"{'yes' if self.right == len(self.asked) else 'NO'}, {self.right} of {len(self.asked)}"

    @property
    def installed(self) -> bool:
        """Whether every probe is answered as asked, and there is one."""
        return bool(self.asked) and self.right == len(self.asked)


def edited_facts(result: EditResult, evaluation: Evaluation) -> tuple[Fact, ...]:
    """One fact for each request, in the requests' order."""
    asked: dict[str | None, list[ProbeResult]] = defaultdict(list)
    for row in evaluation.results:
        if row.probe.metric is Metric.EFFICACY:
            asked[row.probe.request].append(row)
    return tuple(Fact(outcome=o, asked=tuple(asked[o.name])) for o in result.outcomes)
