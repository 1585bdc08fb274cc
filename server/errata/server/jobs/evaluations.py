"""The work of an evaluation: two versions asked the same probes."""

from errata.server.conversion import Decoder, ended_summary, evaluation_outcome
from errata.server.jobs.artifacts import evaluation_files
from errata.server.jobs.comparison import compare
from errata.server.jobs.guardrails import in_force, misses
from errata.server.jobs.running import RunningJob
from errata.server.ledger.ledger import Ledger
from errata.server.ledger.rows import JobState
from errata.server.models import Models
from errata.server.names import version_name, version_of
from errata.server.store import ArtifactStore
from errata.v1 import evaluation_pb2


class EvaluationWork:
    """Judges one version beside another."""

    def __init__(self, ledger: Ledger, models: Models, artifacts: ArtifactStore, decoder: Decoder) -> None:
        self._ledger, self._models, self._artifacts, self._decoder = ledger, models, artifacts, decoder

    def __call__(self, job: RunningJob) -> None:
        """Ends the job SUCCEEDED, or REJECTED below a guardrail of the request. Raises what stops it."""
        row = job.row
        message = evaluation_pb2.CreateEvaluationRequest.FromString(row.request)
        order = self._decoder.evaluation(message)
        _, baseline = version_of(message.baseline, "baseline")  # by number since it was queued
        job.stage("loading")
        loaded = job.result_of(self._models.load(row.model))
        before, after = loaded.deltas_of(baseline), loaded.deltas_of(row.version)
        with loaded.borrow() as model, job.watching(model):
            job.stage("evaluate")
            evaluation = compare(model, order.probes, before, after)
        rejections = misses(evaluation.scores, in_force({}, order.guardrails))
        job.stage("publish")
        self._artifacts.write(row.id, evaluation_files(evaluation))
        result = evaluation_outcome(evaluation, baseline=version_name(row.model, baseline), rejections=rejections)
        state = JobState.REJECTED if rejections else JobState.SUCCEEDED
        self._ledger.finish(
            row.id,
            state,
            result=result.SerializeToString(deterministic=True),
            summary=ended_summary(row.summary, result, "results"),
        )
