"""What the server answers, read off the wire into frozen results. Pure. What a newer server adds is passed over."""

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from enum import StrEnum
from typing import TypeVar

from google.protobuf.descriptor import EnumDescriptor
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp

from errata.client import results
from errata.client.inputs import Component, Method, Metric
from errata.v1 import common_pb2, edit_pb2, evaluation_pb2, history_pb2, inference_pb2, model_pb2, trace_pb2

E = TypeVar("E", bound=StrEnum)


def model(said: model_pb2.Model) -> results.Model:
    """A base model."""
    return results.Model(
        name=said.name,
        base_sha256=said.base_sha256,
        architecture=said.architecture,
        loaded=said.loaded,
        memory_bytes=said.memory_bytes,
        dtype=said.dtype,
        device=said.device,
        layers=said.layers,
        aliases=tuple(map(alias, said.aliases)),
        versions_memory_bytes=said.versions_memory_bytes,
    )


def alias(said: model_pb2.Alias) -> results.Alias:
    """A name for a version."""
    return results.Alias(name=said.name, version=said.version, etag=said.etag)


def version(said: model_pb2.Version) -> results.Version:
    """A version."""
    return results.Version(
        name=said.name,
        parent=said.parent,
        edit=said.edit,
        state=_member(results.VersionState, model_pb2.VersionState.DESCRIPTOR, said.state),
        base_sha256=said.base_sha256,
        delta_sha256=said.delta_sha256,
        delta_bytes=said.delta_bytes,
        layers=tuple(said.layers),
        scores=tuple(map(_score, said.scores)),
        aliases=tuple(said.aliases),
        publish_state=_member(results.PublishState, model_pb2.PublishState.DESCRIPTOR, said.publish_state),
        mlflow_version=said.mlflow_version,
        mlflow_run_id=said.mlflow_run_id,
        created_by=said.created_by,
        create_time=_time(said, "create_time"),
        facts=tuple(said.facts),
        rejections=tuple(said.rejections),
        derivation=said.derivation,
    )


def audit_entry(said: model_pb2.AuditEntry) -> results.AuditEntry:
    """One change, for the record."""
    return results.AuditEntry(
        time=_time(said, "time"),
        actor=said.actor,
        action=said.action,
        resource=said.resource,
        details=_json_object(said.details_json),
    )


def trace(said: trace_pb2.CausalTrace) -> results.CausalTrace:
    """A causal trace."""
    return results.CausalTrace(
        name=said.name,
        version=said.version,
        job=job(said.job),
        questions=said.questions,
        window=said.window,
        result=_trace_result(said.result) if said.HasField("result") else None,
    )


def edit(said: edit_pb2.Edit) -> results.Edit:
    """An edit."""
    return results.Edit(
        name=said.name,
        parent=said.parent,
        job=job(said.job),
        version=said.version,
        requests=said.requests,
        facts=tuple(said.facts),
        settings=_settings(said.settings) if said.HasField("settings") else None,
        layers=tuple(said.layers),
        outcomes=tuple(map(_outcome, said.outcomes)),
        scores=tuple(map(_score, said.scores)),
        rejections=tuple(said.rejections),
    )


def evaluation(said: evaluation_pb2.Evaluation) -> results.Evaluation:
    """An evaluation."""
    return results.Evaluation(
        name=said.name,
        version=said.version,
        baseline=said.baseline,
        job=job(said.job),
        scores=tuple(map(_score, said.scores)),
        drift=said.drift,
        results=tuple(map(_probe_result, said.results)),
        rejections=tuple(said.rejections),
    )


def derivation(said: history_pb2.Derivation) -> results.Derivation:
    """A version made of versions."""
    return results.Derivation(
        name=said.name,
        parent=said.parent,
        kind=_member(results.DerivationKind, history_pb2.DerivationKind.DESCRIPTOR, said.kind),
        job=job(said.job),
        version=said.version,
        sources=tuple(said.sources),
        facts=tuple(said.facts),
        layers=tuple(said.layers),
        conflicts=tuple(map(_conflict, said.conflicts)),
        later=tuple(
            results.LaterEdit(version=each.version, facts=tuple(each.facts), scores=tuple(map(_score, each.scores)))
            for each in said.later
        ),
        equality=_equality(said.equality) if said.HasField("equality") else None,
        scores=tuple(map(_score, said.scores)),
        rejections=tuple(said.rejections),
        reverted=tuple(map(_probe_result, said.reverted)),
    )


def comparison(said: history_pb2.CompareVersionsResponse) -> results.Comparison:
    """What two versions differ in."""
    return results.Comparison(
        first=said.first,
        second=said.second,
        only_first=tuple(map(_version_fact, said.only_first)),
        only_second=tuple(map(_version_fact, said.only_second)),
        layers=tuple(
            results.LayerDifference(layer=each.layer, relative_norm=each.relative_norm, rank=each.rank)
            for each in said.layers
        ),
        answers=tuple(
            results.AnswerPair(
                question=each.question,
                expected=each.expected,
                first=each.first,
                second=each.second,
                request=each.request,
            )
            for each in said.answers
        ),
    )


def bisection(said: history_pb2.Bisection) -> results.Bisection:
    """A search for the version that broke a probe."""
    return results.Bisection(
        name=said.name,
        good=said.good,
        bad=said.bad,
        job=job(said.job),
        first_bad=said.first_bad,
        facts=tuple(said.facts),
        steps=tuple(
            results.BisectionStep(version=each.version, good=each.good, failed=tuple(map(_probe_result, each.failed)))
            for each in said.steps
        ),
    )


def generation(said: inference_pb2.GenerateResponse) -> results.Generation:
    """An answer."""
    return results.Generation(
        version=said.version,
        text=said.text,
        finish_reason=_member(results.FinishReason, inference_pb2.FinishReason.DESCRIPTOR, said.finish_reason),
        prompt_tokens=said.usage.prompt_tokens,
        generated_tokens=said.usage.generated_tokens,
        log_probability=said.log_probability,
        risk=said.risk,
        seed=said.seed if said.HasField("seed") else None,
    )


def scores(said: inference_pb2.ScoreResponse) -> results.Scores:
    """How likely each candidate is."""
    return results.Scores(
        version=said.version,
        candidates=tuple(
            results.CandidateScore(candidate=each.candidate, log_probability=each.log_probability, tokens=each.tokens)
            for each in said.scores
        ),
    )


def job(said: common_pb2.Job) -> results.Job:
    """What all pieces of work have in common."""
    error = said.error
    return results.Job(
        state=_member(results.State, common_pb2.State.DESCRIPTOR, said.state),
        progress=results.Progress(stage=said.progress.stage, done=said.progress.done, total=said.progress.total),
        error=results.Failure(reason=error.reason, message=error.message, field=error.field)
        if said.HasField("error")
        else None,
        created_by=said.created_by,
        create_time=_time(said, "create_time"),
        start_time=_time(said, "start_time"),
        end_time=_time(said, "end_time"),
    )


def _score(said: evaluation_pb2.MetricScore) -> results.MetricScore:
    return results.MetricScore(
        metric=_metric(said.metric),
        n=said.n,
        before=said.before,
        after=said.after,
        forced=said.forced,
        low=said.low,
        high=said.high,
    )


def _probe_result(said: evaluation_pb2.ProbeResult) -> results.ProbeResult:
    return results.ProbeResult(
        metric=_metric(said.metric),
        question=said.question,
        expected=said.expected,
        before=said.before,
        after=said.after,
        passed=said.passed,
        request=said.request,
    )


def _conflict(said: history_pb2.Conflict) -> results.Conflict:
    return results.Conflict(
        first=_version_fact(said.first),
        second=_version_fact(said.second),
        key_overlap=said.key_overlap,
        question=said.question,
        expected=said.expected,
        answer=said.answer,
    )


def _version_fact(said: history_pb2.VersionFact) -> results.VersionFact:
    return results.VersionFact(version=said.version, fact=said.fact)


def _equality(said: history_pb2.Equality) -> results.Equality:
    return results.Equality(
        max_logit_difference=said.max_logit_difference,
        n=said.n,
        same_answers=said.same_answers,
        rank_before=said.rank_before,
        rank_after=said.rank_after,
    )


def _settings(said: edit_pb2.EditSettings) -> results.EditSettings:
    return results.EditSettings(
        method=_member(Method, edit_pb2.Method.DESCRIPTOR, said.method),
        preservation=said.preservation if said.HasField("preservation") else None,
        ridge=said.ridge if said.HasField("ridge") else None,
        steps=said.steps if said.HasField("steps") else None,
    )


def _outcome(said: edit_pb2.RequestOutcome) -> results.RequestOutcome:
    return results.RequestOutcome(
        name=said.name,
        target=said.target,
        before=said.before,
        converged=said.converged,
        losses=tuple(said.losses),
    )


def _trace_result(said: trace_pb2.CausalTraceResult) -> results.CausalTraceResult:
    return results.CausalTraceResult(
        roles=tuple(said.roles),
        total_effect=said.total_effect,
        total_effect_deviation=said.total_effect_deviation,
        grids=tuple(map(_grid, said.grids)),
        clean=said.clean,
        corrupted=said.corrupted,
        traces=tuple(map(_question_trace, said.traces)),
        auto_layers=tuple(said.auto_layers),
        auto_refusal=said.auto_refusal,
        skipped=tuple(said.skipped),
    )


def _question_trace(said: trace_pb2.QuestionTrace) -> results.QuestionTrace:
    return results.QuestionTrace(
        question=said.question,
        answer=said.answer,
        tokens=tuple(said.tokens),
        constraint=tuple(said.constraint),
        clean=said.clean,
        corrupted=said.corrupted,
        clean_first=said.clean_first,
        corrupted_first=said.corrupted_first,
        grids=tuple(map(_grid, said.grids)),
    )


def _grid(said: trace_pb2.EffectGrid) -> results.EffectGrid:
    return results.EffectGrid(
        component=_member(Component, trace_pb2.Component.DESCRIPTOR, said.component),
        effects=_rows(said.effects, said.columns),
        deviations=_rows(said.deviations, said.columns),
    )


def _rows(values: Sequence[float], columns: int) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(values[start : start + columns]) for start in range(0, len(values), max(columns, 1)))


def _metric(number: int) -> Metric:
    return _member(Metric, evaluation_pb2.Metric.DESCRIPTOR, number)


def _member(kind: type[E], wire: EnumDescriptor, number: int) -> E:
    prefix = wire.values_by_number[0].name.removesuffix("UNSPECIFIED")
    value = wire.values_by_number.get(number)
    members = kind.__members__
    return members.get(value.name.removeprefix(prefix), members["UNKNOWN"]) if value else members["UNKNOWN"]


def _time(said: Message, field: str) -> datetime | None:
    stamp = getattr(said, field)
    return stamp.ToDatetime(UTC) if isinstance(stamp, Timestamp) and said.HasField(field) else None


def _json_object(text: str) -> Mapping[str, results.JsonValue]:
    try:
        value = json.loads(text)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}
