"""The work of an edit: layers, statistics, values, solve, evaluation against the parent, guardrails, version.

Until `commit_edit`, one transaction in the ledger, nothing of it can be seen, so it can be stopped anywhere and done
again from its request.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

from errata.editor.delta import Delta, applied
from errata.editor.earlier import Earlier
from errata.editor.errors import NoCausalSiteError
from errata.editor.evaluation import Metric, Probe
from errata.editor.localization import choose_layers, most_layers
from errata.editor.methods import HOLDING, EditSettings, Method, Stage, StageProgress, edit
from errata.editor.model import EditableModel
from errata.editor.report.wording import counted
from errata.editor.requests import EditRequest
from errata.editor.statistics import KeyStatistics
from errata.editor.trace import AveragedTrace, TraceSettings
from errata.server.conversion import (
    Decoder,
    EditOrder,
    configured_guardrails,
    edit_outcome,
    ended_summary,
    planned_edit,
)
from errata.server.errors import MalformedError
from errata.server.jobs.artifacts import Judged, edit_files
from errata.server.jobs.auto import trace_edit
from errata.server.jobs.comparison import compare
from errata.server.jobs.earlier import earlier_edits
from errata.server.jobs.faults import Fault
from errata.server.jobs.guardrails import in_force, misses
from errata.server.jobs.lineages import Lineages
from errata.server.jobs.publishing import Publisher
from errata.server.jobs.running import RunningJob
from errata.server.jobs.traces import averaged_trace
from errata.server.ledger.ledger import Ledger
from errata.server.ledger.rows import JobKind, JobState
from errata.server.models import LoadedModel, Models
from errata.server.store import ArtifactStore, DeltaStore
from errata.v1 import edit_pb2, trace_pb2


class EditWork:
    """Makes one version."""

    def __init__(
        self,
        ledger: Ledger,
        models: Models,
        deltas: DeltaStore,
        artifacts: ArtifactStore,
        outbox_notify: Callable[[], None] | None,
        decoder: Decoder,
        fault: Fault,
    ) -> None:
        self._ledger, self._models, self._decoder, self._fault = ledger, models, decoder, fault
        self._lineages = Lineages(ledger)
        self._publish = Publisher(ledger, deltas, artifacts, outbox_notify, fault)

    def __call__(self, job: RunningJob) -> None:
        """Ends the job SUCCEEDED or REJECTED with a version. Raises what stops it; then there is none."""
        self._fault("queued")
        message = edit_pb2.CreateEditRequest.FromString(job.row.request)
        order = self._decoder.edit(message)
        job.stage("loading")
        loaded = job.result_of(self._models.load(job.row.model))
        judged = self._judged(job, loaded, order)
        job.stage("publish")
        outcome = edit_outcome(judged.result, judged.evaluation.scores, judged.rejections)
        self._publish(
            job,
            loaded,
            judged.result.delta,
            edit_files(job.row, message, order.requests, judged, loaded),
            facts=planned_edit(message, job.row.model, job.row.version).facts,
            scores=judged.evaluation.scores,
            rejections=judged.rejections,
            result=outcome.SerializeToString(deterministic=True),
            summary=ended_summary(job.row.summary, outcome, "outcomes"),
            alias=order.alias,
        )

    def _judged(self, job: RunningJob, loaded: LoadedModel, order: EditOrder) -> Judged:
        parent = loaded.deltas_of(job.row.version)
        with loaded.borrow() as model, job.watching(model):
            layers, traced = self._layers(job, loaded, model, order, parent)
            settings = replace(order.settings, layers=layers)
            model.check_layers(layers, "layers.explicit.layers")
            result = edit(
                model,
                order.requests,
                settings,
                self._statistics(job, loaded, model, order, settings),
                parent=loaded.composed(job.row.version),
                earlier=self._earlier(job, loaded, settings),
                progress=self._progress(job),
                cancelled=job.cancelled,
            )
            self._fault("solved")
            job.stage("evaluate")
            own = own_probes(order.requests)
            evaluation = compare(model, (*own, *order.probes), parent, (*parent, result.delta), own=len(own))
        least = in_force(configured_guardrails(loaded.settings.guardrails), order.guardrails)
        rejections = misses(evaluation.scores, least)
        return Judged(
            result=result, evaluation=evaluation, rejections=rejections, trace=traced, notes=_holds(result.held)
        )

    def _earlier(self, job: RunningJob, loaded: LoadedModel, settings: EditSettings) -> Earlier:
        if settings.method not in HOLDING:
            return Earlier()
        return earlier_edits(self._lineages, self._decoder, job.row.model, job.row.version, loaded.keys_folder)

    def _layers(
        self, job: RunningJob, loaded: LoadedModel, model: EditableModel, order: EditOrder, parent: Sequence[Delta]
    ) -> tuple[tuple[int, ...], AveragedTrace | None]:
        """The layers to edit, and the trace that they were chosen from, if one was."""
        if order.layers is not None:
            return order.layers, None
        if order.trace is not None:
            return self._traced_layers(job.row.model, order.trace)
        references = order.references or loaded.references
        job.stage("tracing", len(order.requests))
        with applied(model, *parent):
            averaged = trace_edit(model, order.requests, references, progress=job.step, cancelled=job.cancelled)
        return choose_layers(averaged, most=most_layers(model)).layers, averaged

    def _traced_layers(self, model: str, trace: str) -> tuple[tuple[int, ...], AveragedTrace]:
        """What a trace found. Raises NoCausalSiteError where that is nothing, MalformedError where it has not ended."""
        traced = self._ledger.job(JobKind.TRACE, model, trace)
        if traced.state is not JobState.SUCCEEDED or traced.result is None:
            raise MalformedError(
                f"the trace {trace!r} is {traced.state}; name one that has succeeded",
                field="layers.trace",
                reason="TRACE_NOT_DONE",
            )
        found = trace_pb2.CausalTraceResult.FromString(traced.result)
        if not found.auto_layers:
            raise NoCausalSiteError(f"the trace {trace!r} chooses no layers: {found.auto_refusal}")
        window = trace_pb2.CreateTraceRequest.FromString(traced.request).window
        return tuple(found.auto_layers), averaged_trace(found, window or TraceSettings().window)

    def _statistics(
        self, job: RunningJob, loaded: LoadedModel, model: EditableModel, order: EditOrder, settings: EditSettings
    ) -> KeyStatistics | None:
        if settings.method is Method.MULTEDIT:
            return None
        job.stage("statistics", len(order.references or loaded.references))
        return loaded.statistics(model, settings.layers, order.references, progress=job.step)

    def _progress(self, job: RunningJob) -> StageProgress:
        """The editor's own stages as the job's."""
        begun: set[Stage] = set()

        def tell(stage: Stage, done: int, total: int) -> None:
            if stage not in begun:
                begun.add(stage)
                job.stage(stage.value, total)
            if stage is Stage.VALUES:
                self._fault("values")
            job.step(done, total)

        return tell


def _holds(held: int) -> tuple[str, ...]:
    """What the report says of the requests of earlier edits, if any are held."""
    return (f"holds {counted(held, 'request')} of earlier edits",) if held else ()


def own_probes(requests: Sequence[EditRequest]) -> tuple[Probe, ...]:
    """What judges every edit: each request's first question, and the prompts whose answers it is to preserve."""
    asked = (
        Probe(
            metric=Metric.EFFICACY,
            prompt=r.contexts[0].prompt,
            expected=r.contexts[0].answer or r.target,
            request=r.name,
        )
        for r in requests
    )
    kept = (
        Probe(metric=Metric.SAME_IMAGE, prompt=c.prompt, believed=c.answer, request=r.name)
        for r in requests
        for c in r.preserve
    )
    return (*asked, *kept)
