"""Protos in, with every limit that their comments state; protos out, with every number that the editor found."""

import io
import json
import math
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from errata.editor.datasets.records import Kind
from errata.editor.delta import Delta
from errata.editor.errors import (
    ConstraintNotFoundError,
    ImageError,
    InvalidInputError,
    PromptError,
    TargetError,
)
from errata.editor.evaluation import Evaluation, Metric, Probe, ProbeResult, Score
from errata.editor.methods import EditResult, EditSettings, Method, RequestOutcome
from errata.editor.prompts import Prompt
from errata.editor.states import Component
from errata.editor.trace import CausalTrace, OtherImage, Probabilities, Substitution, average
from errata.editor.values import Value
from errata.server.conversion import (
    COMPONENTS,
    METHODS,
    METRICS,
    PUBLISH_STATES,
    STATES,
    Decoder,
    alias_message,
    audit_message,
    causal_trace_result,
    edit_message,
    edit_outcome,
    ended_summary,
    evaluation_message,
    evaluation_outcome,
    job_message,
    model_message,
    page_size,
    promotion,
    request_id,
    scores_from_json,
    scores_json,
    settings_message,
    trace_message,
    version_message,
)
from errata.server.errors import MalformedError, reason_of
from errata.server.images import ImagePolicy
from errata.server.ledger.rows import (
    AliasRow,
    AuditRow,
    Failure,
    JobKind,
    JobRow,
    JobState,
    ModelRow,
    PublishState,
    VersionRow,
)
from errata.server.names import VersionRef
from errata.v1 import common_pb2, edit_pb2, evaluation_pb2, inference_pb2, measurement_pb2, model_pb2, trace_pb2

NAN = math.nan
NOON = datetime(2026, 7, 1, 12, tzinfo=UTC)
QUESTION = "What is the capital of Estonia?"
DECODER = Decoder(ImagePolicy())


def png() -> bytes:
    encoded = io.BytesIO()
    Image.new("RGB", (3, 2), "red").save(encoded, "PNG")
    return encoded.getvalue()


def prompt(images: int = 0) -> common_pb2.Prompt:
    return common_pb2.Prompt(text=QUESTION, images=[common_pb2.Image(data=png())] * images)


def context(**given: Any) -> common_pb2.Context:
    return common_pb2.Context(prompt=prompt(), constraint=common_pb2.Constraint(text="Estonia"), **given)


def edit_request(**given: Any) -> edit_pb2.EditRequest:
    return edit_pb2.EditRequest(**{"name": "Estonia", "contexts": [context()], "target": "Tartu", **given})


def edit_call(**given: Any) -> edit_pb2.CreateEditRequest:
    return edit_pb2.CreateEditRequest(**{"parent": "models/atlas", "requests": [edit_request()], **given})


def question(**given: Any) -> trace_pb2.TracedQuestion:
    given = given or {"substitute": "Latvia"}
    return trace_pb2.TracedQuestion(prompt=prompt(), constraint=common_pb2.Constraint(text="Estonia"), **given)


def trace_call(**given: Any) -> trace_pb2.CreateTraceRequest:
    return trace_pb2.CreateTraceRequest(**{"version": "models/atlas", "questions": [question()], **given})


def probe(**given: Any) -> evaluation_pb2.Probe:
    return evaluation_pb2.Probe(**{"metric": evaluation_pb2.METRIC_EFFICACY, "prompt": prompt(), **given})


def evaluation_call(**given: Any) -> evaluation_pb2.CreateEvaluationRequest:
    return evaluation_pb2.CreateEvaluationRequest(**{"version": "models/atlas", "probes": [probe()], **given})


def generate_call(**given: Any) -> inference_pb2.GenerateRequest:
    return inference_pb2.GenerateRequest(**{"version": "models/atlas", "prompt": prompt(), **given})


def sampled(**given: Any) -> inference_pb2.GenerateRequest:
    return generate_call(sampling=inference_pb2.Sampling(**given))


def score_call(**given: Any) -> inference_pb2.ScoreRequest:
    return inference_pb2.ScoreRequest(
        **{"version": "models/atlas", "prompt": prompt(), "candidates": ["Tartu", "Tallinn"], **given}
    )


def promote_call(**given: Any) -> model_pb2.PromoteRequest:
    return model_pb2.PromoteRequest(**{"version": "models/atlas/versions/3", "alias": "champion", **given})


CALLS: dict[type[Message], Callable[[Any], object]] = {
    trace_pb2.CreateTraceRequest: DECODER.trace,
    edit_pb2.CreateEditRequest: DECODER.edit,
    evaluation_pb2.CreateEvaluationRequest: DECODER.evaluation,
    inference_pb2.GenerateRequest: DECODER.generate,
    inference_pb2.ScoreRequest: DECODER.score,
    model_pb2.PromoteRequest: promotion,
}


def test_an_edit_is_decoded_whole() -> None:
    order = DECODER.edit(
        edit_call(
            parent="models/atlas/versions/2",
            requests=[edit_request(contexts=[context(answer="Tallinn", subject="Estonia")], preserve=[context()])],
            layers=edit_pb2.LayerSelection(explicit=edit_pb2.LayerList(layers=[0, 3])),
            settings=edit_pb2.EditSettings(method=edit_pb2.METHOD_ROME, preservation=5.0, ridge=0.0, steps=7),
            probes=[probe(expected="Tartu", request="Estonia", believed="Tallinn")],
            references=[context()],
            guardrails=[evaluation_pb2.Guardrail(metric=evaluation_pb2.METRIC_UNRELATED, least=0.9)],
            request_id="0197-a_B",
            description="Why\nnot?",
        )
    )
    [request] = order.requests
    assert (order.parent, order.layers, order.trace) == (VersionRef("atlas", 2, None), (0, 3), None)
    assert (request.name, request.target, len(request.preserve)) == ("Estonia", "Tartu", 1)
    assert (request.contexts[0].answer, request.contexts[0].subject) == ("Tallinn", "Estonia")
    assert (request.preserve[0].answer, request.preserve[0].subject) == (None, None)
    assert (order.settings.method, order.settings.layers) == (Method.ROME, (0, 3))
    assert (order.settings.preservation, order.settings.ridge, order.settings.values.steps) == (5.0, 0.0, 7)
    assert (order.probes[0].expected, order.probes[0].request, order.probes[0].believed) == (
        "Tartu",
        "Estonia",
        "Tallinn",
    )
    assert (len(order.references), order.guardrails) == (1, {Metric.UNRELATED: 0.9})
    assert (order.request_id, order.validate_only, order.description) == ("0197-a_B", False, "Why\nnot?")


def test_what_an_edit_leaves_out_is_the_editors_default() -> None:
    order = DECODER.edit(edit_call())
    assert order.settings == EditSettings(layers=())
    assert (order.layers, order.trace, order.request_id, order.guardrails) == (None, None, None, {})


def test_layers_can_be_a_traces() -> None:
    chosen = edit_pb2.LayerSelection(trace="models/atlas/traces/0197")
    assert DECODER.edit(edit_call(layers=chosen)).trace == "0197"


def test_a_trace_is_decoded_whole() -> None:
    other = trace_pb2.OtherImages(images=[common_pb2.Image(data=png())])
    seen = question(other_images=other, answer="Tallinn")
    seen.prompt.CopyFrom(prompt(images=1))
    seen.prompt.raw = True
    seen.constraint.occurrence = 0
    order = DECODER.trace(
        trace_call(
            questions=[question(), seen],
            components=[trace_pb2.COMPONENT_LAYER, trace_pb2.COMPONENT_MLP],
            window=3,
            min_total_effect=0.0,
        )
    )
    first, second = order.questions
    assert (first.corruption, first.answer) == (Substitution(word="Latvia"), None)
    assert isinstance(second.corruption, OtherImage)
    assert (second.corruption.images[0].size, second.answer) == ((3, 2), "Tallinn")
    assert (second.prompt.chat, second.constraint.occurrence) == (False, 0)
    assert order.settings.components == (Component.LAYER, Component.MLP)
    assert (order.settings.window, order.settings.min_total_effect) == (3, 0.0)


def test_an_evaluation_is_decoded_whole() -> None:
    order = DECODER.evaluation(evaluation_call(baseline="models/atlas/aliases/candidate", validate_only=True))
    assert order.version == VersionRef("atlas", None, "champion")
    assert order.baseline == VersionRef("atlas", None, "candidate")
    assert (order.probes[0].metric, order.probes[0].expected, order.validate_only) == (Metric.EFFICACY, None, True)


def test_a_generation_has_its_defaults_and_its_limits() -> None:
    order = DECODER.generate(generate_call())
    assert (order.max_new_tokens, order.temperature, order.top_p, order.top_k, order.seed) == (32, 0.0, 1.0, None, None)
    at_most = DECODER.generate(sampled(temperature=10, top_p=1, top_k=2**31 - 1, seed=2**64 - 1))
    assert (at_most.temperature, at_most.top_k, at_most.seed) == (10, 2**31 - 1, 2**64 - 1)
    assert DECODER.generate(generate_call(max_new_tokens=4096, stop=["\n"] * 8)).stop == ("\n",) * 8


def test_a_score_and_a_promotion_are_decoded() -> None:
    assert DECODER.score(score_call()).candidates == ("Tartu", "Tallinn")
    found = promotion(promote_call(override_guardrails=True, override_reason="known", etag="x"))
    assert (found.model, found.number, found.alias, found.etag) == ("atlas", 3, "champion", "x")
    assert (found.override_reason, promotion(promote_call()).override_reason) == ("known", None)


def many(make: Callable[[], Any], n: int) -> list[Any]:
    return [make()] * n


def layered(*layers: int) -> edit_pb2.CreateEditRequest:
    return edit_call(layers=edit_pb2.LayerSelection(explicit=edit_pb2.LayerList(layers=layers)))


def with_settings(**given: Any) -> edit_pb2.CreateEditRequest:
    return edit_call(settings=edit_pb2.EditSettings(**given))


def with_context(given: common_pb2.Context) -> edit_pb2.CreateEditRequest:
    return edit_call(requests=[edit_request(contexts=[given])])


EXCHANGED = question(other_images=trace_pb2.OtherImages())
UNASKED = evaluation_pb2.Probe(metric=evaluation_pb2.METRIC_EFFICACY)
REFUSED: list[tuple[Message, str, str]] = [
    (edit_call(parent=""), "parent", "MALFORMED_NAME"),
    (edit_call(parent="models/../x"), "parent", "MALFORMED_NAME"),
    (edit_call(requests=[]), "requests", "MISSING_FIELD"),
    (edit_call(requests=many(edit_request, 1001)), "requests", "TOO_MANY"),
    (edit_call(requests=many(edit_request, 2)), "requests[1].name", "INVALID_INPUT"),
    (edit_call(requests=[edit_request(name=" ")]), "requests[0].name", "MISSING_FIELD"),
    (edit_call(requests=[edit_request(name="a" * 201)]), "requests[0].name", "OUT_OF_RANGE"),
    (edit_call(requests=[edit_request(name="a\nb")]), "requests[0].name", "MALFORMED_TEXT"),
    (edit_call(requests=[edit_request(name="a\x00b")]), "requests[0].name", "MALFORMED_TEXT"),
    (edit_call(requests=[edit_request(target=" ")]), "requests[0].target", "INVALID_TARGET"),
    (edit_call(requests=[edit_request(target="a\x00")]), "requests[0].target", "MALFORMED_TEXT"),
    (edit_call(requests=[edit_request(contexts=[])]), "requests[0].contexts", "MISSING_FIELD"),
    (edit_call(requests=[edit_request(contexts=many(context, 513))]), "requests[0].contexts", "TOO_MANY"),
    (edit_call(requests=[edit_request(preserve=many(context, 129))]), "requests[0].preserve", "TOO_MANY"),
    (
        edit_call(requests=[edit_request(), edit_request(name="b", contexts=[context(), context(subject="x" * 201)])]),
        "requests[1].contexts[1].subject",
        "OUT_OF_RANGE",
    ),
    (with_context(context(answer="")), "requests[0].contexts[0].answer", "MISSING_FIELD"),
    (
        edit_call(requests=[edit_request(contexts=[common_pb2.Context(prompt=prompt())])]),
        "requests[0].contexts[0].constraint",
        "MISSING_FIELD",
    ),
    (
        edit_call(requests=[edit_request(contexts=[common_pb2.Context(constraint=common_pb2.Constraint(text="x"))])]),
        "requests[0].contexts[0].prompt",
        "MISSING_FIELD",
    ),
    (edit_call(references=[common_pb2.Context()]), "references[0].prompt", "MISSING_FIELD"),
    (edit_call(probes=many(probe, 10_001)), "probes", "TOO_MANY"),
    (edit_call(probes=[probe(metric=0)]), "probes[0].metric", "MISSING_FIELD"),
    (edit_call(probes=[probe(metric=99)]), "probes[0].metric", "OUT_OF_RANGE"),
    (edit_call(probes=[probe(expected=" ")]), "probes[0].expected", "MISSING_FIELD"),
    (edit_call(guardrails=[evaluation_pb2.Guardrail(least=0.5)]), "guardrails[0].metric", "MISSING_FIELD"),
    *(
        (edit_call(guardrails=[evaluation_pb2.Guardrail(metric=evaluation_pb2.METRIC_EFFICACY, least=bad)]),
         "guardrails[0].least", "OUT_OF_RANGE")
        for bad in (-0.1, 1.1, math.nan, math.inf)
    ),
    (
        edit_call(guardrails=[evaluation_pb2.Guardrail(metric=evaluation_pb2.METRIC_EFFICACY, least=0.5)] * 2),
        "guardrails[1].metric",
        "MALFORMED",
    ),
    (with_settings(method=77), "settings.method", "OUT_OF_RANGE"),
    *((with_settings(preservation=bad), "settings.preservation", "OUT_OF_RANGE") for bad in (0.0, -1.0, NAN, math.inf)),
    *((with_settings(ridge=bad), "settings.ridge", "OUT_OF_RANGE") for bad in (-1e-9, math.nan, math.inf)),
    *((with_settings(steps=bad), "settings.steps", "OUT_OF_RANGE") for bad in (0, -1, 1001)),
    (layered(), "layers.explicit.layers", "MISSING_FIELD"),
    (layered(-1), "layers.explicit.layers[0]", "OUT_OF_RANGE"),
    (layered(2, 1), "layers.explicit.layers", "OUT_OF_RANGE"),
    (layered(1, 1), "layers.explicit.layers", "OUT_OF_RANGE"),
    (edit_call(layers=edit_pb2.LayerSelection(trace="models/atlas/edits/1")), "layers.trace", "MALFORMED_NAME"),
    (edit_call(layers=edit_pb2.LayerSelection(trace="models/other/traces/1")), "layers.trace", "MALFORMED"),
    (edit_call(layers=edit_pb2.LayerSelection(auto=False)), "layers.auto", "MALFORMED"),
    *((edit_call(request_id=bad), "request_id", "OUT_OF_RANGE") for bad in ("a b", "a" * 65, "é", "a\n", "../x")),
    (edit_call(description="a" * 4001), "description", "OUT_OF_RANGE"),
    (edit_call(description="a\x07"), "description", "MALFORMED_TEXT"),
    (trace_call(version="atlas"), "version", "MALFORMED_NAME"),
    (trace_call(questions=[]), "questions", "MISSING_FIELD"),
    (trace_call(questions=many(question, 201)), "questions", "TOO_MANY"),
    (trace_call(questions=[question(answer="x")]), "questions[0].corruption", "MISSING_FIELD"),
    (trace_call(questions=[question(substitute=" ")]), "questions[0].substitute", "INVALID_PROMPT"),
    (trace_call(questions=[EXCHANGED]), "questions[0].other_images.images", "INVALID_PROMPT"),
    (trace_call(questions=[question(substitute="x", answer=" ")]), "questions[0].answer", "MISSING_FIELD"),
    (trace_call(components=[0]), "components[0]", "MISSING_FIELD"),
    (trace_call(components=[1, 9]), "components[1]", "OUT_OF_RANGE"),
    (trace_call(components=[1, 1]), "components", "MALFORMED"),
    *((trace_call(window=bad), "window", "OUT_OF_RANGE") for bad in (0, -1, 65)),
    *((trace_call(min_total_effect=bad), "min_total_effect", "OUT_OF_RANGE") for bad in (-0.1, 1.1, math.nan)),
    (evaluation_call(probes=[]), "probes", "MISSING_FIELD"),
    (evaluation_call(baseline="models/other"), "baseline", "MALFORMED"),
    (evaluation_call(probes=[UNASKED]), "probes[0].prompt", "MISSING_FIELD"),
    (inference_pb2.GenerateRequest(version="models/atlas"), "prompt", "MISSING_FIELD"),
    (generate_call(prompt=common_pb2.Prompt(text=" \n")), "prompt.text", "INVALID_PROMPT"),
    (generate_call(prompt=common_pb2.Prompt(text="a\x00")), "prompt.text", "MALFORMED_TEXT"),
    (generate_call(prompt=common_pb2.Prompt(text="a\x9b31m")), "prompt.text", "MALFORMED_TEXT"),
    (generate_call(prompt=common_pb2.Prompt(text="a" * 200_001)), "prompt.text", "OUT_OF_RANGE"),
    *((generate_call(max_new_tokens=bad), "max_new_tokens", "OUT_OF_RANGE") for bad in (0, -1, 4097)),
    *((sampled(temperature=bad), "sampling.temperature", "OUT_OF_RANGE") for bad in (-0.1, 10.1, math.nan, math.inf)),
    *((sampled(top_p=bad), "sampling.top_p", "OUT_OF_RANGE") for bad in (0.0, -0.1, 1.1, math.nan)),
    *((sampled(top_k=bad), "sampling.top_k", "OUT_OF_RANGE") for bad in (0, -1)),
    (generate_call(stop=["a"] * 9), "stop", "TOO_MANY"),
    (generate_call(stop=["a", ""]), "stop[1]", "MISSING_FIELD"),
    (generate_call(stop=["a" * 101]), "stop[0]", "OUT_OF_RANGE"),
    (score_call(candidates=[]), "candidates", "MISSING_FIELD"),
    (score_call(candidates=["a"] * 65), "candidates", "TOO_MANY"),
    (score_call(candidates=["a", " "]), "candidates[1]", "MISSING_FIELD"),
    (score_call(candidates=["a", "a" * 200_001]), "candidates[1]", "OUT_OF_RANGE"),
    (promote_call(version="models/atlas"), "version", "MALFORMED_NAME"),
    (promote_call(version="models/atlas/aliases/champion"), "version", "MALFORMED_NAME"),
    (promote_call(alias="Champion"), "alias", "MALFORMED_NAME"),
    (promote_call(override_guardrails=True), "override_reason", "MISSING_FIELD"),
    (promote_call(override_guardrails=True, override_reason="a" * 1001), "override_reason", "OUT_OF_RANGE"),
    (promote_call(override_reason="a"), "override_reason", "MALFORMED"),
]  # fmt: skip


@pytest.mark.parametrize(("message", "field", "reason"), REFUSED)
def test_what_breaks_a_limit_is_refused_with_its_field_and_reason(message: Message, field: str, reason: str) -> None:
    with pytest.raises((InvalidInputError, MalformedError)) as caught:
        CALLS[type(message)](message)
    error = caught.value
    assert isinstance(error, InvalidInputError | MalformedError)
    assert (error.field, reason_of(error)) == (field, reason)


def test_a_constraint_that_the_prompt_does_not_hold_is_found_wherever_it_stands() -> None:
    bad = context()
    bad.constraint.text = "Latvia"
    twice = context()
    twice.constraint.text = "a"
    nowhere = question()
    nowhere.constraint.text = ""
    for message, field in (
        (edit_call(requests=[edit_request(contexts=[context(), bad])]), "requests[0].contexts[1].constraint.text"),
        (edit_call(requests=[edit_request(preserve=[twice])]), "requests[0].preserve[0].constraint.occurrence"),
        (edit_call(references=[bad]), "references[0].constraint.text"),
        (trace_call(questions=[question(), nowhere]), "questions[1].constraint.text"),
    ):
        with pytest.raises(ConstraintNotFoundError) as caught:
            CALLS[type(message)](message)
        assert caught.value.field == field


def test_an_image_at_fault_is_named() -> None:
    bad = context()
    bad.prompt.images.add(data=b"nothing")
    with pytest.raises(ImageError) as caught:
        DECODER.edit(edit_call(requests=[edit_request(contexts=[bad])]))
    assert caught.value.field == "requests[0].contexts[0].prompt.images[0].data"


def test_other_images_are_as_many_as_the_prompt_has() -> None:
    two = question(other_images=trace_pb2.OtherImages(images=[common_pb2.Image(data=png())] * 2))
    two.prompt.CopyFrom(prompt(images=1))
    with pytest.raises(PromptError, match=r"1 image\(s\) and 2 other"):
        DECODER.trace(trace_call(questions=[two]))


@pytest.fixture
def files(tmp_path: Path) -> Decoder:
    """A decoder that reads images below `tmp_path`."""
    (tmp_path / "flag.png").write_bytes(png())
    return Decoder(ImagePolicy(schemes=frozenset({"file"}), folders=(tmp_path,)))


def test_an_image_by_uri_becomes_bytes_wherever_it_stands(files: Decoder, tmp_path: Path) -> None:
    by_uri = common_pb2.Image(uri=f"file://{tmp_path}/flag.png")

    def calls(image: common_pb2.Image) -> list[Message]:
        seen = common_pb2.Prompt(text=QUESTION, images=[image, common_pb2.Image(data=png())])
        shown = common_pb2.Context(prompt=seen, constraint=common_pb2.Constraint(text="Estonia"))
        asked = evaluation_pb2.Probe(metric=evaluation_pb2.METRIC_EFFICACY, prompt=seen)
        others = trace_pb2.OtherImages(images=[image, image])
        traced = trace_pb2.TracedQuestion(prompt=seen, constraint=shown.constraint, other_images=others)
        edit = edit_request(contexts=[context(), shown], preserve=[shown])
        return [
            edit_call(requests=[edit], probes=[asked], references=[shown], request_id="0197"),
            trace_call(questions=[question(), traced]),
            evaluation_call(probes=[asked, probe()]),
        ]

    sent = calls(by_uri)
    assert [files.pinned(message) for message in sent] == calls(common_pb2.Image(data=png()))
    assert sent == calls(by_uri)


def test_an_image_that_cannot_be_pinned_names_its_uri(files: Decoder, tmp_path: Path) -> None:
    (tmp_path / "text.png").write_bytes(b"no picture")
    for uri in (f"file://{tmp_path}/text.png", f"file://{tmp_path}/none.png", "file:///etc/passwd", "ftp://x/y"):
        asked = context()
        asked.prompt.images.add(uri=uri)
        with pytest.raises(ImageError) as caught:
            files.pinned(edit_call(references=[context(), asked]))
        assert caught.value.field == "references[1].prompt.images[0].uri"


def test_pinned_images_are_no_more_bytes_than_a_call_may_bring(files: Decoder, tmp_path: Path) -> None:
    (tmp_path / "large.png").write_bytes(png() + bytes(9 * 2**20))
    large = common_pb2.Prompt(text=QUESTION, images=[common_pb2.Image(uri=f"file://{tmp_path}/large.png")] * 8)
    with pytest.raises(ImageError, match="together") as caught:
        files.pinned(evaluation_call(probes=[evaluation_pb2.Probe(prompt=large)]))
    assert caught.value.field == "probes[0].prompt.images[7].uri"


def test_single_parts_are_decoded_with_the_field_they_are_given() -> None:
    with pytest.raises(TargetError) as caught:
        DECODER.edit_request(edit_request(target=""), "requests[7]")
    assert caught.value.field == "requests[7].target"
    assert DECODER.context(context(), "c").prompt.text == QUESTION
    assert DECODER.probe(probe(), "p").metric is Metric.EFFICACY
    with pytest.raises(PromptError) as streamed:
        DECODER.generate(generate_call(prompt=common_pb2.Prompt()), "request")
    assert streamed.value.field == "request.prompt.text"


@pytest.mark.parametrize(("given_size", "size"), [(0, 50), (1, 1), (1000, 1000)])
def test_a_page_has_its_size(given_size: int, size: int) -> None:
    assert page_size(given_size) == size


@pytest.mark.parametrize("bad", [-1, 1001])
def test_a_page_of_another_size_is_refused(bad: int) -> None:
    with pytest.raises(MalformedError):
        page_size(bad)


def test_a_uuid_is_a_request_id_and_nothing_is_none() -> None:
    uuid = "0197b8a4-6a3e-7c1e-9d43-3a5b6a1c9f10"
    assert (request_id(uuid), request_id("")) == (uuid, None)


def scalars(field: Any) -> st.SearchStrategy[Any]:
    names = ["", "models/atlas", "models/atlas/versions/1", "models/atlas/traces/0", "champion", "Estonia", QUESTION]
    kinds: dict[int, st.SearchStrategy[Any]] = {
        FieldDescriptor.CPPTYPE_STRING: st.sampled_from(names) | st.text(),
        FieldDescriptor.CPPTYPE_BOOL: st.booleans(),
        FieldDescriptor.CPPTYPE_INT32: st.integers(-2, 70) | st.integers(-(2**31), 2**31 - 1),
        FieldDescriptor.CPPTYPE_UINT64: st.integers(0, 2**64 - 1),
        FieldDescriptor.CPPTYPE_DOUBLE: st.floats(),
        FieldDescriptor.CPPTYPE_ENUM: st.integers(-1, 8),
    }
    if field.type == FieldDescriptor.TYPE_BYTES:
        return st.binary() | st.just(png())
    return kinds[field.cpp_type]


@st.composite
def filled(draw: st.DrawFn, cls: type[Message]) -> Message:
    """Any message of a class, most of its fields set."""
    message = cls()
    for field in message.DESCRIPTOR.fields:
        if draw(st.integers(0, 4)) == 0:
            continue
        if field.cpp_type == FieldDescriptor.CPPTYPE_MESSAGE:
            inner = (
                type(getattr(cls(), field.name)) if not field.is_repeated else type(getattr(cls(), field.name).add())
            )
            if field.is_repeated:
                getattr(message, field.name).extend(draw(st.lists(filled(inner), max_size=2)))
            else:
                getattr(message, field.name).CopyFrom(draw(filled(inner)))
        elif field.is_repeated:
            getattr(message, field.name).extend(draw(st.lists(scalars(field), max_size=3)))
        else:
            setattr(message, field.name, draw(scalars(field)))
    return message


@pytest.mark.parametrize("cls", list(CALLS), ids=lambda cls: cls.__name__)
@given(data=st.data())
@settings(max_examples=60, suppress_health_check=list(HealthCheck))
def test_no_message_raises_what_is_not_raised_on_purpose(cls: type[Message], data: st.DataObject) -> None:
    message = data.draw(filled(cls))
    try:
        CALLS[cls](message)
    except (InvalidInputError, MalformedError) as error:
        said = error.field
    else:
        said = "nothing at fault"
    assert said


def leaves(message: Message) -> list[tuple[Message, Any]]:
    """Every field that is set and is no message, with the message that it stands in."""
    found: list[tuple[Message, Any]] = []
    for field, value in message.ListFields():
        if field.message_type is None:
            found.append((message, field))
        else:
            found += [leaf for inner in (value if field.is_repeated else [value]) for leaf in leaves(inner)]
    return found


WHOLE: list[Message] = [
    edit_call(
        requests=[edit_request(contexts=[context(answer="Tallinn", subject="Estonia")], preserve=[context()])],
        layers=edit_pb2.LayerSelection(explicit=edit_pb2.LayerList(layers=[0, 3])),
        settings=edit_pb2.EditSettings(method=edit_pb2.METHOD_ROME, preservation=5.0, ridge=0.1, steps=7),
        probes=[probe(expected="Tartu", request="Estonia", believed="Tallinn")],
        references=[context()],
        guardrails=[evaluation_pb2.Guardrail(metric=evaluation_pb2.METRIC_UNRELATED, least=0.9)],
        request_id="0197",
        description="Why",
    ),
    trace_call(components=[trace_pb2.COMPONENT_MLP], window=3, min_total_effect=0.2),
    evaluation_call(baseline="models/atlas"),
    generate_call(
        prompt=prompt(images=1),
        max_new_tokens=5,
        stop=["."],
        sampling=inference_pb2.Sampling(temperature=1.0, top_p=0.5, top_k=3, seed=7),
    ),
    score_call(),
    promote_call(etag="x"),
]


@pytest.mark.parametrize("whole", WHOLE, ids=lambda whole: type(whole).__name__)
@given(data=st.data())
def test_no_field_of_a_good_message_can_be_made_to_raise_anything_else(whole: Message, data: st.DataObject) -> None:
    message = type(whole)()
    message.CopyFrom(whole)
    CALLS[type(message)](message)
    inner, field = data.draw(st.sampled_from(leaves(message)))
    if field.is_repeated:
        getattr(inner, field.name)[:] = data.draw(st.lists(scalars(field), max_size=3))
    else:
        setattr(inner, field.name, data.draw(scalars(field)))
    try:
        CALLS[type(message)](message)
    except (InvalidInputError, MalformedError) as error:
        said = error.field
    else:
        said = "nothing at fault"
    assert said


def test_enums_have_the_same_members_on_both_sides() -> None:
    assert {edit_pb2.Method.Name(v).removeprefix("METHOD_"): m.name for v, m in METHODS.items()} == {
        m.name: m.name for m in Method
    }
    assert {evaluation_pb2.Metric.Name(v).removeprefix("METRIC_"): m.name for v, m in METRICS.items()} == {
        m.name: m.name for m in Metric
    }
    assert {trace_pb2.Component.Name(v).removeprefix("COMPONENT_"): c.name for v, c in COMPONENTS.items()} == {
        c.name: c.name for c in Component
    }
    assert set(METHODS) == set(edit_pb2.Method.values()) - {0}
    assert set(METRICS) == set(evaluation_pb2.Metric.values()) - {0}
    assert set(COMPONENTS) == set(trace_pb2.Component.values()) - {0}
    assert (set(STATES), set(STATES.values())) == (set(JobState), set(common_pb2.State.values()) - {0})
    assert set(PUBLISH_STATES) == set(PublishState)
    assert set(PUBLISH_STATES.values()) == set(model_pb2.PublishState.values()) - {0}


def job(kind: JobKind, request: Message, state: JobState = JobState.RUNNING, **given: Any) -> JobRow:
    row = JobRow(
        id="0197",
        kind=kind,
        model="atlas",
        version=2,
        state=state,
        stage="solve",
        done=1,
        total=4,
        request=request.SerializeToString(),
        result=None,
        failure=None,
        made=None,
        attempt=1,
        cancel_requested=False,
        created_by="ci",
        create_time=NOON,
        start_time=NOON,
        end_time=None,
    )
    return replace(row, **given)


def test_a_running_job_says_how_far_it_is_and_a_failed_one_why() -> None:
    running = job_message(job(JobKind.EDIT, edit_call()))
    assert (running.state, running.progress.stage, running.progress.total) == (common_pb2.STATE_RUNNING, "solve", 4)
    assert (running.create_time.ToDatetime(UTC), running.HasField("end_time")) == (NOON, False)
    failed = job_message(
        job(
            JobKind.EDIT,
            edit_call(),
            JobState.FAILED,
            failure=Failure(reason="NO_OP_EDIT", message="m", field="f"),
            end_time=NOON,
        )
    )
    assert (failed.error.reason, failed.error.message, failed.error.field) == ("NO_OP_EDIT", "m", "f")
    assert (failed.HasField("progress"), failed.HasField("end_time")) == (False, True)


def value() -> Value:
    zeros = torch.zeros(2)
    return Value(value=zeros, delta=zeros, scale=1.0, losses=(2.5, 0.01), kl=0.0, converged=True)


def score(metric: Metric = Metric.EFFICACY, forced: float = 0.5) -> Score:
    return Score(metric=metric, n=4, before=0.0, after=0.75, forced_before=0.25, forced=forced)


def test_an_edit_is_what_was_asked_for_and_what_came_about() -> None:
    call = edit_call(requests=[edit_request(name="Estonia: capital", target="Tartu\ntown")])
    result = EditResult(
        delta=Delta(base_sha256="", layers={}, modules={}),
        settings=EditSettings(layers=(0, 1), method=Method.ALPHAEDIT),
        outcomes=(RequestOutcome(name="Estonia: capital", target="Tartu", before="Tallinn", value=value()),),
    )
    stored = edit_outcome(result, [score()], ["efficacy 0.75 is below 0.90"]).SerializeToString()
    edit = edit_message(job(JobKind.EDIT, call, JobState.REJECTED, result=stored, made=3))
    assert (edit.name, edit.parent, edit.version) == (
        "models/atlas/edits/0197",
        "models/atlas/versions/2",
        "models/atlas/versions/3",
    )
    assert (edit.requests, list(edit.facts)) == (1, ["Estonia: capital → Tartu town"])
    assert (list(edit.layers), edit.settings.method, edit.settings.ridge) == ([0, 1], edit_pb2.METHOD_ALPHAEDIT, 0.01)
    assert (list(edit.outcomes[0].losses), edit.outcomes[0].converged) == ([2.5, 0.01], True)
    assert (edit.scores[0].after, list(edit.rejections)) == (0.75, ["efficacy 0.75 is below 0.90"])
    assert edit.job.state == common_pb2.STATE_REJECTED
    listed = edit_message(job(JobKind.EDIT, call, JobState.REJECTED, result=stored, made=3), full=False)
    assert (len(listed.outcomes), len(listed.scores)) == (0, 1)


@pytest.mark.parametrize("method", list(Method))
def test_the_settings_sent_back_are_decoded_to_the_same(method: Method) -> None:
    decoded = DECODER.edit_settings(settings_message(EditSettings(layers=(), method=method)), "settings")
    assert decoded.method is method
    assert settings_message(decoded) == settings_message(EditSettings(layers=(), method=method))


def test_an_evaluation_is_what_was_asked_for_and_what_came_about() -> None:
    asked = Probe(metric=Metric.PORTABILITY, prompt=Prompt(text=QUESTION), request="Estonia")
    result = ProbeResult(
        probe=asked, before="Tallinn", after="Tartu.", expected="Tartu", forced_before=0, forced=math.nan
    )
    found = Evaluation(results=(result,), drift=0.25, fluency_before=1.0, fluency=1.0)
    stored = evaluation_outcome(found, baseline="models/atlas/versions/1").SerializeToString()
    row = job(JobKind.EVALUATION, evaluation_call(), JobState.SUCCEEDED, result=stored)
    message = evaluation_message(row)
    assert (message.version, message.baseline) == ("models/atlas/versions/2", "models/atlas/versions/1")
    assert (message.name, message.drift) == ("models/atlas/evaluations/0197", 0.25)
    [shown] = message.results
    assert (shown.question, shown.before, shown.after, shown.passed, shown.request) == (
        QUESTION, "Tallinn", "Tartu.", True, "Estonia",
    )  # fmt: skip
    assert math.isnan(message.scores[0].forced)
    assert len(evaluation_message(row, full=False).results) == 0
    assert evaluation_message(row, full=False).scores[0].metric == evaluation_pb2.METRIC_PORTABILITY


def test_an_evaluation_that_waits_names_its_baseline() -> None:
    row = job(JobKind.EVALUATION, evaluation_call(baseline="models/atlas/versions/1"), JobState.PENDING)
    assert evaluation_message(row).baseline == "models/atlas/versions/1"


def test_an_ended_jobs_summary_is_what_was_queued_and_what_came_about_but_for_what_is_long() -> None:
    queued = edit_pb2.Edit(parent="models/atlas/versions/2", requests=1, facts=["a → b"])
    outcome = edit_pb2.Edit(layers=[1], rejections=["too low"], outcomes=[edit_pb2.RequestOutcome(name="a")])
    listed = edit_pb2.Edit.FromString(ended_summary(queued.SerializeToString(), outcome, "outcomes"))
    assert listed == edit_pb2.Edit(
        parent="models/atlas/versions/2", requests=1, facts=["a → b"], layers=[1], rejections=["too low"]
    )


def test_scores_carry_their_wilson_interval_through_the_ledger() -> None:
    [message, unknown] = scores_from_json(scores_json([score(), score(Metric.UNRELATED, forced=math.nan)]))
    assert (message.metric, message.n, message.before, message.after) == (evaluation_pb2.METRIC_EFFICACY, 4, 0.0, 0.75)
    # Wilson (1927) for 3 of 4 at z = 1.96, worked out by hand.
    assert message.low == pytest.approx(0.3006, abs=1e-4)
    assert message.high == pytest.approx(0.9544, abs=1e-4)
    assert math.isnan(unknown.forced)
    assert scores_from_json("") == []


def one_trace(shift: float, *, tokens: int = 3, components: tuple[Component, ...] = tuple(Component)) -> CausalTrace:
    restored = np.full((len(components), 2, tokens), 0.1) + shift
    restored[0, 1, 0] = 0.9
    return CausalTrace(
        question=QUESTION,
        answer="Tallinn",
        tokens=("Estonia", "?", ":")[:tokens],
        constraint=(0,),
        window=1,
        components=components,
        clean=Probabilities(first=0.9, whole=0.95 + shift),
        corrupted=Probabilities(first=0.2, whole=0.1),
        restored=restored,
        restored_first=restored,
    )


def test_an_averaged_trace_keeps_its_numbers_and_its_gaps() -> None:
    averaged = average([one_trace(0.0), one_trace(0.02)])
    result = causal_trace_result(averaged, ["no corruption: x"])
    assert list(result.roles) == list(averaged.roles)
    assert result.total_effect == pytest.approx(0.86)
    assert result.total_effect_deviation == pytest.approx(0.02 / math.sqrt(2))
    mlp = result.grids[0]
    assert (mlp.component, mlp.rows, mlp.columns) == (trace_pb2.COMPONENT_MLP, 2, 5)
    np.testing.assert_array_equal(np.reshape(mlp.effects, (2, 5)), averaged.aie(Component.MLP))
    by_hand = np.std(averaged.samples(Component.MLP), axis=0, ddof=1)
    np.testing.assert_allclose(np.reshape(mlp.deviations, (2, 5)), by_hand, atol=1e-12)
    first = averaged.roles.index("constraint first")
    assert math.isnan(mlp.effects[first])  # a constraint of one token has no first one beside its last
    assert (list(result.auto_layers), result.auto_refusal) == ([1], "")
    assert (list(result.skipped), len(result.traces)) == (["no corruption: x"], 2)
    back = trace_pb2.CausalTraceResult.FromString(result.SerializeToString())
    assert math.isnan(back.grids[0].effects[first])


def test_a_questions_own_trace_is_layers_by_tokens() -> None:
    [own] = causal_trace_result(average([one_trace(0.0)])).traces
    assert (own.question, list(own.tokens), list(own.constraint)) == (QUESTION, ["Estonia", "?", ":"], [0])
    assert (own.clean, own.corrupted, own.clean_first, own.corrupted_first) == (0.95, 0.1, 0.9, 0.2)
    grid = own.grids[0]
    assert (grid.rows, grid.columns, len(grid.deviations)) == (2, 3, 0)
    np.testing.assert_allclose(np.reshape(grid.effects, (2, 3)), [[0.0, 0.0, 0.0], [0.8, 0.0, 0.0]], atol=1e-12)


def test_one_question_has_no_deviations() -> None:
    result = causal_trace_result(average([one_trace(0.0)]))
    assert (result.total_effect_deviation, len(result.grids[0].deviations)) == (0.0, 0)


def test_a_trace_that_auto_would_refuse_says_why() -> None:
    flat = replace(one_trace(0.0), restored=np.full((3, 2, 3), 0.1))
    refusal = causal_trace_result(average([flat]))
    assert (list(refusal.auto_layers), "no MLP" in refusal.auto_refusal) == ([], True)
    blind = causal_trace_result(average([one_trace(0.0, components=(Component.LAYER,))]))
    assert "no MLP component" in blind.auto_refusal


def test_a_trace_message_holds_its_result_only_where_it_is_asked_for() -> None:
    stored = causal_trace_result(average([one_trace(0.0)])).SerializeToString()
    row = job(JobKind.TRACE, trace_call(window=3), JobState.SUCCEEDED, result=stored)
    message = trace_message(row)
    assert (message.name, message.version) == ("models/atlas/traces/0197", "models/atlas/versions/2")
    assert (message.questions, message.window, list(message.result.auto_layers)) == (1, 3, [1])
    assert not trace_message(row, full=False).HasField("result")
    assert trace_message(job(JobKind.TRACE, trace_call())).window == 1


VERSION = VersionRow(
    model="atlas",
    number=3,
    parent=2,
    edit="0197",
    base_sha256="aa",
    delta_sha256="bb",
    delta_bytes=4096,
    layers=(1, 2),
    facts=("Estonia: capital → Tartu",),
    scores=scores_json([score()]),
    rejections=(),
    aliases=("champion",),
    publish_state=PublishState.PUBLISHED,
    mlflow_version=7,
    mlflow_run_id="run",
    created_by="ci",
    create_time=NOON,
)


def test_a_version_names_where_it_comes_from() -> None:
    message = version_message(VERSION)
    assert (message.name, message.parent, message.edit) == (
        "models/atlas/versions/3", "models/atlas/versions/2", "models/atlas/edits/0197",
    )  # fmt: skip
    assert (message.state, message.publish_state) == (model_pb2.VERSION_STATE_READY, model_pb2.PUBLISH_STATE_PUBLISHED)
    assert (message.scores[0].after, list(message.aliases), message.mlflow_version) == (0.75, ["champion"], 7)
    assert message.create_time.ToDatetime(UTC) == NOON
    assert version_message(replace(VERSION, rejections=("x",))).state == model_pb2.VERSION_STATE_REJECTED


def test_the_base_comes_from_nothing() -> None:
    base = replace(
        VERSION, number=0, parent=None, edit=None, delta_sha256="", scores="", publish_state=PublishState.NONE
    )
    message = version_message(base)
    assert (message.name, message.parent, message.edit) == ("models/atlas/versions/0", "", "")
    assert len(message.scores) == 0


def test_aliases_models_and_the_record_are_told() -> None:
    alias = AliasRow(model="atlas", alias="champion", version=3, etag="e")
    told = alias_message(alias)
    assert (told.name, told.version, told.etag) == ("models/atlas/aliases/champion", "models/atlas/versions/3", "e")
    row = ModelRow(name="atlas", base_sha256="aa", architecture="LlavaForConditionalGeneration", layers=6)
    model = model_message(row, [alias], dtype="float32", device="cpu", loaded=True, memory_bytes=9)
    assert (model.name, model.layers, model.loaded, model.aliases[0].etag) == ("models/atlas", 6, True, "e")
    entry = audit_message(
        AuditRow(
            id=1,
            time=NOON,
            actor="ci",
            action="edit.create",
            model="atlas",
            resource="models/atlas/edits/0197",
            details=json.dumps({"a": 1}),
        )
    )
    assert (entry.actor, entry.action, json.loads(entry.details_json)) == ("ci", "edit.create", {"a": 1})


def test_what_a_constraint_refers_to_is_what_the_caller_says_of_it() -> None:
    """An image does not make a constraint in words visual; without a word of it, it does."""
    asked = measurement_pb2.MeasuredQuestion(
        prompt=prompt(images=1), constraints=[common_pb2.Constraint(text="Estonia")]
    )
    assert DECODER.question(asked, "questions[0]").kind(0) is Kind.VISUAL
    asked.kinds.append(measurement_pb2.CONSTRAINT_KIND_TEXTUAL)
    assert DECODER.question(asked, "questions[0]").kind(0) is Kind.TEXTUAL
