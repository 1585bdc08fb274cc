"""The work of a bisection: binary search for the version that broke a probe.

Of n versions after the good one, one is the first that fails, or the good one fails already, or none does: n + 2
outcomes, so ⌈log₂(n + 2)⌉ versions are asked at most, 5 for 16. An end that the halves do not lead to is taken at its
word. Where a probe is held against the good version's answer, that one has to be asked before them, as one more.

What was found is kept after each version, so a search that is interrupted goes on where it was. Where probes pass and
fail by turns along the lineage, what is found is one version that fails and whose parent passes.
"""

from collections.abc import Sequence
from math import ceil, log2

from errata.editor.evaluation import Probe
from errata.editor.model import same_answer
from errata.server.conversion import Decoder
from errata.server.conversion.enums import METRIC_VALUES
from errata.server.conversion.history import bisection_order, history_summary
from errata.server.errors import NothingToBisectError
from errata.server.jobs.answering import answers
from errata.server.jobs.lineages import Lineages
from errata.server.jobs.running import RunningJob
from errata.server.ledger.ledger import Ledger
from errata.server.ledger.rows import JobState
from errata.server.models import LoadedModel, Models
from errata.server.names import version_name, version_of
from errata.v1 import evaluation_pb2, history_pb2


class BisectionWork:
    """Searches once."""

    def __init__(self, ledger: Ledger, models: Models, decoder: Decoder) -> None:
        self._ledger, self._models, self._decoder = ledger, models, decoder
        self._lineages = Lineages(ledger)

    def __call__(self, job: RunningJob) -> None:
        """Ends the job SUCCEEDED. Raises NothingToBisectError where an end is not what it was said to be."""
        row = job.row
        order = bisection_order(history_pb2.CreateBisectionRequest.FromString(row.request), self._decoder)
        good = order.good.number or 0
        suspects = {r.number: r for r in self._lineages.of(row.model, row.version) if r.number > good}
        job.stage("loading")
        search = _Search(job, job.result_of(self._models.load(row.model)), order.probes)
        outcome = history_pb2.Bisection.FromString(row.result or b"")
        outcome.good, outcome.bad = version_name(row.model, good), version_name(row.model, row.version)
        tried = [*suspects] if search.compares else [good, *suspects]
        most = ceil(log2(len(tried) + 1))
        job.stage("bisect", most)
        if search.compares:
            search.learn(good)
        low, high = _narrowed(tried, outcome.steps)
        while low < high:
            middle = (low + high) // 2
            step = search.step(tried[middle])
            outcome.steps.append(step)
            self._keep(job, outcome, most)
            low, high = (middle + 1, high) if step.good else (low, middle)
        if high == len(tried):
            raise NothingToBisectError(
                f"version {row.version} passes all probes: nothing is broken; name a version that fails one",
                field="bad",
            )
        if tried[high] == good:
            raise _fails_already(good, next(s.failed[0] for s in outcome.steps if s.version == outcome.good))
        outcome.first_bad = version_name(row.model, tried[high])
        outcome.facts.extend(suspects[tried[high]].facts)
        result = outcome.SerializeToString(deterministic=True)
        self._ledger.finish(row.id, JobState.SUCCEEDED, result=result, summary=history_summary(outcome))

    def _keep(self, job: RunningJob, outcome: history_pb2.Bisection, most: int) -> None:
        self._ledger.keep(job.row.id, outcome.SerializeToString(deterministic=True))
        job.step(len(outcome.steps), most)
        job.check(now=True)


class _Search:
    """Versions asked the probes."""

    def __init__(self, job: RunningJob, loaded: LoadedModel, probes: Sequence[Probe]) -> None:
        self._job, self._loaded, self._probes = job, loaded, probes
        self._before = [""] * len(probes)

    @property
    def compares(self) -> bool:
        """Whether a verdict needs the good version's answers."""
        return any(probe.expected is None or probe.believed is not None for probe in self._probes)

    def learn(self, good: int) -> None:
        """Learns what the good version answers. Raises NothingToBisectError where it fails."""
        self._before = self._ask(good)
        if failed := self._failed(self._before):
            raise _fails_already(good, failed[0])

    def step(self, number: int) -> history_pb2.BisectionStep:
        """One version, tried."""
        failed = self._failed(self._ask(number))
        return history_pb2.BisectionStep(
            version=version_name(self._loaded.name, number), good=not failed, failed=failed
        )

    def _ask(self, version: int) -> list[str]:
        return answers(self._loaded.engine, [(version, probe.prompt) for probe in self._probes], self._job.check)

    def _failed(self, told: Sequence[str]) -> list[evaluation_pb2.ProbeResult]:
        found = []
        for probe, before, after in zip(self._probes, self._before, told, strict=True):
            expected = before if probe.expected is None else probe.expected
            counts = probe.believed is None or same_answer(probe.believed, before)
            if counts and not same_answer(after, expected):
                found.append(
                    evaluation_pb2.ProbeResult(
                        metric=METRIC_VALUES[probe.metric],
                        question=probe.prompt.text,
                        expected=expected,
                        before=before,
                        after=after,
                        request=probe.request or "",
                    )
                )
        return found


def _fails_already(good: int, failed: evaluation_pb2.ProbeResult) -> NothingToBisectError:
    return NothingToBisectError(
        f"version {good} fails the probe {failed.question!r} already: it answers {failed.after!r}; name a good version "
        "that passes, or drop the probe",
        field="good",
    )


def _narrowed(tried: Sequence[int], steps: Sequence[history_pb2.BisectionStep]) -> tuple[int, int]:
    """Where the first bad one lies, after the steps that were taken; past the end where all are good."""
    low, high = 0, len(tried)
    for step in steps:
        place = tried.index(version_of(step.version, "version")[1])
        low, high = (place + 1, high) if step.good else (low, place)
    return low, high
