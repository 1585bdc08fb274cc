"""The work of a causal trace: every question traced on a version, averaged, and what AUTO would make of it."""

from collections.abc import Sequence

import numpy as np

from errata.editor.delta import applied
from errata.editor.errors import CorruptionFailedError, InvalidInputError
from errata.editor.localization import most_layers
from errata.editor.model import EditableModel
from errata.editor.trace import (
    AveragedTrace,
    CausalTrace,
    Probabilities,
    TraceRequest,
    TraceSettings,
    average,
    trace,
)
from errata.server.conversion import COMPONENTS, Decoder, causal_trace_result
from errata.server.jobs.artifacts import trace_files
from errata.server.jobs.running import RunningJob
from errata.server.ledger.ledger import Ledger
from errata.server.ledger.rows import JobState
from errata.server.models import Models
from errata.server.store import ArtifactStore
from errata.v1 import trace_pb2


class TraceWork:
    """Traces the questions of one job."""

    def __init__(self, ledger: Ledger, models: Models, artifacts: ArtifactStore, decoder: Decoder) -> None:
        self._ledger, self._models, self._artifacts, self._decoder = ledger, models, artifacts, decoder

    def __call__(self, job: RunningJob) -> None:
        """Ends the job SUCCEEDED. Raises what stops it; CorruptionFailedError where no corruption corrupts."""
        order = self._decoder.trace(trace_pb2.CreateTraceRequest.FromString(job.row.request))
        job.stage("loading")
        loaded = job.result_of(self._models.load(job.row.model))
        with loaded.borrow() as model, job.watching(model), applied(model, *loaded.deltas_of(job.row.version)):
            averaged, skipped = _traced(model, order.questions, order.settings, job)
        job.stage("publish")
        result = causal_trace_result(averaged, skipped, most=most_layers(loaded.base))
        self._artifacts.write(job.row.id, trace_files(averaged, result))
        self._ledger.finish(job.row.id, JobState.SUCCEEDED, result=result.SerializeToString(deterministic=True))


def averaged_trace(result: trace_pb2.CausalTraceResult, window: int) -> AveragedTrace:
    """The average that a stored result came from. Effects on the first token alone are not stored: NaN."""
    return average([_stored(t, window) for t in result.traces])


def _traced(
    model: EditableModel, questions: Sequence[TraceRequest], settings: TraceSettings, job: RunningJob
) -> tuple[AveragedTrace, list[str]]:
    """The average, and a line for each question that had to be left out."""
    job.stage("tracing", len(questions))
    found: list[CausalTrace] = []
    skipped: list[str] = []
    for i, question in enumerate(questions):
        try:
            found.append(trace(model, question, settings, cancelled=job.cancelled))
        except CorruptionFailedError as error:
            skipped.append(f"questions[{i}]: {error}")
        except InvalidInputError as error:
            raise error.within(f"questions[{i}]") from None
        job.step(i + 1, len(questions))
    if not found:
        raise CorruptionFailedError("no question's corruption corrupts: " + "; ".join(skipped))
    return average(found), skipped


def _stored(question: trace_pb2.QuestionTrace, window: int) -> CausalTrace:
    effects = np.stack([np.reshape(np.array(g.effects), (g.rows, g.columns)) for g in question.grids])
    return CausalTrace(
        question=question.question,
        answer=question.answer,
        tokens=tuple(question.tokens),
        constraint=tuple(question.constraint),
        window=window,
        components=tuple(COMPONENTS[g.component] for g in question.grids),
        clean=Probabilities(first=question.clean_first, whole=question.clean),
        corrupted=Probabilities(first=question.corrupted_first, whole=question.corrupted),
        restored=effects + question.corrupted,
        restored_first=np.full_like(effects, np.nan),
    )
