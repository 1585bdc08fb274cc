"""Every call of the API: its path, its request, and how its answer is read.

Both clients are made of these; nothing here sends anything. Image files are read when a call is built.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar, overload

from google.protobuf.message import Message

from errata.client import requests, responses, results
from errata.client.inputs import (
    Component,
    Context,
    EditRequest,
    Guardrails,
    LayerChoice,
    Method,
    Probe,
    PromptLike,
    TracedQuestion,
)
from errata.client.names import NameLike, full_name
from errata.v1 import edit_pb2, evaluation_pb2, inference_pb2, model_pb2, trace_pb2

R = TypeVar("R", bound=Message)
T = TypeVar("T")
W = TypeVar("W", bound=results.Work)


@dataclass(frozen=True, slots=True)
class Call(Generic[T]):
    """One call: `read` makes the result of an answer's bytes."""

    path: str
    request: Message
    read: Callable[[bytes], T]


@dataclass(frozen=True, slots=True)
class Page(Generic[T]):
    """Part of a list, and the token of the next part, empty after the last."""

    items: tuple[T, ...]
    next_page_token: str


Pages = Callable[[str], Call[Page[T]]]
"""The call for the page that a token names; "" names the first."""


@dataclass(frozen=True, slots=True)
class WorkCalls(Generic[W]):
    """The calls that one kind of work has, by its name."""

    get: Callable[[str], Call[W]]
    watch: Callable[[str], Call[W]]
    cancel: Callable[[str], Call[W]]


@overload
def calls_of(work: results.CausalTrace) -> WorkCalls[results.CausalTrace]: ...
@overload
def calls_of(work: results.Edit) -> WorkCalls[results.Edit]: ...
@overload
def calls_of(work: results.Evaluation) -> WorkCalls[results.Evaluation]: ...
def calls_of(
    work: results.CausalTrace | results.Edit | results.Evaluation,
) -> WorkCalls[results.CausalTrace] | WorkCalls[results.Edit] | WorkCalls[results.Evaluation]:
    """The calls of the kind of work that this is."""
    match work:
        case results.CausalTrace():
            return TRACES
        case results.Edit():
            return EDITS
        case results.Evaluation():
            return EVALUATIONS


def _call(path: str, request: Message, parse: Callable[[bytes], R], read: Callable[[R], T]) -> Call[T]:
    return Call(f"/errata.v1.{path}", request, lambda raw: read(parse(raw)))


# Models, versions, aliases


def list_models() -> Pages[results.Model]:
    """The base models."""
    return lambda token: _call(
        "ModelService/ListModels",
        model_pb2.ListModelsRequest(page_token=token),
        model_pb2.ListModelsResponse.FromString,
        lambda said: Page(tuple(map(responses.model, said.models)), said.next_page_token),
    )


def get_model(model: NameLike) -> Call[results.Model]:
    """One base model."""
    return _call(
        "ModelService/GetModel",
        model_pb2.GetModelRequest(name=full_name(model)),
        model_pb2.GetModelResponse.FromString,
        lambda said: responses.model(said.model),
    )


def list_versions(model: NameLike) -> Pages[results.Version]:
    """A model's versions."""
    return lambda token: _call(
        "ModelService/ListVersions",
        model_pb2.ListVersionsRequest(parent=full_name(model), page_token=token),
        model_pb2.ListVersionsResponse.FromString,
        lambda said: Page(tuple(map(responses.version, said.versions)), said.next_page_token),
    )


def get_version(version: NameLike) -> Call[results.Version]:
    """One version."""
    return _call(
        "ModelService/GetVersion",
        model_pb2.GetVersionRequest(name=full_name(version)),
        model_pb2.GetVersionResponse.FromString,
        lambda said: responses.version(said.version),
    )


def get_lineage(version: NameLike) -> Call[tuple[results.Version, ...]]:
    """A version and its ancestors."""
    return _call(
        "ModelService/GetLineage",
        model_pb2.GetLineageRequest(name=full_name(version)),
        model_pb2.GetLineageResponse.FromString,
        lambda said: tuple(map(responses.version, said.versions)),
    )


def promote(
    version: NameLike, alias: str, *, etag: str, override_reason: str, validate_only: bool
) -> Call[results.Alias]:
    """Points an alias to a version."""
    request = model_pb2.PromoteRequest(
        version=full_name(version),
        alias=alias,
        etag=etag,
        override_guardrails=bool(override_reason),
        override_reason=override_reason,
        validate_only=validate_only,
    )
    return _call(
        "ModelService/Promote",
        request,
        model_pb2.PromoteResponse.FromString,
        lambda said: responses.alias(said.alias),
    )


def rollback(alias: NameLike, *, etag: str) -> Call[results.Alias]:
    """Points an alias back."""
    return _call(
        "ModelService/Rollback",
        model_pb2.RollbackRequest(name=full_name(alias), etag=etag),
        model_pb2.RollbackResponse.FromString,
        lambda said: responses.alias(said.alias),
    )


def delete_version(version: NameLike) -> Call[None]:
    """Removes a version."""
    return _call(
        "ModelService/DeleteVersion",
        model_pb2.DeleteVersionRequest(name=full_name(version)),
        model_pb2.DeleteVersionResponse.FromString,
        lambda said: None,
    )


def list_audit_entries(model: NameLike) -> Pages[results.AuditEntry]:
    """A model's record."""
    return lambda token: _call(
        "ModelService/ListAuditEntries",
        model_pb2.ListAuditEntriesRequest(parent=full_name(model), page_token=token),
        model_pb2.ListAuditEntriesResponse.FromString,
        lambda said: Page(tuple(map(responses.audit_entry, said.entries)), said.next_page_token),
    )


# Traces


def create_trace(
    version: NameLike,
    questions: Sequence[TracedQuestion],
    *,
    components: Iterable[Component | str] = (),
    window: int | None = None,
    min_total_effect: float | None = None,
    request_id: str = "",
    validate_only: bool = False,
) -> Call[results.CausalTrace]:
    """Queues a trace."""
    request = trace_pb2.CreateTraceRequest(
        version=full_name(version),
        questions=requests.questions(questions),
        components=requests.components(components),
        window=window,
        min_total_effect=min_total_effect,
        request_id=request_id or requests.new_request_id(),
        validate_only=validate_only,
    )
    return _call(
        "TraceService/CreateTrace",
        request,
        trace_pb2.CreateTraceResponse.FromString,
        lambda said: responses.trace(said.trace),
    )


def list_traces(model: NameLike) -> Pages[results.CausalTrace]:
    """A model's traces."""
    return lambda token: _call(
        "TraceService/ListTraces",
        trace_pb2.ListTracesRequest(parent=full_name(model), page_token=token),
        trace_pb2.ListTracesResponse.FromString,
        lambda said: Page(tuple(map(responses.trace, said.traces)), said.next_page_token),
    )


TRACES = WorkCalls(
    get=lambda name: _call(
        "TraceService/GetTrace",
        trace_pb2.GetTraceRequest(name=name),
        trace_pb2.GetTraceResponse.FromString,
        lambda said: responses.trace(said.trace),
    ),
    watch=lambda name: _call(
        "TraceService/WatchTrace",
        trace_pb2.WatchTraceRequest(name=name),
        trace_pb2.WatchTraceResponse.FromString,
        lambda said: responses.trace(said.trace),
    ),
    cancel=lambda name: _call(
        "TraceService/CancelTrace",
        trace_pb2.CancelTraceRequest(name=name),
        trace_pb2.CancelTraceResponse.FromString,
        lambda said: responses.trace(said.trace),
    ),
)


# Edits


def create_edit(
    parent: NameLike,
    edits: Sequence[EditRequest],
    *,
    layers: LayerChoice | None = None,
    method: Method | str | None = None,
    preservation: float | None = None,
    ridge: float | None = None,
    steps: int | None = None,
    probes: Sequence[Probe] = (),
    references: Sequence[Context] = (),
    guardrails: Guardrails | None = None,
    description: str = "",
    request_id: str = "",
    validate_only: bool = False,
) -> Call[results.Edit]:
    """Queues an edit."""
    request = edit_pb2.CreateEditRequest(
        parent=full_name(parent),
        requests=requests.edit_requests(edits),
        layers=requests.layers(layers),
        settings=edit_pb2.EditSettings(
            method=requests.method(method), preservation=preservation, ridge=ridge, steps=steps
        ),
        probes=requests.probes(probes),
        references=requests.contexts(references, "references"),
        guardrails=requests.guardrails(guardrails or {}),
        description=description,
        request_id=request_id or requests.new_request_id(),
        validate_only=validate_only,
    )
    return _call(
        "EditService/CreateEdit",
        request,
        edit_pb2.CreateEditResponse.FromString,
        lambda said: responses.edit(said.edit),
    )


def list_edits(model: NameLike) -> Pages[results.Edit]:
    """A model's edits."""
    return lambda token: _call(
        "EditService/ListEdits",
        edit_pb2.ListEditsRequest(parent=full_name(model), page_token=token),
        edit_pb2.ListEditsResponse.FromString,
        lambda said: Page(tuple(map(responses.edit, said.edits)), said.next_page_token),
    )


EDITS = WorkCalls(
    get=lambda name: _call(
        "EditService/GetEdit",
        edit_pb2.GetEditRequest(name=name),
        edit_pb2.GetEditResponse.FromString,
        lambda said: responses.edit(said.edit),
    ),
    watch=lambda name: _call(
        "EditService/WatchEdit",
        edit_pb2.WatchEditRequest(name=name),
        edit_pb2.WatchEditResponse.FromString,
        lambda said: responses.edit(said.edit),
    ),
    cancel=lambda name: _call(
        "EditService/CancelEdit",
        edit_pb2.CancelEditRequest(name=name),
        edit_pb2.CancelEditResponse.FromString,
        lambda said: responses.edit(said.edit),
    ),
)


# Evaluations


def create_evaluation(
    version: NameLike,
    probes: Sequence[Probe],
    *,
    baseline: NameLike = "",
    guardrails: Guardrails | None = None,
    request_id: str = "",
    validate_only: bool = False,
) -> Call[results.Evaluation]:
    """Queues an evaluation."""
    request = evaluation_pb2.CreateEvaluationRequest(
        version=full_name(version),
        baseline=full_name(baseline) if baseline else "",
        probes=requests.probes(probes),
        guardrails=requests.guardrails(guardrails or {}),
        request_id=request_id or requests.new_request_id(),
        validate_only=validate_only,
    )
    return _call(
        "EvaluationService/CreateEvaluation",
        request,
        evaluation_pb2.CreateEvaluationResponse.FromString,
        lambda said: responses.evaluation(said.evaluation),
    )


def list_evaluations(model: NameLike) -> Pages[results.Evaluation]:
    """A model's evaluations."""
    return lambda token: _call(
        "EvaluationService/ListEvaluations",
        evaluation_pb2.ListEvaluationsRequest(parent=full_name(model), page_token=token),
        evaluation_pb2.ListEvaluationsResponse.FromString,
        lambda said: Page(tuple(map(responses.evaluation, said.evaluations)), said.next_page_token),
    )


EVALUATIONS = WorkCalls(
    get=lambda name: _call(
        "EvaluationService/GetEvaluation",
        evaluation_pb2.GetEvaluationRequest(name=name),
        evaluation_pb2.GetEvaluationResponse.FromString,
        lambda said: responses.evaluation(said.evaluation),
    ),
    watch=lambda name: _call(
        "EvaluationService/WatchEvaluation",
        evaluation_pb2.WatchEvaluationRequest(name=name),
        evaluation_pb2.WatchEvaluationResponse.FromString,
        lambda said: responses.evaluation(said.evaluation),
    ),
    cancel=lambda name: _call(
        "EvaluationService/CancelEvaluation",
        evaluation_pb2.CancelEvaluationRequest(name=name),
        evaluation_pb2.CancelEvaluationResponse.FromString,
        lambda said: responses.evaluation(said.evaluation),
    ),
)


# Inference


def generate_request(
    version: NameLike,
    prompt: PromptLike,
    *,
    max_new_tokens: int | None = None,
    temperature: float = 0.0,
    top_p: float | None = None,
    top_k: int | None = None,
    seed: int | None = None,
    stop: str | Sequence[str] = (),
) -> inference_pb2.GenerateRequest:
    """What to generate."""
    return inference_pb2.GenerateRequest(
        version=full_name(version),
        prompt=requests.prompt(prompt, "prompt"),
        max_new_tokens=max_new_tokens,
        sampling=inference_pb2.Sampling(temperature=temperature, top_p=top_p, top_k=top_k, seed=seed),
        stop=requests.texts(stop),
    )


def generate(request: inference_pb2.GenerateRequest) -> Call[results.Generation]:
    """One answer."""
    return _call("InferenceService/Generate", request, inference_pb2.GenerateResponse.FromString, responses.generation)


@dataclass(frozen=True, slots=True)
class Piece:
    """The next piece of an answer; `final` is the whole of it, in the last piece only."""

    text: str
    final: results.Generation | None


def stream_generate(request: inference_pb2.GenerateRequest) -> Call[Piece]:
    """The same answer as it grows."""
    return _call(
        "InferenceService/StreamGenerate",
        inference_pb2.StreamGenerateRequest(request=request),
        inference_pb2.StreamGenerateResponse.FromString,
        lambda said: Piece(said.text, responses.generation(said.final) if said.HasField("final") else None),
    )


def score(version: NameLike, prompt: PromptLike, candidates: str | Sequence[str]) -> Call[results.Scores]:
    """How likely each of several answers is."""
    return _call(
        "InferenceService/Score",
        inference_pb2.ScoreRequest(
            version=full_name(version), prompt=requests.prompt(prompt, "prompt"), candidates=requests.texts(candidates)
        ),
        inference_pb2.ScoreResponse.FromString,
        responses.scores,
    )
