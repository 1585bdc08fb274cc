"""Every call of the API: its path, its request, and how its answer is read.

Both clients are made of these; nothing here sends anything. Image files are read when a call is built.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Generic, TypeVar

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
    """The calls that one kind of work has, by its name; `list` by its model."""

    get: Callable[[str], Call[W]]
    watch: Callable[[str], Call[W]]
    cancel: Callable[[str], Call[W]]
    list: Callable[[NameLike], Pages[W]]


def call_of(path: str, request: Message, parse: Callable[[bytes], R], read: Callable[[R], T]) -> Call[T]:
    """The call at `path`, without the package."""
    return Call(f"/errata.v1.{path}", request, lambda raw: read(parse(raw)))


def work_calls(service: str, kind: str, messages: ModuleType, read: Callable[[Any], W]) -> WorkCalls[W]:
    """The calls of a kind of work, "Edit", which every kind has alike; `messages` is the module of its protos."""
    field, plural = kind.lower(), f"{kind}s"

    def named(verb: str) -> Callable[[str], Call[W]]:
        asked, answered = (getattr(messages, f"{verb}{kind}{part}") for part in ("Request", "Response"))
        return lambda name: call_of(
            f"{service}/{verb}{kind}",
            asked(name=name),
            answered.FromString,
            lambda said: read(getattr(said, field)),
        )

    def listed(model: NameLike) -> Pages[W]:
        asked, answered = (getattr(messages, f"List{plural}{part}") for part in ("Request", "Response"))
        return lambda token: call_of(
            f"{service}/List{plural}",
            asked(parent=full_name(model), page_token=token),
            answered.FromString,
            lambda said: Page(tuple(map(read, getattr(said, f"{field}s"))), said.next_page_token),
        )

    return WorkCalls(get=named("Get"), watch=named("Watch"), cancel=named("Cancel"), list=listed)


TRACES = work_calls("TraceService", "Trace", trace_pb2, responses.trace)
EDITS = work_calls("EditService", "Edit", edit_pb2, responses.edit)
EVALUATIONS = work_calls("EvaluationService", "Evaluation", evaluation_pb2, responses.evaluation)


# Models, versions, aliases


def list_models() -> Pages[results.Model]:
    """The base models."""
    return lambda token: call_of(
        "ModelService/ListModels",
        model_pb2.ListModelsRequest(page_token=token),
        model_pb2.ListModelsResponse.FromString,
        lambda said: Page(tuple(map(responses.model, said.models)), said.next_page_token),
    )


def get_model(model: NameLike) -> Call[results.Model]:
    """One base model."""
    return call_of(
        "ModelService/GetModel",
        model_pb2.GetModelRequest(name=full_name(model)),
        model_pb2.GetModelResponse.FromString,
        lambda said: responses.model(said.model),
    )


def list_versions(model: NameLike) -> Pages[results.Version]:
    """A model's versions."""
    return lambda token: call_of(
        "ModelService/ListVersions",
        model_pb2.ListVersionsRequest(parent=full_name(model), page_token=token),
        model_pb2.ListVersionsResponse.FromString,
        lambda said: Page(tuple(map(responses.version, said.versions)), said.next_page_token),
    )


def get_version(version: NameLike) -> Call[results.Version]:
    """One version."""
    return call_of(
        "ModelService/GetVersion",
        model_pb2.GetVersionRequest(name=full_name(version)),
        model_pb2.GetVersionResponse.FromString,
        lambda said: responses.version(said.version),
    )


def get_lineage(version: NameLike) -> Call[tuple[results.Version, ...]]:
    """A version and its ancestors."""
    return call_of(
        "ModelService/GetLineage",
        model_pb2.GetLineageRequest(name=full_name(version)),
        model_pb2.GetLineageResponse.FromString,
        lambda said: tuple(map(responses.version, said.versions)),
    )


def is_numbered(version: NameLike) -> bool:
    """Whether a name is a version's own, so that no alias has to be resolved before it is promoted."""
    return "/versions/" in full_name(version)


def promote(
    version: NameLike, alias: str, *, etag: str, override_reason: str, validate_only: bool
) -> Call[results.Alias]:
    """Points an alias to a version, which its number names."""
    request = model_pb2.PromoteRequest(
        version=full_name(version),
        alias=alias,
        etag=etag,
        override_guardrails=bool(override_reason),
        override_reason=override_reason,
        validate_only=validate_only,
    )
    return call_of(
        "ModelService/Promote",
        request,
        model_pb2.PromoteResponse.FromString,
        lambda said: responses.alias(said.alias),
    )


def rollback(alias: NameLike, *, etag: str) -> Call[results.Alias]:
    """Points an alias back."""
    return call_of(
        "ModelService/Rollback",
        model_pb2.RollbackRequest(name=full_name(alias), etag=etag),
        model_pb2.RollbackResponse.FromString,
        lambda said: responses.alias(said.alias),
    )


def delete_version(version: NameLike) -> Call[None]:
    """Removes a version."""
    return call_of(
        "ModelService/DeleteVersion",
        model_pb2.DeleteVersionRequest(name=full_name(version)),
        model_pb2.DeleteVersionResponse.FromString,
        lambda said: None,
    )


def list_audit_entries(model: NameLike) -> Pages[results.AuditEntry]:
    """A model's record."""
    return lambda token: call_of(
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
    return call_of(
        "TraceService/CreateTrace",
        request,
        trace_pb2.CreateTraceResponse.FromString,
        lambda said: responses.trace(said.trace),
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
    alias: str = "",
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
        alias=alias,
        request_id=request_id or requests.new_request_id(),
        validate_only=validate_only,
    )
    return call_of(
        "EditService/CreateEdit",
        request,
        edit_pb2.CreateEditResponse.FromString,
        lambda said: responses.edit(said.edit),
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
    return call_of(
        "EvaluationService/CreateEvaluation",
        request,
        evaluation_pb2.CreateEvaluationResponse.FromString,
        lambda said: responses.evaluation(said.evaluation),
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
    return call_of(
        "InferenceService/Generate", request, inference_pb2.GenerateResponse.FromString, responses.generation
    )


@dataclass(frozen=True, slots=True)
class Piece:
    """The next piece of an answer; `final` is the whole of it, in the last piece only."""

    text: str
    final: results.Generation | None


def stream_generate(request: inference_pb2.GenerateRequest) -> Call[Piece]:
    """The same answer as it grows."""
    return call_of(
        "InferenceService/StreamGenerate",
        inference_pb2.StreamGenerateRequest(request=request),
        inference_pb2.StreamGenerateResponse.FromString,
        lambda said: Piece(said.text, responses.generation(said.final) if said.HasField("final") else None),
    )


def score(version: NameLike, prompt: PromptLike, candidates: str | Sequence[str]) -> Call[results.Scores]:
    """How likely each of several answers is."""
    return call_of(
        "InferenceService/Score",
        inference_pb2.ScoreRequest(
            version=full_name(version), prompt=requests.prompt(prompt, "prompt"), candidates=requests.texts(candidates)
        ),
        inference_pb2.ScoreResponse.FromString,
        responses.scores,
    )
