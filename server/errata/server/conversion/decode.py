"""Protos → what the editor takes, and whole calls → orders.

Raises the editor's InvalidInputError kinds for what the editor would refuse, and MalformedError for what breaks a
limit of the API. Both name the field, dotted: `requests[2].contexts[0].constraint.text`.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

from PIL import Image

from errata.editor.errors import ImageError, InvalidInputError, PromptError, TargetError
from errata.editor.evaluation import Metric, Probe
from errata.editor.measurements.questions import Box, Question
from errata.editor.methods import EditSettings
from errata.editor.prompts import Constraint, Prompt
from errata.editor.requests import Context, EditRequest, check_batch
from errata.editor.trace import Corruption, OtherImage, Substitution, TraceRequest, TraceSettings
from errata.server.conversion import limits
from errata.server.conversion.enums import COMPONENTS, CONSTRAINT_KINDS, METHODS, METRICS
from errata.server.conversion.limits import joined
from errata.server.conversion.measuring import SWEEP, kind_of, settings_of
from errata.server.conversion.orders import (
    EditOrder,
    EvaluationOrder,
    GenerateOrder,
    MeasurementOrder,
    ScoreOrder,
    TraceOrder,
)
from errata.server.conversion.pinning import M, pinned
from errata.server.errors import MalformedError
from errata.server.images import ImagePolicy
from errata.server.ledger.rows import JobKind
from errata.server.names import VersionRef, alias_part, job_of, version_ref
from errata.v1 import common_pb2, edit_pb2, evaluation_pb2, inference_pb2, measurement_pb2, trace_pb2

_MOST_CONTEXTS, _MOST_PRESERVED = 512, 128
_MOST_REQUESTS, _MOST_QUESTIONS, _MOST_PROBES = 1000, 200, 10_000
_MOST_MEASURED, _MOST_SWEPT, _MOST_CONSTRAINTS = 500, 200, 8
_MOST_CANDIDATES, _MOST_STOPS = 64, 8
_MAX_NEW_TOKENS = 32


class Decoder:
    """Decodes messages and their images. Blocks while images are fetched and decoded. Safe from any thread."""

    def __init__(
        self, images: ImagePolicy, open_image: Callable[[common_pb2.Image, str], Image.Image] | None = None
    ) -> None:
        self._images = images
        self._open = open_image or images.open

    def _for_call(self) -> "Decoder":
        """A decoder for one call, whose images share the call's pixels."""
        return Decoder(self._images, self._images.for_call())

    def pinned(self, message: M) -> M:
        """A copy in which every image is there as bytes, not by URI (module `pinning`). Raises ImageError."""
        return pinned(message, self._images)

    def prompt(self, message: common_pb2.Prompt, field: str) -> Prompt:
        """A question. Raises PromptError for an empty text, ImageError."""
        if not message.text.strip():
            raise PromptError("the prompt is empty; give the question to ask", field=joined(field, "text"))
        text = limits.note(message.text, joined(field, "text"))
        prompt = Prompt(text=text, images=self._opened(message.images, joined(field, "images")), chat=not message.raw)
        self._images.hold(*prompt.images)  # its own copies
        return prompt

    def _opened(self, images: Sequence[common_pb2.Image], field: str) -> tuple[Image.Image, ...]:
        """The images of one prompt, which a processor works on together."""
        most = self._images.limits.max_pixels
        found: list[Image.Image] = []
        for i, image in enumerate(images):
            found.append(self._open(image, f"{field}[{i}]"))
            if sum(f.width * f.height for f in found) > most:
                raise ImageError(
                    f"the prompt's images have more than {most} pixels together; make them smaller",
                    field=f"{field}[{i}]",
                )
        return tuple(found)

    def _asked(self, message: common_pb2.Context | trace_pb2.TracedQuestion, field: str) -> tuple[Prompt, Constraint]:
        """The prompt and the constraint of a context or a question, found in each other."""
        limits.present(message.HasField("prompt"), joined(field, "prompt"))
        limits.present(message.HasField("constraint"), joined(field, "constraint"))
        prompt = self.prompt(message.prompt, joined(field, "prompt"))
        return prompt, _constraint(message.constraint, prompt, joined(field, "constraint"))

    def context(self, message: common_pb2.Context, field: str) -> Context:
        """One way of asking for a fact. Raises ConstraintNotFoundError and what `prompt` does."""
        prompt, constraint = self._asked(message, field)
        return Context(
            prompt=prompt,
            constraint=constraint,
            answer=_answer(message.answer if message.HasField("answer") else None, joined(field, "answer")),
            subject=limits.note(message.subject, joined(field, "subject"), most=200) or None,
        )

    def edit_request(self, message: edit_pb2.EditRequest, field: str) -> EditRequest:
        """A fact to edit. Raises TargetError for an empty target, and what `context` does."""
        name = limits.text(message.name, joined(field, "name"), most=200, one_line=True)
        if not message.target.strip():
            raise TargetError(f"request {name!r} has no target; give the answer to install", field=f"{field}.target")
        limits.count(message.contexts, joined(field, "contexts"), 1, _MOST_CONTEXTS)
        limits.count(message.preserve, joined(field, "preserve"), 0, _MOST_PRESERVED)
        return EditRequest(
            name=name,
            contexts=self._contexts(message.contexts, joined(field, "contexts")),
            target=limits.note(message.target, joined(field, "target")),
            preserve=self._contexts(message.preserve, joined(field, "preserve")),
        )

    def _contexts(self, messages: Sequence[common_pb2.Context], field: str) -> tuple[Context, ...]:
        return tuple(self.context(c, f"{field}[{i}]") for i, c in enumerate(messages))

    def trace_request(self, message: trace_pb2.TracedQuestion, field: str) -> TraceRequest:
        """A question to trace. Raises PromptError for a corruption that does not fit it."""
        prompt, constraint = self._asked(message, field)
        answer = _answer(message.answer if message.HasField("answer") else None, joined(field, "answer"))
        corruption = self._corruption(message, prompt, field)
        return TraceRequest(prompt=prompt, constraint=constraint, corruption=corruption, answer=answer)

    def question(self, message: measurement_pb2.MeasuredQuestion, field: str) -> Question:
        """A question to measure. Raises ConstraintNotFoundError, PromptError, InvalidInputError for its box."""
        limits.present(message.HasField("prompt"), joined(field, "prompt"))
        limits.count(message.constraints, joined(field, "constraints"), 1, _MOST_CONSTRAINTS)
        limits.count(message.corruptions, joined(field, "corruptions"), 0, _MOST_CONSTRAINTS)
        prompt = self.prompt(message.prompt, joined(field, "prompt"))
        spans, wrong = joined(field, "constraints"), joined(field, "corruptions")
        constraints = tuple(_constraint(c, prompt, f"{spans}[{i}]") for i, c in enumerate(message.constraints))
        corruptions = tuple(self._corruption(c, prompt, f"{wrong}[{i}]") for i, c in enumerate(message.corruptions))
        answer = _answer(message.answer if message.HasField("answer") else None, joined(field, "answer"))
        try:
            return Question(
                prompt=prompt,
                constraints=constraints,
                corruptions=corruptions,
                answer=answer,
                box=_box(message.box) if message.HasField("box") else None,
                kinds=tuple(
                    CONSTRAINT_KINDS[limits.member(CONSTRAINT_KINDS, kind, f"{joined(field, 'kinds')}[{i}]")]
                    for i, kind in enumerate(message.kinds)
                ),
            )
        except InvalidInputError as error:
            raise _within(error, field) from None

    def _corruption(
        self, message: trace_pb2.TracedQuestion | measurement_pb2.Corruption, prompt: Prompt, field: str
    ) -> Corruption:
        kind = message.WhichOneof("corruption")
        limits.present(kind is not None, joined(field, "corruption"))
        if kind == "substitute":
            where = joined(field, "substitute")
            if not message.substitute.strip():
                raise PromptError("the substitute is empty; give a wrong constraint", field=where)
            return Substitution(word=limits.note(message.substitute, where))
        where, others = joined(field, "other_images.images"), message.other_images.images
        if not others or len(others) != len(prompt.images):
            raise PromptError(
                f"the prompt has {len(prompt.images)} image(s) and {len(others)} other(s) to exchange for them; give "
                "as many, or corrupt a prompt without images by substitution",
                field=where,
            )
        return OtherImage(images=self._opened(others, where))

    def probe(self, message: evaluation_pb2.Probe, field: str) -> Probe:
        """A question that judges."""
        limits.present(message.HasField("prompt"), joined(field, "prompt"))
        has = message.HasField
        return Probe(
            metric=METRICS[limits.member(METRICS, message.metric, joined(field, "metric"))],
            prompt=self.prompt(message.prompt, joined(field, "prompt")),
            expected=_answer(message.expected if has("expected") else None, joined(field, "expected")),
            request=limits.note(message.request, joined(field, "request"), most=200) or None,
            believed=_answer(message.believed if has("believed") else None, joined(field, "believed")),
        )

    def probes(self, messages: Sequence[evaluation_pb2.Probe]) -> tuple[Probe, ...]:
        """The probes of one call, whose images share the call's pixels; there may be none."""
        return self._for_call()._probes(messages, 0)

    def _probes(self, messages: Sequence[evaluation_pb2.Probe], low: int) -> tuple[Probe, ...]:
        limits.count(messages, "probes", low, _MOST_PROBES)
        return tuple(self.probe(p, f"probes[{i}]") for i, p in enumerate(messages))

    def guardrails(self, messages: Sequence[evaluation_pb2.Guardrail], field: str) -> dict[Metric, float]:
        """Least shares by metric; 0 switches a metric's guardrail off. Raises MalformedError for one metric twice."""
        found: dict[Metric, float] = {}
        for i, message in enumerate(messages):
            metric = METRICS[limits.member(METRICS, message.metric, f"{field}[{i}].metric")]
            if metric in found:
                where = f"{field}[{i}].metric"
                raise MalformedError(f"{where} has a guardrail already; give one a metric", field=where)
            found[metric] = limits.number(message.least, f"{field}[{i}].least", 0, 1)
        return found

    def edit_settings(self, message: edit_pb2.EditSettings, field: str, layers: tuple[int, ...] = ()) -> EditSettings:
        """How to edit, the defaults filled in."""
        settings = EditSettings(layers=layers)
        if message.method:
            method = METHODS[limits.member(METHODS, message.method, joined(field, "method"))]
            settings = replace(settings, method=method)
        if message.HasField("preservation"):
            preservation = limits.number(message.preservation, joined(field, "preservation"), 0, above=True)
            settings = replace(settings, preservation=preservation)
        if message.HasField("ridge"):
            settings = replace(settings, ridge=limits.number(message.ridge, joined(field, "ridge"), 0))
        if message.HasField("steps"):
            steps = limits.whole(message.steps, joined(field, "steps"), 1, 1000)
            settings = replace(settings, values=replace(settings.values, steps=steps))
        return settings

    def trace(self, message: trace_pb2.CreateTraceRequest) -> TraceOrder:
        """A whole CreateTraceRequest."""
        decoder = self._for_call()
        limits.count(message.questions, "questions", 1, _MOST_QUESTIONS)
        return TraceOrder(
            version=version_ref(message.version, "version"),
            questions=tuple(decoder.trace_request(q, f"questions[{i}]") for i, q in enumerate(message.questions)),
            settings=_trace_settings(message),
            request_id=limits.request_id(message.request_id),
            validate_only=message.validate_only,
        )

    def measurement(self, message: measurement_pb2.CreateMeasurementRequest) -> MeasurementOrder:
        """A whole CreateMeasurementRequest."""
        decoder, kind = self._for_call(), kind_of(message)
        _check_measured(message, kind)
        requests = tuple(decoder.edit_request(r, f"requests[{i}]") for i, r in enumerate(message.requests))
        if requests:
            check_batch(requests)
        return MeasurementOrder(
            version=version_ref(message.version, "version"),
            questions=tuple(decoder.question(q, f"questions[{i}]") for i, q in enumerate(message.questions)),
            requests=requests,
            probes=decoder._probes(message.probes, 0),
            references=decoder._contexts(message.references, "references"),
            kind=kind,
            settings=settings_of(kind, getattr(message, kind)),
            request_id=limits.request_id(message.request_id),
            validate_only=message.validate_only,
        )

    def edit(self, message: edit_pb2.CreateEditRequest) -> EditOrder:
        """A whole CreateEditRequest."""
        decoder = self._for_call()
        parent = version_ref(message.parent, "parent")
        limits.count(message.requests, "requests", 1, _MOST_REQUESTS)
        layers, trace = _layers(message.layers, parent, "layers")
        requests = tuple(decoder.edit_request(r, f"requests[{i}]") for i, r in enumerate(message.requests))
        check_batch(requests)
        return EditOrder(
            parent=parent,
            requests=requests,
            layers=layers,
            trace=trace,
            settings=decoder.edit_settings(message.settings, "settings", layers or ()),
            probes=decoder._probes(message.probes, 0),
            references=decoder._contexts(message.references, "references"),
            guardrails=decoder.guardrails(message.guardrails, "guardrails"),
            request_id=limits.request_id(message.request_id),
            validate_only=message.validate_only,
            description=limits.note(message.description, "description", most=4000),
            alias=alias_part(message.alias, "alias") if message.alias else "",
        )

    def evaluation(self, message: evaluation_pb2.CreateEvaluationRequest) -> EvaluationOrder:
        """A whole CreateEvaluationRequest."""
        version = version_ref(message.version, "version")
        baseline = version_ref(message.baseline, "baseline") if message.baseline else None
        if baseline:
            _same_model(baseline.model, version, "baseline")
        return EvaluationOrder(
            version=version,
            baseline=baseline,
            probes=self._for_call()._probes(message.probes, 1),
            guardrails=self.guardrails(message.guardrails, "guardrails"),
            request_id=limits.request_id(message.request_id),
            validate_only=message.validate_only,
        )

    def generate(self, message: inference_pb2.GenerateRequest, field: str = "") -> GenerateOrder:
        """A whole GenerateRequest; `field` is "request" within a StreamGenerateRequest."""
        sampling, where = message.sampling, joined(field, "sampling")
        limits.present(message.HasField("prompt"), joined(field, "prompt"))
        limits.count(message.stop, joined(field, "stop"), 0, _MOST_STOPS)
        has = sampling.HasField
        return GenerateOrder(
            version=version_ref(message.version, joined(field, "version")),
            prompt=self._for_call().prompt(message.prompt, joined(field, "prompt")),
            max_new_tokens=limits.whole(message.max_new_tokens, joined(field, "max_new_tokens"), 1, 4096)
            if message.HasField("max_new_tokens")
            else _MAX_NEW_TOKENS,
            temperature=limits.number(sampling.temperature, f"{where}.temperature", 0, 10),
            top_p=limits.number(sampling.top_p, f"{where}.top_p", 0, 1, above=True) if has("top_p") else 1.0,
            top_k=limits.whole(sampling.top_k, f"{where}.top_k", 1) if has("top_k") else None,
            seed=sampling.seed if has("seed") else None,
            stop=tuple(_stop(s, f"{joined(field, 'stop')}[{i}]") for i, s in enumerate(message.stop)),
        )

    def score(self, message: inference_pb2.ScoreRequest) -> ScoreOrder:
        """A whole ScoreRequest."""
        limits.present(message.HasField("prompt"), "prompt")
        limits.count(message.candidates, "candidates", 1, _MOST_CANDIDATES)
        return ScoreOrder(
            version=version_ref(message.version, "version"),
            prompt=self._for_call().prompt(message.prompt, "prompt"),
            candidates=tuple(limits.text(c, f"candidates[{i}]") for i, c in enumerate(message.candidates)),
        )


def _constraint(message: common_pb2.Constraint, prompt: Prompt, field: str) -> Constraint:
    """A constraint, found in its prompt. Raises ConstraintNotFoundError."""
    constraint = Constraint(
        text=message.text, occurrence=message.occurrence if message.HasField("occurrence") else None
    )
    try:
        constraint.span(prompt.text)
    except InvalidInputError as error:
        error.field = f"{field}.{error.field.removeprefix('constraint.')}"
        raise
    return constraint


def _check_measured(message: measurement_pb2.CreateMeasurementRequest, kind: str) -> None:
    """Raises MalformedError for too many or too few of what the kind measures, and for what it does not take."""
    listed = {"questions": (1, _MOST_MEASURED)}
    if kind == SWEEP:
        listed = {"requests": (1, _MOST_SWEPT), "probes": (0, _MOST_PROBES), "references": (0, _MOST_PROBES)}
    for field in ("questions", "requests", "probes", "references"):
        given = getattr(message, field)
        if field in listed:
            limits.count(given, field, *listed[field])
        elif given:
            raise MalformedError(f"{kind} takes no {field}; give {', '.join(listed)}", field=field)


def _box(message: measurement_pb2.Box) -> Box:
    return Box(left=message.left, top=message.top, right=message.right, bottom=message.bottom)


def _answer(value: str | None, field: str) -> str | None:
    """An optional text, which is not blank where it is given."""
    return None if value is None else limits.text(value, field)


def _stop(value: str, field: str) -> str:
    # A line break is a good place to stop, so a blank one is one.
    if not value:
        raise MalformedError(f"{field} is empty; give 1-100 characters", field=field, reason="MISSING_FIELD")
    return limits.note(value, field, most=100)


def _trace_settings(message: trace_pb2.CreateTraceRequest) -> TraceSettings:
    settings = TraceSettings()
    if message.components:
        values = [limits.member(COMPONENTS, c, f"components[{i}]") for i, c in enumerate(message.components)]
        if len(set(values)) < len(values):
            raise MalformedError("components names one twice; name each once", field="components")
        settings = replace(settings, components=tuple(COMPONENTS[v] for v in values))
    if message.HasField("window"):
        settings = replace(settings, window=limits.whole(message.window, "window", 1, 64))
    if message.HasField("min_total_effect"):
        least = limits.number(message.min_total_effect, "min_total_effect", 0, 1)
        settings = replace(settings, min_total_effect=least)
    return settings


def _layers(
    message: edit_pb2.LayerSelection, parent: VersionRef, field: str
) -> tuple[tuple[int, ...] | None, str | None]:
    """The explicit layers and the trace's id; both None for AUTO."""
    match message.WhichOneof("choice"):
        case "explicit":
            return _explicit(message.explicit.layers, f"{field}.explicit.layers"), None
        case "trace":
            model, trace = job_of(message.trace, JobKind.TRACE, f"{field}.trace")
            _same_model(model, parent, f"{field}.trace")
            return None, trace
        case "auto" if not message.auto:
            where = f"{field}.auto"
            raise MalformedError(f"{where} is false and nothing else is chosen; set true, or choose", field=where)
        case _:
            return None, None


def _explicit(layers: Sequence[int], field: str) -> tuple[int, ...]:
    limits.count(layers, field, 1, 10_000)
    limits.whole(layers[0], f"{field}[0]", 0)
    if list(layers) != sorted(set(layers)):
        raise MalformedError(f"{field} must rise, each layer once", field=field, reason="OUT_OF_RANGE")
    return tuple(layers)


def _same_model(model: str, version: VersionRef, field: str) -> None:
    if model != version.model:
        raise MalformedError(
            f"{field} is of model {model!r}, and the call is about {version.model!r}; name one of the same model",
            field=field,
        )


def _within(error: InvalidInputError, field: str) -> InvalidInputError:
    return error.within(field) if field else error
