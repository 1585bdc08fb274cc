"""What the editor and the ledger hold → protos.

A job's stored result is the serialized message of its outcome: CausalTraceResult of a trace; Edit and Evaluation, of
which only what came about is set, of the others. The `…_message` of a job puts it together with what was asked for.
"""

import json
from collections.abc import Iterable, Sequence
from datetime import datetime

import numpy as np
from google.protobuf import json_format
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp
from numpy.typing import NDArray

from errata.editor.errors import InvalidInputError, NoCausalSiteError
from errata.editor.evaluation import Evaluation, ProbeResult, Score
from errata.editor.localization import MOST_LAYERS, choose_layers
from errata.editor.methods import RIDGES, EditResult, EditSettings, RequestOutcome
from errata.editor.states import Component
from errata.editor.trace import AveragedTrace, CausalTrace
from errata.server.conversion.enums import (
    COMPONENT_VALUES,
    METHOD_VALUES,
    METRIC_VALUES,
    PUBLISH_STATES,
    STATES,
)
from errata.server.ledger.rows import AliasRow, AuditRow, JobKind, JobRow, JobState, ModelRow, VersionRow
from errata.server.names import alias_name, job_name, model_name, version_name
from errata.v1 import common_pb2, edit_pb2, evaluation_pb2, model_pb2, trace_pb2


def job_message(row: JobRow) -> common_pb2.Job:
    """What all jobs have in common."""
    job = common_pb2.Job(
        state=STATES[row.state],
        created_by=row.created_by,
        create_time=_time(row.create_time),
        start_time=_time(row.start_time),
        end_time=_time(row.end_time),
    )
    if not row.state.ended:
        job.progress.CopyFrom(common_pb2.Progress(stage=row.stage, done=row.done, total=row.total))
    if row.state is JobState.FAILED and row.failure:
        failure = row.failure
        job.error.CopyFrom(common_pb2.Failure(reason=failure.reason, message=failure.message, field=failure.field))
    return job


def trace_message(row: JobRow, *, full: bool = True) -> trace_pb2.CausalTrace:
    """A trace as it stands; its effects where `full`."""
    message = planned_trace(trace_pb2.CreateTraceRequest.FromString(row.request), row.model, row.version)
    message.name = job_name(JobKind.TRACE, row.model, row.id)
    message.job.CopyFrom(job_message(row))
    if full and row.result:
        message.result.ParseFromString(row.result)
    return message


def planned_trace(request: trace_pb2.CreateTraceRequest, model: str, number: int) -> trace_pb2.CausalTrace:
    """A trace before it has a name: what a call that only validates gives back."""
    return trace_pb2.CausalTrace(
        version=version_name(model, number),
        questions=len(request.questions),
        window=request.window if request.HasField("window") else 1,
    )


def edit_message(row: JobRow, *, full: bool = True) -> edit_pb2.Edit:
    """An edit as it stands; its outcomes where `full`."""
    message = planned_edit(edit_pb2.CreateEditRequest.FromString(row.request), row.model, row.version)
    if row.result:
        message.MergeFromString(row.result)
    if not full:
        message.ClearField("outcomes")
    message.name = job_name(JobKind.EDIT, row.model, row.id)
    message.version = version_name(row.model, row.made) if row.made is not None else ""
    message.job.CopyFrom(job_message(row))
    return message


def planned_edit(request: edit_pb2.CreateEditRequest, model: str, number: int) -> edit_pb2.Edit:
    """An edit before it has a name: what a call that only validates gives back."""
    return edit_pb2.Edit(
        parent=version_name(model, number),
        requests=len(request.requests),
        facts=[fact_line(r) for r in request.requests],
    )


def fact_line(request: edit_pb2.EditRequest) -> str:
    """What is edited, in one line: "Kazakhstan: capital → Astana"; all answers, where one request tells several."""
    answers = dict.fromkeys([request.target, *(c.answer for c in request.contexts if c.answer)])
    return f"{request.name} → {', '.join(' '.join(a.split()) for a in answers)}"


def evaluation_message(row: JobRow, *, full: bool = True) -> evaluation_pb2.Evaluation:
    """An evaluation as it stands; the probes' results where `full`."""
    message = planned_evaluation(row.model, row.version)
    message.baseline = evaluation_pb2.CreateEvaluationRequest.FromString(row.request).baseline
    if row.result:
        message.MergeFromString(row.result)
    if not full:
        message.ClearField("results")
    message.name = job_name(JobKind.EVALUATION, row.model, row.id)
    message.job.CopyFrom(job_message(row))
    return message


def planned_evaluation(model: str, number: int, baseline: int | None = None) -> evaluation_pb2.Evaluation:
    """An evaluation before it has a name: what a call that only validates gives back."""
    return evaluation_pb2.Evaluation(
        version=version_name(model, number), baseline=version_name(model, baseline) if baseline is not None else ""
    )


def ended_summary(queued: bytes, outcome: Message, *left_out: str) -> bytes:
    """What lists show of a job that has ended: what they showed before, and its outcome but for some fields."""
    listed = type(outcome).FromString(queued)
    listed.MergeFrom(outcome)
    for field in left_out:
        listed.ClearField(field)
    return listed.SerializeToString(deterministic=True)


def version_message(row: VersionRow) -> model_pb2.Version:
    """A version."""
    rejected = model_pb2.VERSION_STATE_REJECTED if row.rejections else model_pb2.VERSION_STATE_READY
    return model_pb2.Version(
        name=version_name(row.model, row.number),
        parent=version_name(row.model, row.parent) if row.parent is not None else "",
        edit=job_name(JobKind.EDIT, row.model, row.edit) if row.edit and row.made_by is JobKind.EDIT else "",
        derivation=job_name(row.made_by, row.model, row.edit) if row.edit and row.made_by is not JobKind.EDIT else "",
        state=rejected,
        base_sha256=row.base_sha256,
        delta_sha256=row.delta_sha256,
        delta_bytes=row.delta_bytes,
        layers=row.layers,
        scores=scores_from_json(row.scores),
        aliases=row.aliases,
        publish_state=PUBLISH_STATES[row.publish_state],
        mlflow_version=row.mlflow_version,
        mlflow_run_id=row.mlflow_run_id,
        created_by=row.created_by,
        create_time=_time(row.create_time),
        facts=row.facts,
        rejections=row.rejections,
    )


def model_message(
    row: ModelRow,
    aliases: Iterable[AliasRow] = (),
    *,
    dtype: str,
    device: str,
    loaded: bool = False,
    memory_bytes: int = 0,
    versions_memory_bytes: int = 0,
) -> model_pb2.Model:
    """A base model: what the ledger knows of it, how it is configured, and what it takes in memory."""
    return model_pb2.Model(
        name=model_name(row.name),
        base_sha256=row.base_sha256,
        architecture=row.architecture,
        layers=row.layers,
        loaded=loaded,
        memory_bytes=memory_bytes,
        dtype=dtype,
        device=device,
        aliases=[alias_message(a) for a in aliases],
        versions_memory_bytes=versions_memory_bytes,
    )


def alias_message(row: AliasRow) -> model_pb2.Alias:
    """An alias."""
    return model_pb2.Alias(
        name=alias_name(row.model, row.alias), version=version_name(row.model, row.version), etag=row.etag
    )


def audit_message(row: AuditRow) -> model_pb2.AuditEntry:
    """An entry of the record."""
    return model_pb2.AuditEntry(
        time=_time(row.time), actor=row.actor, action=row.action, resource=row.resource, details_json=row.details
    )


def score_message(score: Score) -> evaluation_pb2.MetricScore:
    """A metric's score, with its Wilson interval."""
    low, high = score.interval
    return evaluation_pb2.MetricScore(
        metric=METRIC_VALUES[score.metric],
        n=score.n,
        before=score.before,
        after=score.after,
        forced=score.forced,
        low=low,
        high=high,
    )


def scores_json(scores: Iterable[Score]) -> str:
    """Scores as `NewVersion.scores` keeps them."""
    return json.dumps([json_format.MessageToDict(score_message(s)) for s in scores])


def scores_from_json(stored: str) -> list[evaluation_pb2.MetricScore]:
    """What `scores_json` made; nothing of the base's empty text."""
    found = json.loads(stored or "[]")
    return [json_format.ParseDict(s, evaluation_pb2.MetricScore(), ignore_unknown_fields=True) for s in found]


def probe_result_message(result: ProbeResult) -> evaluation_pb2.ProbeResult:
    """A probe's answers."""
    return evaluation_pb2.ProbeResult(
        metric=METRIC_VALUES[result.probe.metric],
        question=result.probe.prompt.text,
        expected=result.expected,
        before=result.before,
        after=result.after,
        passed=result.passed,
        request=result.probe.request or "",
    )


def evaluation_outcome(
    evaluation: Evaluation, *, baseline: str, rejections: Sequence[str] = ()
) -> evaluation_pb2.Evaluation:
    """What an evaluation's job stores as its result; `baseline` is a version's full name, by number."""
    return evaluation_pb2.Evaluation(
        baseline=baseline,
        scores=[score_message(s) for s in evaluation.scores],
        drift=evaluation.drift,
        results=[probe_result_message(r) for r in evaluation.results],
        rejections=rejections,
    )


def edit_outcome(result: EditResult, scores: Iterable[Score], rejections: Sequence[str] = ()) -> edit_pb2.Edit:
    """What an edit's job stores as its result."""
    return edit_pb2.Edit(
        settings=settings_message(result.settings),
        layers=result.settings.layers,
        outcomes=[outcome_message(o) for o in result.outcomes],
        scores=[score_message(s) for s in scores],
        rejections=rejections,
    )


def settings_message(settings: EditSettings) -> edit_pb2.EditSettings:
    """How it was edited, the method's own ridge filled in."""
    return edit_pb2.EditSettings(
        method=METHOD_VALUES[settings.method],
        preservation=settings.preservation,
        ridge=RIDGES[settings.method] if settings.ridge is None else settings.ridge,
        steps=settings.values.steps,
    )


def outcome_message(outcome: RequestOutcome) -> edit_pb2.RequestOutcome:
    """How one request's value went."""
    return edit_pb2.RequestOutcome(
        name=outcome.name,
        target=outcome.target,
        before=outcome.before,
        converged=outcome.value.converged,
        losses=outcome.value.losses,
    )


def causal_trace_result(
    averaged: AveragedTrace, skipped: Sequence[str] = (), *, most: int = MOST_LAYERS
) -> trace_pb2.CausalTraceResult:
    """What a trace's job stores as its result; `skipped` says which questions were left out, one line each.

    AUTO would edit `most` layers at most.
    """
    effects = [t.total_effect for t in averaged.traces]
    result = trace_pb2.CausalTraceResult(
        roles=averaged.roles,
        total_effect=averaged.total_effect,
        total_effect_deviation=float(np.std(effects, ddof=1)) if len(effects) > 1 else 0.0,
        grids=[_average_grid(averaged, c) for c in averaged.components],
        clean=float(np.mean([t.clean.whole for t in averaged.traces])),
        corrupted=float(np.mean([t.corrupted.whole for t in averaged.traces])),
        traces=[question_trace(t) for t in averaged.traces],
        skipped=skipped,
    )
    try:
        result.auto_layers.extend(choose_layers(averaged, most=most).layers)
    except (NoCausalSiteError, InvalidInputError) as error:  # the latter where no MLP was traced
        result.auto_refusal = str(error)
    return result


def question_trace(trace: CausalTrace) -> trace_pb2.QuestionTrace:
    """The trace of one question."""
    return trace_pb2.QuestionTrace(
        question=trace.question,
        answer=trace.answer,
        tokens=trace.tokens,
        constraint=trace.constraint,
        clean=trace.clean.whole,
        corrupted=trace.corrupted.whole,
        clean_first=trace.clean.first,
        corrupted_first=trace.corrupted.first,
        grids=[_grid(c, trace.indirect(c)) for c in trace.components],
    )


def _average_grid(averaged: AveragedTrace, component: Component) -> trace_pb2.EffectGrid:
    if len(averaged.traces) == 1:
        return _grid(component, averaged.aie(component))
    # The spread is the mean's standard error; √n of it is the deviation of one question.
    n = (~np.isnan(averaged.samples(component))).sum(0)
    return _grid(component, averaged.aie(component), averaged.spread(component) * np.sqrt(n))


def _grid(
    component: Component, effects: NDArray[np.float64], deviations: NDArray[np.float64] | None = None
) -> trace_pb2.EffectGrid:
    rows, columns = effects.shape
    return trace_pb2.EffectGrid(
        component=COMPONENT_VALUES[component],
        rows=rows,
        columns=columns,
        effects=effects.ravel(),
        deviations=() if deviations is None else deviations.ravel(),
    )


def _time(moment: datetime | None) -> Timestamp | None:
    if moment is None:
        return None
    stamp = Timestamp()
    stamp.FromDatetime(moment)
    return stamp
