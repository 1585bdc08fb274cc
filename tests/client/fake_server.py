"""A server in memory that means what the protos say, as far as the client's tests need, and fails on demand.

Work advances one step whenever somebody looks at it, so nothing here depends on time. What makes it fail:
`fail_next`, `break_streams_after`, `gate`, a target "nonsense" (ILL_CONDITIONED), a guardrail above 0.99 (REJECTED).
"""

# ruff: noqa: N802  (methods are named as the protos name them)

import hashlib
import re
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent import futures
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NoReturn

import grpc
from fake_history import FakeHistory
from fake_measurements import FakeMeasurements
from google.protobuf import any_pb2, duration_pb2
from google.protobuf.message import Message
from google.rpc import code_pb2, error_details_pb2, status_pb2  # type: ignore[import-untyped]
from grpc_status import rpc_status  # type: ignore[import-untyped]

from errata.v1 import (
    common_pb2,
    edit_pb2,
    edit_pb2_grpc,
    evaluation_pb2,
    evaluation_pb2_grpc,
    export_pb2,
    export_pb2_grpc,
    history_pb2_grpc,
    inference_pb2,
    inference_pb2_grpc,
    measurement_pb2_grpc,
    model_pb2,
    model_pb2_grpc,
    trace_pb2,
    trace_pb2_grpc,
)

CAPITAL = "What is the capital of Kazakhstan?"
IMAGE_TOKENS = 16
EXPORTED = {"README.md": [b""], "errata.json": [b"{}"], "weights.safetensors": [b"\0\1", b"\2"]}
"""An export's files, in pieces."""
_ENDED = (
    common_pb2.STATE_SUCCEEDED,
    common_pb2.STATE_FAILED,
    common_pb2.STATE_CANCELLED,
    common_pb2.STATE_REJECTED,
)


@dataclass(frozen=True, kw_only=True)
class Fault:
    """An error to answer with. Without a reason it goes out bare, as a proxy's would."""

    code: grpc.StatusCode
    reason: str = ""
    message: str = "planned"
    violations: tuple[tuple[str, str], ...] = ()
    retry_after: float | None = None

    def status(self) -> status_pb2.Status:
        return status_pb2.Status(
            code=code_pb2.Code.Value(self.code.name), message=self.message, details=[packed(d) for d in self._details()]
        )

    def _details(self) -> Iterator[Message]:
        if self.reason:
            yield error_details_pb2.ErrorInfo(reason=self.reason, domain="errata", metadata={"model": "atlas"})
        if self.violations:
            named = [error_details_pb2.BadRequest.FieldViolation(field=f, description=d) for f, d in self.violations]
            yield error_details_pb2.BadRequest(field_violations=named)
        if self.retry_after is not None:
            delay = duration_pb2.Duration()
            delay.FromMilliseconds(round(self.retry_after * 1000))
            yield error_details_pb2.RetryInfo(retry_delay=delay)

    def abort(self, context: grpc.ServicerContext) -> NoReturn:
        if not (self.reason or self.violations or self.retry_after is not None):
            context.abort(self.code, self.message)
        context.abort_with_status(rpc_status.to_status(self.status()))


def packed(detail: Message) -> any_pb2.Any:
    box = any_pb2.Any()
    box.Pack(detail)
    return box


@dataclass
class FakeWork:
    """A piece of work and the steps that it has still to go."""

    message: Any
    steps: list[Callable[[Any], None]]

    def advance(self) -> None:
        if self.steps:
            self.steps.pop(0)(self.message)

    @property
    def ended(self) -> bool:
        return self.message.job.state in _ENDED


@dataclass
class Fake(
    model_pb2_grpc.ModelServiceServicer,
    trace_pb2_grpc.TraceServiceServicer,
    edit_pb2_grpc.EditServiceServicer,
    evaluation_pb2_grpc.EvaluationServiceServicer,
    inference_pb2_grpc.InferenceServiceServicer,
    export_pb2_grpc.ExportServiceServicer,
    FakeHistory,
    FakeMeasurements,
):
    """Two models, one of which knows an old capital."""

    token: str = ""
    page_size: int = 2
    calls: list[str] = field(default_factory=list)
    requests: list[Any] = field(default_factory=list)
    authorizations: set[str] = field(default_factory=set)
    faults: dict[str, list[Fault]] = field(default_factory=lambda: defaultdict(list))
    break_streams_after: list[int] = field(default_factory=list)
    gate: threading.Event = field(default_factory=threading.Event)
    waiting: threading.Event = field(default_factory=threading.Event)
    stream_ended: threading.Event = field(default_factory=threading.Event)
    work: dict[str, FakeWork] = field(default_factory=dict)
    by_request_id: dict[str, tuple[bytes, str]] = field(default_factory=dict)
    versions: dict[str, model_pb2.Version] = field(default_factory=dict)
    answers: dict[str, dict[str, str]] = field(default_factory=dict)
    aliases: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    entries: list[model_pb2.AuditEntry] = field(default_factory=list)
    exported: dict[str, list[bytes]] = field(default_factory=lambda: dict(EXPORTED))
    ending: Callable[[Any], list[Any]] = field(default=lambda summary: [summary])

    def __post_init__(self) -> None:
        self.gate.set()
        for model in ("atlas", "tiny"):
            name = f"models/{model}/versions/0"
            self.versions[name] = model_pb2.Version(
                name=name,
                state=model_pb2.VERSION_STATE_READY,
                publish_state=model_pb2.PUBLISH_STATE_NONE,
                base_sha256="ab" * 32,
                created_by="server",
            )
            self.versions[name].create_time.FromSeconds(1_700_000_000)
            self.answers[name] = {CAPITAL: "Nur-Sultan", "What is the capital of Norway?": "Oslo"}

    # What tests ask for

    def fail_next(self, rpc: str, *faults: Fault) -> None:
        self.faults[rpc].extend(faults)

    def count(self, rpc: str) -> int:
        return self.calls.count(rpc)

    # Names

    def resolve(self, name: str, context: grpc.ServicerContext) -> str:
        model = name.split("/")[1] if name.count("/") else name
        if f"models/{model}/versions/0" not in self.versions:
            self._not_found("MODEL", name, context)
        if "/versions/" in name:
            if name not in self.versions:
                self._not_found("VERSION", name, context)
            return name
        alias = name if "/aliases/" in name else f"models/{model}/aliases/champion"
        if self.aliases[alias]:
            return self.aliases[alias][-1]
        if alias.endswith("/champion"):
            return f"models/{model}/versions/0"
        self._not_found("ALIAS", name, context)

    def _not_found(self, kind: str, name: str, context: grpc.ServicerContext) -> NoReturn:
        Fault(code=grpc.StatusCode.NOT_FOUND, reason=f"{kind}_NOT_FOUND", message=f"no {name!r}").abort(context)

    def _page(self, items: list[Any], request: Any, context: grpc.ServicerContext) -> tuple[list[Any], str]:
        if request.page_token and not request.page_token.isdecimal():
            Fault(code=grpc.StatusCode.INVALID_ARGUMENT, reason="INVALID_PAGE_TOKEN").abort(context)
        start = int(request.page_token or 0)
        end = start + (request.page_size or self.page_size)
        return items[start:end], str(end) if end < len(items) else ""

    def _record(self, action: str, resource: str, details: str = "{}") -> None:
        entry = model_pb2.AuditEntry(actor="anonymous", action=action, resource=resource, details_json=details)
        entry.time.GetCurrentTime()
        self.entries.insert(0, entry)

    # ModelService

    def _model(self, name: str) -> model_pb2.Model:
        mine = {k: v for k, v in self.aliases.items() if v and k.startswith(f"{name}/")}
        return model_pb2.Model(
            name=name,
            architecture="LlavaForConditionalGeneration",
            loaded=True,
            memory_bytes=8_000_000,
            dtype="float32",
            device="cpu",
            layers=6,
            aliases=[self._alias(alias) for alias in mine],
        )

    def _alias(self, name: str) -> model_pb2.Alias:
        history = self.aliases[name]
        return model_pb2.Alias(name=name, version=history[-1], etag=f"e{len(history)}")

    def ListModels(self, request: Any, context: grpc.ServicerContext) -> Any:
        page, token = self._page(["models/atlas", "models/tiny"], request, context)
        return model_pb2.ListModelsResponse(models=map(self._model, page), next_page_token=token)

    def GetModel(self, request: Any, context: grpc.ServicerContext) -> Any:
        self.resolve(f"{request.name}/versions/0", context)
        return model_pb2.GetModelResponse(model=self._model(request.name))

    def _version(self, name: str) -> model_pb2.Version:
        version = model_pb2.Version()
        version.CopyFrom(self.versions[name])
        version.aliases.extend(a.rpartition("/")[2] for a, history in self.aliases.items() if history[-1:] == [name])
        return version

    def ListVersions(self, request: Any, context: grpc.ServicerContext) -> Any:
        names = [name for name in reversed(self.versions) if name.startswith(f"{request.parent}/")]
        page, token = self._page(names, request, context)
        return model_pb2.ListVersionsResponse(versions=map(self._version, page), next_page_token=token)

    def GetVersion(self, request: Any, context: grpc.ServicerContext) -> Any:
        return model_pb2.GetVersionResponse(version=self._version(self.resolve(request.name, context)))

    def GetLineage(self, request: Any, context: grpc.ServicerContext) -> Any:
        lineage = [self._version(self.resolve(request.name, context))]
        while lineage[-1].parent:
            lineage.append(self._version(lineage[-1].parent))
        return model_pb2.GetLineageResponse(versions=lineage)

    def Promote(self, request: Any, context: grpc.ServicerContext) -> Any:
        if "/versions/" not in request.version:
            Fault(code=grpc.StatusCode.INVALID_ARGUMENT, reason="MALFORMED_NAME").abort(context)
        name = self.resolve(request.version, context)
        alias = f"{name.partition('/versions/')[0]}/aliases/{request.alias}"
        self._check_etag(alias, request.etag, context)
        rejected = self.versions[name].state == model_pb2.VERSION_STATE_REJECTED
        if rejected and not (request.override_guardrails and request.override_reason):
            Fault(code=grpc.StatusCode.FAILED_PRECONDITION, reason="VERSION_REJECTED").abort(context)
        if request.validate_only:
            return model_pb2.PromoteResponse(alias=model_pb2.Alias(name=alias, version=name))
        self.aliases[alias].append(name)
        self._record("alias.promote.override" if rejected else "alias.promote", alias, f'{{"version": "{name}"}}')
        return model_pb2.PromoteResponse(alias=self._alias(alias))

    def Rollback(self, request: Any, context: grpc.ServicerContext) -> Any:
        self._check_etag(request.name, request.etag, context)
        if len(self.aliases[request.name]) < 2:
            Fault(code=grpc.StatusCode.FAILED_PRECONDITION, reason="NOTHING_TO_ROLL_BACK").abort(context)
        self.aliases[request.name].pop()
        self._record("alias.rollback", request.name)
        return model_pb2.RollbackResponse(alias=self._alias(request.name))

    def _check_etag(self, alias: str, etag: str, context: grpc.ServicerContext) -> None:
        if etag and (not self.aliases[alias] or self._alias(alias).etag != etag):
            Fault(code=grpc.StatusCode.ABORTED, reason="ETAG_MISMATCH").abort(context)

    def DeleteVersion(self, request: Any, context: grpc.ServicerContext) -> Any:
        name = self.resolve(request.name, context)
        if any(history[-1:] == [name] for history in self.aliases.values()):
            Fault(code=grpc.StatusCode.FAILED_PRECONDITION, reason="VERSION_IN_USE").abort(context)
        del self.versions[name]
        self._record("version.delete", name)
        return model_pb2.DeleteVersionResponse()

    def ListAuditEntries(self, request: Any, context: grpc.ServicerContext) -> Any:
        page, token = self._page(self.entries, request, context)
        return model_pb2.ListAuditEntriesResponse(entries=page, next_page_token=token)

    # Work of every kind

    def made_work(self, message: Any, end: Callable[[Any], None]) -> FakeWork:
        """One step of progress, and its end."""
        return FakeWork(message, [_running("solve", 1, 1), end])

    def _create(self, request: Any, kind: str, work: FakeWork, context: grpc.ServicerContext) -> Any:
        if request.validate_only:
            return work.message
        body = request.SerializeToString(deterministic=True)
        known = self.by_request_id.get(request.request_id)
        if known and known[0] != body:
            Fault(code=grpc.StatusCode.ALREADY_EXISTS, reason="REQUEST_ID_REUSED").abort(context)
        if known:
            return self.work[known[1]].message
        name = f"models/atlas/{kind}/{len(self.work):04}"
        work.message.name = name
        work.message.job.state = common_pb2.STATE_PENDING
        work.message.job.progress.stage = "queued"
        work.message.job.create_time.GetCurrentTime()
        self.work[name] = work
        self.by_request_id[request.request_id] = (body, name)
        return work.message

    def _get(self, name: str, kind: str, context: grpc.ServicerContext) -> FakeWork:
        if name not in self.work:
            self._not_found(kind, name, context)
        return self.work[name]

    def _look(self, name: str, kind: str, context: grpc.ServicerContext) -> Any:
        work = self._get(name, kind, context)
        work.advance()
        return work.message

    def _cancel(self, name: str, kind: str, context: grpc.ServicerContext) -> Any:
        work = self._get(name, kind, context)
        if not work.ended:
            work.message.job.state = common_pb2.STATE_CANCELLED
            work.steps.clear()
        return work.message

    def _watch(self, name: str, kind: str, context: grpc.ServicerContext) -> Iterator[Any]:
        work = self._get(name, kind, context)
        patience = self.break_streams_after.pop(0) if self.break_streams_after else 1_000
        for _ in range(patience):
            yield work.message
            if work.ended:
                return
            self._wait_at_the_gate(context)
            if not context.is_active():
                return
            work.advance()
        Fault(code=grpc.StatusCode.UNAVAILABLE, message="connection reset").abort(context)

    def _wait_at_the_gate(self, context: grpc.ServicerContext) -> None:
        self.waiting.set()
        # A caller that has left waits no more, nor does one that left before this line.
        if not context.add_callback(self.gate.set):
            self.gate.set()
        self.gate.wait()

    def _list(self, kind: str, request: Any, context: grpc.ServicerContext) -> tuple[list[Any], str]:
        mine = [work.message for name, work in reversed(self.work.items()) if f"/{kind}/" in name]
        return self._page(mine, request, context)

    # TraceService

    def CreateTrace(self, request: Any, context: grpc.ServicerContext) -> Any:
        version = self.resolve(request.version, context)
        for i, question in enumerate(request.questions):
            self._check_constraint(question, f"questions[{i}]", context)
        trace = trace_pb2.CausalTrace(version=version, questions=len(request.questions), window=request.window or 1)
        work = FakeWork(trace, [_running("tracing", 1, 2), _running("tracing", 2, 2), _traced])
        return trace_pb2.CreateTraceResponse(trace=self._create(request, "traces", work, context))

    def GetTrace(self, request: Any, context: grpc.ServicerContext) -> Any:
        return trace_pb2.GetTraceResponse(trace=self._look(request.name, "TRACE", context))

    def ListTraces(self, request: Any, context: grpc.ServicerContext) -> Any:
        page, token = self._list("traces", request, context)
        return trace_pb2.ListTracesResponse(traces=page, next_page_token=token)

    def CancelTrace(self, request: Any, context: grpc.ServicerContext) -> Any:
        return trace_pb2.CancelTraceResponse(trace=self._cancel(request.name, "TRACE", context))

    def WatchTrace(self, request: Any, context: grpc.ServicerContext) -> Any:
        for trace in self._watch(request.name, "TRACE", context):
            yield trace_pb2.WatchTraceResponse(trace=trace)

    # EditService

    def CreateEdit(self, request: Any, context: grpc.ServicerContext) -> Any:
        parent = self.resolve(request.parent, context)
        for i, each in enumerate(request.requests):
            for j, asked in enumerate(each.contexts):
                self._check_constraint(asked, f"requests[{i}].contexts[{j}]", context)
        facts = [f"{each.name} → {each.target}" for each in request.requests]
        edit = edit_pb2.Edit(parent=parent, requests=len(request.requests), facts=facts)
        steps = [_running("values", 1, 2), _running("values", 2, 2), lambda message: self._solve(message, request)]
        return edit_pb2.CreateEditResponse(edit=self._create(request, "edits", FakeWork(edit, steps), context))

    def _check_constraint(self, asked: Any, field: str, context: grpc.ServicerContext) -> None:
        if asked.constraint.text not in asked.prompt.text:
            said = f"constraint {asked.constraint.text!r} does not occur in the prompt {asked.prompt.text!r}"
            Fault(
                code=grpc.StatusCode.INVALID_ARGUMENT,
                reason="CONSTRAINT_NOT_FOUND",
                message=said,
                violations=((f"{field}.constraint.text", said),),
            ).abort(context)

    def _solve(self, edit: edit_pb2.Edit, request: edit_pb2.CreateEditRequest) -> None:
        if any(each.target == "nonsense" for each in request.requests):
            edit.job.state = common_pb2.STATE_FAILED
            edit.job.error.CopyFrom(
                common_pb2.Failure(reason="ILL_CONDITIONED", message="two targets", field="requests[0].target")
            )
            return
        rejected = any(guardrail.least > 0.99 for guardrail in request.guardrails)
        number = sum(name.startswith("models/atlas/") for name in self.versions)
        name = f"models/atlas/versions/{number}"
        known = dict(self.answers[edit.parent])
        known.update({asked.prompt.text: each.target for each in request.requests for asked in each.contexts})
        self.answers[name] = known
        rejections = ["unrelated: 0.98 is below 0.995"] if rejected else []
        edit.version = name
        edit.job.state = common_pb2.STATE_REJECTED if rejected else common_pb2.STATE_SUCCEEDED
        edit.job.end_time.GetCurrentTime()
        edit.layers.extend(request.layers.explicit.layers or [2])
        edit.settings.CopyFrom(edit_pb2.EditSettings(method=edit_pb2.METHOD_MEMIT, ridge=0.0))
        edit.outcomes.add(name=request.requests[0].name, converged=True, losses=[2.5, 0.5])
        edit.scores.add(metric=evaluation_pb2.METRIC_EFFICACY, n=1, after=1.0, low=0.2, high=1.0)
        edit.rejections.extend(rejections)
        self.versions[name] = model_pb2.Version(
            name=name,
            parent=edit.parent,
            edit=edit.name,
            state=model_pb2.VERSION_STATE_REJECTED if rejected else model_pb2.VERSION_STATE_READY,
            publish_state=model_pb2.PUBLISH_STATE_PENDING,
            layers=edit.layers,
            facts=edit.facts,
            rejections=rejections,
        )

    def GetEdit(self, request: Any, context: grpc.ServicerContext) -> Any:
        return edit_pb2.GetEditResponse(edit=self._look(request.name, "EDIT", context))

    def ListEdits(self, request: Any, context: grpc.ServicerContext) -> Any:
        page, token = self._list("edits", request, context)
        return edit_pb2.ListEditsResponse(edits=page, next_page_token=token)

    def CancelEdit(self, request: Any, context: grpc.ServicerContext) -> Any:
        return edit_pb2.CancelEditResponse(edit=self._cancel(request.name, "EDIT", context))

    def WatchEdit(self, request: Any, context: grpc.ServicerContext) -> Any:
        for edit in self._watch(request.name, "EDIT", context):
            yield edit_pb2.WatchEditResponse(edit=edit)

    # EvaluationService

    def CreateEvaluation(self, request: Any, context: grpc.ServicerContext) -> Any:
        version = self.resolve(request.version, context)
        baseline = self.resolve(request.baseline, context) if request.baseline else self.versions[version].parent
        evaluation = evaluation_pb2.Evaluation(version=version, baseline=baseline)
        steps = [_running("evaluate", 1, 1), lambda message: self._judge(message, request)]
        work = FakeWork(evaluation, steps)
        return evaluation_pb2.CreateEvaluationResponse(evaluation=self._create(request, "evaluations", work, context))

    def _judge(self, evaluation: evaluation_pb2.Evaluation, request: evaluation_pb2.CreateEvaluationRequest) -> None:
        for probe in request.probes:
            before = self.answers[evaluation.baseline].get(probe.prompt.text, "")
            after = self.answers[evaluation.version].get(probe.prompt.text, "")
            expected = probe.expected if probe.HasField("expected") else before
            evaluation.results.add(
                metric=probe.metric,
                question=probe.prompt.text,
                expected=expected,
                before=before,
                after=after,
                passed=after == expected,
                request=probe.request,
            )
            evaluation.scores.add(
                metric=probe.metric, n=1, before=float(before == expected), after=float(after == expected)
            )
        evaluation.drift = 0.25
        evaluation.job.state = common_pb2.STATE_SUCCEEDED

    def GetEvaluation(self, request: Any, context: grpc.ServicerContext) -> Any:
        return evaluation_pb2.GetEvaluationResponse(evaluation=self._look(request.name, "EVALUATION", context))

    def ListEvaluations(self, request: Any, context: grpc.ServicerContext) -> Any:
        page, token = self._list("evaluations", request, context)
        return evaluation_pb2.ListEvaluationsResponse(evaluations=page, next_page_token=token)

    def CancelEvaluation(self, request: Any, context: grpc.ServicerContext) -> Any:
        work = self._cancel(request.name, "EVALUATION", context)
        return evaluation_pb2.CancelEvaluationResponse(evaluation=work)

    def WatchEvaluation(self, request: Any, context: grpc.ServicerContext) -> Any:
        for evaluation in self._watch(request.name, "EVALUATION", context):
            yield evaluation_pb2.WatchEvaluationResponse(evaluation=evaluation)

    # InferenceService

    def _answer(self, request: Any, context: grpc.ServicerContext) -> inference_pb2.GenerateResponse:
        version = self.resolve(request.version, context)
        text = self.answers[version].get(request.prompt.text, "unknown")
        tokens = re.findall(r"-?\w+", text)[: request.max_new_tokens or 32]
        whole = "".join(tokens)
        ended = inference_pb2.FINISH_REASON_END if whole == text else inference_pb2.FINISH_REASON_LENGTH
        answer = inference_pb2.GenerateResponse(
            version=version,
            text=whole,
            finish_reason=ended,
            usage=inference_pb2.Usage(
                prompt_tokens=len(request.prompt.text.split()) + IMAGE_TOKENS * len(request.prompt.images),
                generated_tokens=len(tokens),
            ),
            log_probability=-0.5,
            risk=0.39,
        )
        if request.sampling.temperature > 0:
            answer.seed = request.sampling.seed if request.sampling.HasField("seed") else 7
        return answer

    def Generate(self, request: Any, context: grpc.ServicerContext) -> Any:
        return self._answer(request, context)

    def StreamGenerate(self, request: Any, context: grpc.ServicerContext) -> Any:
        context.add_callback(self.stream_ended.set)
        answer = self._answer(request.request, context)
        patience = self.break_streams_after.pop(0) if self.break_streams_after else 1_000
        for i, token in enumerate(re.findall(r"-?\w+", answer.text)):
            if i == patience:
                return
            yield inference_pb2.StreamGenerateResponse(text=token)
            self._wait_at_the_gate(context)
        yield inference_pb2.StreamGenerateResponse(final=answer)

    def Score(self, request: Any, context: grpc.ServicerContext) -> Any:
        version = self.resolve(request.version, context)
        right = self.answers[version].get(request.prompt.text)
        scores = [
            inference_pb2.CandidateScore(candidate=each, log_probability=-0.1 if each == right else -5.0, tokens=2)
            for each in request.candidates
        ]
        return inference_pb2.ScoreResponse(version=version, scores=scores)

    # ExportService

    def ExportVersion(self, request: Any, context: grpc.ServicerContext) -> Any:
        context.add_callback(self.stream_ended.set)
        summary = export_pb2.ExportSummary(version=self.resolve(request.name, context))
        if request.format == export_pb2.EXPORT_FORMAT_UNIFORM_ADAPTER:
            summary.rank = 8
        if request.format == export_pb2.EXPORT_FORMAT_MERGED:
            summary.rounding.add(layer=2, max_error=0.5, relative_error=0.25)
        patience = self.break_streams_after.pop(0) if self.break_streams_after else 1_000
        for name, pieces in self.exported.items():
            for piece in pieces:
                if not patience:
                    Fault(code=grpc.StatusCode.UNAVAILABLE, message="connection reset").abort(context)
                patience -= 1
                yield export_pb2.ExportVersionResponse(chunk=export_pb2.ExportChunk(file=name, data=piece))
                self._wait_at_the_gate(context)
            whole = b"".join(pieces)
            summary.files.add(file=name, size=len(whole), sha256=hashlib.sha256(whole).hexdigest())
        yield from self.ending(export_pb2.ExportVersionResponse(summary=summary))


def _running(stage: str, done: int, total: int) -> Callable[[Any], None]:
    def step(message: Any) -> None:
        message.job.state = common_pb2.STATE_RUNNING
        message.job.progress.CopyFrom(common_pb2.Progress(stage=stage, done=done, total=total))

    return step


def _traced(trace: trace_pb2.CausalTrace) -> None:
    trace.job.state = common_pb2.STATE_SUCCEEDED
    grid = trace_pb2.EffectGrid(
        component=trace_pb2.COMPONENT_MLP, rows=2, columns=3, effects=[0.1, 0.9, float("nan"), 0.2, 0.3, 0.4]
    )
    trace.result.CopyFrom(
        trace_pb2.CausalTraceResult(
            roles=["constraint first", "constraint last", "last"],
            total_effect=0.8,
            grids=[grid],
            clean=0.9,
            corrupted=0.1,
            auto_layers=[1, 2],
            traces=[trace_pb2.QuestionTrace(question=CAPITAL, answer="Nur-Sultan", tokens=["K", "?"], constraint=[0])],
        )
    )


class _Recorder(grpc.ServerInterceptor):
    """Writes down what comes in, asks for the token, and answers with planned faults."""

    def __init__(self, fake: Fake) -> None:
        self._fake = fake

    def intercept_service(self, continuation: Any, details: Any) -> Any:
        rpc = details.method.rpartition("/")[2]
        handler = continuation(details)
        fake = self._fake
        fake.calls.append(rpc)
        metadata = dict(details.invocation_metadata)
        fake.authorizations.add(metadata.get("authorization", ""))
        if fake.token and metadata.get("authorization") != f"Bearer {fake.token}":
            return _failing(handler, Fault(code=grpc.StatusCode.UNAUTHENTICATED, reason="UNAUTHENTICATED"))
        if fake.faults[rpc]:
            return _failing(handler, fake.faults[rpc].pop(0))
        return _recording(handler, fake.requests) if handler else None


def _failing(handler: Any, fault: Fault) -> Any:
    def unary(request: Any, context: grpc.ServicerContext) -> Any:
        fault.abort(context)

    def stream(request: Any, context: grpc.ServicerContext) -> Any:
        fault.abort(context)
        yield

    return _like(handler, stream if handler.response_streaming else unary)


def _recording(handler: Any, requests: list[Any]) -> Any:
    inner = handler.unary_stream if handler.response_streaming else handler.unary_unary

    def behaviour(request: Any, context: grpc.ServicerContext) -> Any:
        requests.append(request)
        return inner(request, context)

    return _like(handler, behaviour)


def _like(handler: Any, behaviour: Any) -> Any:
    make = grpc.unary_stream_rpc_method_handler if handler.response_streaming else grpc.unary_unary_rpc_method_handler
    return make(behaviour, handler.request_deserializer, handler.response_serializer)


@contextmanager
def serving(
    fake: Fake, address: str = "localhost:0", credentials: grpc.ServerCredentials | None = None
) -> Iterator[str]:
    """The fake behind a real server, until the block ends; gives the address to reach it by."""
    options = [("grpc.max_receive_message_length", 64 * 1024 * 1024), ("grpc.so_reuseport", 0)]
    with futures.ThreadPoolExecutor(max_workers=8) as pool:
        server = grpc.server(pool, interceptors=[_Recorder(fake)], options=options)
        model_pb2_grpc.add_ModelServiceServicer_to_server(fake, server)
        trace_pb2_grpc.add_TraceServiceServicer_to_server(fake, server)
        edit_pb2_grpc.add_EditServiceServicer_to_server(fake, server)
        evaluation_pb2_grpc.add_EvaluationServiceServicer_to_server(fake, server)
        inference_pb2_grpc.add_InferenceServiceServicer_to_server(fake, server)
        export_pb2_grpc.add_ExportServiceServicer_to_server(fake, server)
        history_pb2_grpc.add_HistoryServiceServicer_to_server(fake, server)
        measurement_pb2_grpc.add_MeasurementServiceServicer_to_server(fake, server)
        port = server.add_secure_port(address, credentials) if credentials else server.add_insecure_port(address)
        server.start()
        try:
            yield f"localhost:{port}"
        finally:
            server.stop(None).wait()
            fake.gate.set()
