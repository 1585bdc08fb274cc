"""The work of a bisection: binary search for the version that broke a probe.

Both ends are asked first, in one batch; then ⌈log₂ n⌉ versions at most, where n lie after the good one. What was found
is kept after each of them, so a search that is interrupted goes on where it was. Where probes pass and fail by turns
along the lineage, what is found is one version that fails and whose parent passes.
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
from errata.server.ledger.rows import JobState, VersionRow
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
        suspects = [r for r in self._lineages.of(row.model, row.version) if r.number > good]
        job.stage("loading")
        loaded = job.result_of(self._models.load(row.model))
        outcome = history_pb2.Bisection.FromString(row.result or b"")
        outcome.good, outcome.bad = version_name(row.model, good), version_name(row.model, row.version)
        search = _Search(job, loaded, order.probes)
        most = ceil(log2(len(suspects)))
        job.stage("bisect", most)
        search.ask_ends(good, None if row.result else suspects[-1].number)
        self._keep(job, outcome, most)
        low, high = _narrowed(suspects, outcome.steps)
        while low < high:
            middle = (low + high) // 2
            step = search.step(suspects[middle].number)
            outcome.steps.append(step)
            self._keep(job, outcome, most)
            low, high = (middle + 1, high) if step.good else (low, middle)
        outcome.first_bad = version_name(row.model, suspects[high].number)
        outcome.facts.extend(suspects[high].facts)
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
        self._before: list[str] = []

    def ask_ends(self, good: int, bad: int | None) -> None:
        """Learns what the good version answers. Raises NothingToBisectError where it fails, or `bad` passes."""
        told = self._ask([good] if bad is None else [good, bad])
        self._before = told[0]
        if failed := self._failed(self._before):
            raise NothingToBisectError(
                f"version {good} fails the probe {failed[0].question!r} already: it answers {failed[0].after!r}; name "
                "a good version that passes, or drop the probe",
                field="good",
            )
        if bad is not None and not self._failed(told[1]):
            raise NothingToBisectError(
                f"version {bad} passes all probes: nothing is broken; name a version that fails one", field="bad"
            )

    def step(self, number: int) -> history_pb2.BisectionStep:
        """One version, tried."""
        [told] = self._ask([number])
        failed = self._failed(told)
        return history_pb2.BisectionStep(
            version=version_name(self._loaded.name, number), good=not failed, failed=failed
        )

    def _ask(self, versions: Sequence[int]) -> list[list[str]]:
        asked = [(version, probe.prompt) for version in versions for probe in self._probes]
        told = answers(self._loaded.engine, asked, self._job.check)
        n = len(self._probes)
        return [told[i * n : (i + 1) * n] for i in range(len(versions))]

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


def _narrowed(suspects: Sequence[VersionRow], steps: Sequence[history_pb2.BisectionStep]) -> tuple[int, int]:
    """Where the first bad one lies, after the steps that were taken: the last suspect is bad."""
    places = {row.number: i for i, row in enumerate(suspects)}
    low, high = 0, len(suspects) - 1
    for step in steps:
        tried = places[version_of(step.version, "version")[1]]
        low, high = (tried + 1, high) if step.good else (low, tried)
    return low, high
