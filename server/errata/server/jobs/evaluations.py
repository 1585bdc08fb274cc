"""The work of an evaluation: two versions asked the same probes."""

from errata.server.conversion import Decoder, EvaluationOrder, evaluation_outcome
from errata.server.errors import MalformedError
from errata.server.jobs.artifacts import evaluation_files
from errata.server.jobs.comparison import compare
from errata.server.jobs.guardrails import in_force, misses
from errata.server.jobs.running import RunningJob
from errata.server.ledger.ledger import Ledger
from errata.server.ledger.rows import JobRow, JobState
from errata.server.models import Models
from errata.server.names import version_name
from errata.server.store import ArtifactStore
from errata.v1 import evaluation_pb2


class EvaluationWork:
    """Judges one version beside another."""

    def __init__(self, ledger: Ledger, models: Models, artifacts: ArtifactStore, decoder: Decoder) -> None:
        self._ledger, self._models, self._artifacts, self._decoder = ledger, models, artifacts, decoder

    def __call__(self, job: RunningJob) -> None:
        """Ends the job SUCCEEDED, or REJECTED below a guardrail of the request. Raises what stops it."""
        row = job.row
        order = self._decoder.evaluation(evaluation_pb2.CreateEvaluationRequest.FromString(row.request))
        baseline = self._baseline(row, order)
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
        self._ledger.finish(row.id, state, result=result.SerializeToString(deterministic=True))

    def _baseline(self, row: JobRow, order: EvaluationOrder) -> int:
        """The version to compare with: the one named, else the version's parent.

        Raises NotFoundError, and MalformedError where the base is to be compared with its parent.
        """
        if order.baseline:
            return self._ledger.resolve(row.model, order.baseline.number, order.baseline.alias).number
        parent = self._ledger.version(row.model, row.version).parent
        if parent is None:
            raise MalformedError(
                "the base has no parent to be compared with; name a baseline", field="baseline", reason="MISSING_FIELD"
            )
        return parent
