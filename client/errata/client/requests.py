"""What a caller gives, put on the wire. Pure but for image files, which are read here.

Raises InvalidInputError for what the wire cannot say, ImageError for an image that cannot be read; everything else is
for the server to check. Fields are named as the server names them, so that errors look the same.
"""

from collections.abc import Iterable, Sequence
from enum import StrEnum
from typing import TypeVar
from uuid import uuid4

from errata.client.errors import InvalidInputError
from errata.client.images import ImageLike, image_message
from errata.client.inputs import (
    Component,
    Constraint,
    Context,
    EditRequest,
    Guardrails,
    LayerChoice,
    Method,
    Metric,
    Probe,
    PromptLike,
    TracedQuestion,
)
from errata.client.names import full_name
from errata.v1 import common_pb2, edit_pb2, evaluation_pb2, trace_pb2

E = TypeVar("E", bound=StrEnum)


def new_request_id() -> str:
    """A request_id that no other call has."""
    return str(uuid4())


def texts(given: str | Sequence[str]) -> list[str]:
    """Several texts; one alone is one, not its letters."""
    return [given] if isinstance(given, str) else list(given)


def prompt(given: PromptLike, field: str) -> common_pb2.Prompt:
    """A prompt, or plain text, for the wire."""
    if isinstance(given, str):
        return common_pb2.Prompt(text=given)
    return common_pb2.Prompt(text=given.text, images=images(given.images, f"{field}.images"), raw=given.raw)


def edit_requests(given: Sequence[EditRequest]) -> list[edit_pb2.EditRequest]:
    """The facts of an edit."""
    return [
        edit_pb2.EditRequest(
            name=each.name,
            target=each.target,
            contexts=contexts(each.contexts, f"requests[{i}].contexts"),
            preserve=contexts(each.preserve, f"requests[{i}].preserve"),
        )
        for i, each in enumerate(given)
    ]


def contexts(given: Sequence[Context], field: str) -> list[common_pb2.Context]:
    """Ways of asking for a fact."""
    return [
        common_pb2.Context(
            prompt=prompt(each.prompt, f"{field}[{i}].prompt"),
            constraint=constraint(each.constraint),
            answer=each.answer,
            subject=each.subject,
        )
        for i, each in enumerate(given)
    ]


def probes(given: Sequence[Probe]) -> list[evaluation_pb2.Probe]:
    """Questions that judge."""
    return [
        evaluation_pb2.Probe(
            metric=_metric(each.metric, f"probes[{i}].metric"),
            prompt=prompt(each.prompt, f"probes[{i}].prompt"),
            expected=each.expected,
            request=each.request,
            believed=each.believed,
        )
        for i, each in enumerate(given)
    ]


def questions(given: Sequence[TracedQuestion]) -> list[trace_pb2.TracedQuestion]:
    """Questions to trace. A question with two corruptions is refused: the wire would keep one of them silently."""
    return [_question(each, f"questions[{i}]") for i, each in enumerate(given)]


def _question(given: TracedQuestion, field: str) -> trace_pb2.TracedQuestion:
    others = images(given.other_images, f"{field}.other_images.images")
    if others and given.substitute is not None:
        raise InvalidInputError.at(field, "both a substitute and other images are given; give one corruption")
    question = trace_pb2.TracedQuestion(
        prompt=prompt(given.prompt, f"{field}.prompt"),
        constraint=constraint(given.constraint),
        answer=given.answer,
        other_images=trace_pb2.OtherImages(images=others) if others else None,
    )
    if given.substitute is not None:
        question.substitute = given.substitute
    return question


def guardrails(given: Guardrails) -> list[evaluation_pb2.Guardrail]:
    """Least shares by metric."""
    return [
        evaluation_pb2.Guardrail(metric=_metric(metric, f"guardrails[{i}].metric"), least=least)
        for i, (metric, least) in enumerate(given.items())
    ]


def layers(given: LayerChoice | None) -> edit_pb2.LayerSelection | None:
    """Where to edit; None leaves it to the server."""
    if given is None:
        return None
    if given == "auto":
        return edit_pb2.LayerSelection(auto=True)
    if isinstance(given, Sequence) and not isinstance(given, str):
        return edit_pb2.LayerSelection(explicit=edit_pb2.LayerList(layers=given))
    return edit_pb2.LayerSelection(trace=full_name(given))


def method(given: Method | str | None) -> edit_pb2.Method.ValueType:
    """The closed form; None leaves it to the server."""
    if given is None:
        return edit_pb2.METHOD_UNSPECIFIED
    return edit_pb2.Method.Value(f"METHOD_{_known(Method, given, 'settings.method').name}")


def components(given: Iterable[Component | str]) -> list[trace_pb2.Component.ValueType]:
    """What to restore."""
    known = (_known(Component, each, f"components[{i}]") for i, each in enumerate(given))
    return [trace_pb2.Component.Value(f"COMPONENT_{each.name}") for each in known]


def _metric(given: Metric | str, field: str) -> evaluation_pb2.Metric.ValueType:
    return evaluation_pb2.Metric.Value(f"METRIC_{_known(Metric, given, field).name}")


def _known(kind: type[E], given: str, field: str) -> E:
    names = [each.value for each in kind if each.value != "unknown"]
    if given not in names:
        message = f"no {kind.__name__.lower()} is called {given!r}; give one of: {', '.join(names)}"
        raise InvalidInputError.at(field, message)
    return kind(given)


def constraint(given: str | Constraint) -> common_pb2.Constraint:
    """A constraint, or its text."""
    constraint = Constraint(given) if isinstance(given, str) else given
    return common_pb2.Constraint(text=constraint.text, occurrence=constraint.occurrence)


def images(given: "ImageLike | Sequence[ImageLike]", field: str) -> list[common_pb2.Image]:
    """One image or several, read."""
    # A path and bytes are sequences too, so only a list or tuple means several.
    several = given if isinstance(given, (list, tuple)) else [given]
    return [image_message(each, f"{field}[{i}]") for i, each in enumerate(several)]
