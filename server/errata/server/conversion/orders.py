"""Whole calls as the server works with them: everything that can be checked without the model is."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from errata.editor.evaluation import Metric, Probe
from errata.editor.measurements.questions import Question
from errata.editor.methods import EditSettings
from errata.editor.prompts import Prompt
from errata.editor.requests import Context, EditRequest
from errata.editor.trace import TraceRequest, TraceSettings
from errata.server.conversion.limits import note, text
from errata.server.errors import MalformedError
from errata.server.names import VersionRef, alias_part, version_of
from errata.v1 import model_pb2


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceOrder:
    """A CreateTraceRequest."""

    version: VersionRef
    questions: tuple[TraceRequest, ...] = field(repr=False)
    settings: TraceSettings
    request_id: str | None
    validate_only: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasurementOrder:
    """A CreateMeasurementRequest. `settings` are those of the kind, as the editor has them.

    A layer sweep has `requests`, `probes` and `references`; every other kind has `questions`. Without `references` the
    model's own are meant.
    """

    version: VersionRef
    questions: tuple[Question, ...] = field(repr=False)
    requests: tuple[EditRequest, ...] = field(repr=False)
    probes: tuple[Probe, ...] = field(repr=False)
    references: tuple[Context, ...] = field(repr=False)
    kind: str
    settings: object
    request_id: str | None
    validate_only: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class EditOrder:
    """A CreateEditRequest.

    `layers` are those given one by one; `trace` is the id of the trace that chooses them; where both are None, AUTO
    does. `settings` have no layers before they are chosen. Without `references` the model's own are meant.
    """

    parent: VersionRef
    requests: tuple[EditRequest, ...] = field(repr=False)
    layers: tuple[int, ...] | None
    trace: str | None
    settings: EditSettings
    probes: tuple[Probe, ...] = field(repr=False)
    references: tuple[Context, ...] = field(repr=False)
    guardrails: Mapping[Metric, float]
    request_id: str | None
    validate_only: bool
    description: str
    alias: str


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationOrder:
    """A CreateEvaluationRequest. Without `baseline` the version's parent is meant."""

    version: VersionRef
    baseline: VersionRef | None
    probes: tuple[Probe, ...] = field(repr=False)
    guardrails: Mapping[Metric, float]
    request_id: str | None
    validate_only: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateOrder:
    """A GenerateRequest, its defaults filled in. Greedy where `temperature` is 0; `top_k` None takes all tokens."""

    version: VersionRef
    prompt: Prompt
    max_new_tokens: int
    temperature: float
    top_p: float
    top_k: int | None
    seed: int | None
    stop: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreOrder:
    """A ScoreRequest."""

    version: VersionRef
    prompt: Prompt
    candidates: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Promotion:
    """A PromoteRequest. With an `override_reason`, a rejected version may be promoted."""

    model: str
    number: int
    alias: str
    etag: str | None
    override_reason: str | None
    validate_only: bool


def promotion(message: model_pb2.PromoteRequest) -> Promotion:
    """A PromoteRequest, checked. Raises MalformedError."""
    model, number = version_of(message.version, "version")
    if message.override_guardrails:
        text(message.override_reason, "override_reason", most=1000)
    elif message.override_reason:
        raise MalformedError(
            "override_reason says why guardrails are overridden, and they are not; set override_guardrails, too, or "
            "leave the reason out",
            field="override_reason",
        )
    return Promotion(
        model=model,
        number=number,
        alias=alias_part(message.alias, "alias"),
        etag=note(message.etag, "etag", most=200) or None,
        override_reason=message.override_reason or None,
        validate_only=message.validate_only,
    )
