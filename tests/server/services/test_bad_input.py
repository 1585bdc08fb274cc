"""Bad input: the right code, a field, a reason; nothing changes; and the server keeps serving."""

import io
import random
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from hosting import (
    BASE,
    SECONDS,
    SECRET,
    Hosted,
    edit_message,
    evaluation_message,
    generate_message,
    hosting,
    prompt_message,
    question,
    refused,
    trace_message,
)
from PIL import Image

from errata.server.pages import PageTokens
from errata.server.settings import ModelSettings, Settings
from errata.v1 import common_pb2, edit_pb2, evaluation_pb2, inference_pb2, model_pb2, trace_pb2

ATLAS = "models/atlas"
INVALID, NOT_FOUND = grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND


@pytest.fixture(autouse=True)
def unchanged(hosted: Hosted) -> Iterator[None]:
    """Nothing that is refused leaves anything behind, and the next caller is answered."""
    before = _all(hosted)
    yield
    assert _all(hosted) == before
    assert hosted.call.inference.Generate(generate_message("France")).text == "Paris"


@pytest.fixture(scope="module", autouse=True)
def _moved(hosted: Hosted) -> None:
    """Enough in the audit for two pages."""
    hosted.call.models.Promote(model_pb2.PromoteRequest(version=BASE, alias="one"))
    hosted.call.models.Promote(model_pb2.PromoteRequest(version=BASE, alias="two"))


@pytest.fixture(scope="module")
def used(hosted: Hosted) -> str:
    """The request id of an edit, a trace and an evaluation, which were asked for and cancelled."""
    call, request_id = hosted.call, "used-before"
    edit = call.edits.CreateEdit(edit_message(request_id=request_id)).edit.name
    trace = call.traces.CreateTrace(trace_message(request_id=request_id)).trace.name
    request = evaluation_message(BASE, baseline=BASE, request_id=request_id)
    evaluation = call.evaluations.CreateEvaluation(request).evaluation.name
    call.edits.CancelEdit(edit_pb2.CancelEditRequest(name=edit))
    call.traces.CancelTrace(trace_pb2.CancelTraceRequest(name=trace))
    call.evaluations.CancelEvaluation(evaluation_pb2.CancelEvaluationRequest(name=evaluation))
    list(call.edits.WatchEdit(edit_pb2.WatchEditRequest(name=edit), timeout=SECONDS))
    return request_id


def _all(hosted: Hosted) -> list[object]:
    call = hosted.call
    return [
        call.models.ListVersions(model_pb2.ListVersionsRequest(parent=ATLAS, page_size=1000)).versions,
        call.models.ListAuditEntries(model_pb2.ListAuditEntriesRequest(parent=ATLAS, page_size=1000)).entries,
        call.models.GetModel(model_pb2.GetModelRequest(name=ATLAS)).model.aliases,
    ]


@pytest.mark.parametrize(
    ("version", "reason"),
    [
        ("models/pluto", "MODEL_NOT_FOUND"),
        ("models/pluto/versions/0", "MODEL_NOT_FOUND"),
        ("models/atlas/versions/999", "VERSION_NOT_FOUND"),
        ("models/atlas/aliases/nobody", "ALIAS_NOT_FOUND"),
    ],
)
def test_what_does_not_exist_is_not_found(hosted: Hosted, version: str, reason: str) -> None:
    call = hosted.call
    trace = trace_message()
    trace.version = version
    against = evaluation_message(BASE, baseline=version)
    for found, field in (
        (refused(lambda: call.inference.Generate(generate_message(version=version))), "version"),
        (refused(lambda: call.models.GetVersion(model_pb2.GetVersionRequest(name=version))), "name"),
        (refused(lambda: call.edits.CreateEdit(edit_message(parent=version))), "parent"),
        (refused(lambda: call.traces.CreateTrace(trace)), "version"),
        (refused(lambda: call.evaluations.CreateEvaluation(evaluation_message(version))), "version"),
        (refused(lambda: call.evaluations.CreateEvaluation(against)), "baseline"),
    ):
        other = field == "baseline" and reason == "MODEL_NOT_FOUND"
        expected = (INVALID, "MALFORMED", field) if other else (NOT_FOUND, reason, field)
        assert (found.code, found.reason, found.field) == expected


def test_lists_of_an_unknown_model_are_refused(hosted: Hosted) -> None:
    call, pluto = hosted.call, "models/pluto"
    for found in (
        refused(lambda: call.edits.ListEdits(edit_pb2.ListEditsRequest(parent=pluto))),
        refused(lambda: call.traces.ListTraces(trace_pb2.ListTracesRequest(parent=pluto))),
        refused(lambda: call.evaluations.ListEvaluations(evaluation_pb2.ListEvaluationsRequest(parent=pluto))),
    ):
        assert (found.code, found.reason, found.field) == (NOT_FOUND, "MODEL_NOT_FOUND", "parent")


def test_a_job_that_does_not_exist_is_not_found(hosted: Hosted) -> None:
    call = hosted.call
    trace, edit, evaluation = (f"models/atlas/{kind}/0123abcd" for kind in ("traces", "edits", "evaluations"))
    found = [
        refused(lambda: call.traces.GetTrace(trace_pb2.GetTraceRequest(name=trace))),
        refused(lambda: call.traces.CancelTrace(trace_pb2.CancelTraceRequest(name=trace))),
        refused(lambda: call.traces.WatchTrace(trace_pb2.WatchTraceRequest(name=trace))),
        refused(lambda: call.edits.GetEdit(edit_pb2.GetEditRequest(name=edit))),
        refused(lambda: call.edits.CancelEdit(edit_pb2.CancelEditRequest(name=edit))),
        refused(lambda: call.edits.WatchEdit(edit_pb2.WatchEditRequest(name=edit))),
        refused(lambda: call.evaluations.GetEvaluation(evaluation_pb2.GetEvaluationRequest(name=evaluation))),
        refused(lambda: call.evaluations.CancelEvaluation(evaluation_pb2.CancelEvaluationRequest(name=evaluation))),
        refused(lambda: call.evaluations.WatchEvaluation(evaluation_pb2.WatchEvaluationRequest(name=evaluation))),
    ]
    reasons = [f"{kind}_NOT_FOUND" for kind in ("TRACE", "EDIT", "EVALUATION") for _ in range(3)]
    assert [(f.code, f.reason, f.field) for f in found] == [(NOT_FOUND, reason, "name") for reason in reasons]


@pytest.mark.parametrize(
    "name",
    [
        "",
        "atlas",
        "models/",
        "models/..",
        "models/../atlas",
        "models/atlas/../atlas/versions/0",
        "models/atlas/versions/..",
        "models/atlas%2Fversions%2F0",
        "models/%2e%2e/versions/0",
        "models/atlas/versions/-1",
        "models/atlas/versions/1e3",
        "models/atlas/versions/00",
        "models/atlas/versions/0/",
        "models/atlas/versions/0\n",
        "models/atlas/versions/٣",
        "models/atlas/aliases/UPPER",
        "models/atlas/aliases/" + "a" * 65,
        "models/atlas/versions/99999999999999999999",
        "models/" + "a" * 100_000,
    ],
)
def test_a_malformed_name_is_refused_with_its_field(hosted: Hosted, name: str) -> None:
    call = hosted.call
    for found, field in (
        (refused(lambda: call.inference.Generate(generate_message(version=name))), "version"),
        (refused(lambda: call.edits.CreateEdit(edit_message(parent=name))), "parent"),
        (refused(lambda: call.models.GetLineage(model_pb2.GetLineageRequest(name=name))), "name"),
        (refused(lambda: call.models.DeleteVersion(model_pb2.DeleteVersionRequest(name=name))), "name"),
        (refused(lambda: call.edits.ListEdits(edit_pb2.ListEditsRequest(parent=name + "/"))), "parent"),
        (refused(lambda: call.edits.WatchEdit(edit_pb2.WatchEditRequest(name=name))), "name"),
    ):
        assert (found.code, found.reason, found.field) == (INVALID, "MALFORMED_NAME", field)


@pytest.mark.parametrize("id", ["..", "../../x", "a/b", "%2e", "A", ""])
def test_a_malformed_id_reaches_no_file(hosted: Hosted, id: str) -> None:
    found = refused(lambda: hosted.call.edits.GetEdit(edit_pb2.GetEditRequest(name=f"models/atlas/edits/{id}")))
    assert (found.code, found.reason, found.field) == (INVALID, "MALFORMED_NAME", "name")


def test_an_oversized_message_is_refused_with_a_reason(hosted: Hosted) -> None:
    request = generate_message()
    request.prompt.text = "x" * (9 * 2**20)
    found = refused(lambda: hosted.call.inference.Generate(request))
    assert (found.code, found.reason, found.field) == (INVALID, "MESSAGE_TOO_LARGE", "request")


def test_a_message_far_over_the_limit_is_cut_off(hosted: Hosted) -> None:
    request = generate_message()
    request.prompt.text = "x" * (17 * 2**20)
    assert refused(lambda: hosted.call.inference.Generate(request)).code is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_what_is_no_message_is_refused(hosted: Hosted) -> None:
    generate = hosted.channel.unary_unary("/errata.v1.InferenceService/Generate")
    found = refused(lambda: generate(b"\xff\xff\xff not a message"))
    assert (found.code, found.reason, found.field) == (INVALID, "MALFORMED_MESSAGE", "request")
    watch = hosted.channel.unary_stream("/errata.v1.EditService/WatchEdit")
    assert refused(lambda: watch(b"\x0a\xff")).reason == "MALFORMED_MESSAGE"


def _with_image(image: common_pb2.Image) -> inference_pb2.GenerateRequest:
    return inference_pb2.GenerateRequest(version=BASE, prompt=common_pb2.Prompt(text="Where?", images=[image]))


def _png(size: tuple[int, int], *, noisy: bool = False) -> bytes:
    image = Image.new("RGB", size)
    if noisy:
        image.putdata([tuple(random.Random(i).randbytes(3)) for i in range(size[0] * size[1])])
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


@pytest.mark.parametrize(
    ("image", "field"),
    [
        (common_pb2.Image(), "prompt.images[0]"),
        (common_pb2.Image(data=b"no picture"), "prompt.images[0].data"),
        (common_pb2.Image(data=_png((2000, 2000))), "prompt.images[0].data"),
        (common_pb2.Image(data=_png((300, 300), noisy=True)), "prompt.images[0].data"),
        (common_pb2.Image(data=_png((64, 64), noisy=True)[:1000]), "prompt.images[0].data"),
        (common_pb2.Image(uri="file:///etc/passwd"), "prompt.images[0].uri"),
        (common_pb2.Image(uri="http://127.0.0.1/flag.png"), "prompt.images[0].uri"),
        (common_pb2.Image(uri="https://example.org/flag.png"), "prompt.images[0].uri"),
        (common_pb2.Image(uri="FILE:///etc/passwd"), "prompt.images[0].uri"),
        (common_pb2.Image(uri="../flag.png"), "prompt.images[0].uri"),
    ],
    ids=["empty", "no picture", "pixels", "bytes", "truncated", "file", "http", "https", "upper", "relative"],
)
def test_an_image_that_is_not_taken_is_refused(hosted: Hosted, image: common_pb2.Image, field: str) -> None:
    found = refused(lambda: hosted.call.inference.Generate(_with_image(image)))
    assert (found.code, found.reason, found.field) == (INVALID, "INVALID_IMAGE", field)


@pytest.mark.parametrize("text", ["", "   ", "\n"])
def test_an_empty_prompt_is_refused(hosted: Hosted, text: str) -> None:
    request = inference_pb2.GenerateRequest(version=BASE, prompt=common_pb2.Prompt(text=text))
    found = refused(lambda: hosted.call.inference.Generate(request))
    assert (found.code, found.reason, found.field) == (INVALID, "INVALID_PROMPT", "prompt.text")
    missing = refused(lambda: hosted.call.inference.Generate(inference_pb2.GenerateRequest(version=BASE)))
    assert (missing.reason, missing.field) == ("MISSING_FIELD", "prompt")


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (generate_message(sampling=inference_pb2.Sampling(temperature=-0.1)), "sampling.temperature"),
        (generate_message(sampling=inference_pb2.Sampling(temperature=10.1)), "sampling.temperature"),
        (generate_message(sampling=inference_pb2.Sampling(temperature=float("nan"))), "sampling.temperature"),
        (generate_message(sampling=inference_pb2.Sampling(top_p=0.0)), "sampling.top_p"),
        (generate_message(sampling=inference_pb2.Sampling(top_p=1.1)), "sampling.top_p"),
        (generate_message(sampling=inference_pb2.Sampling(top_k=0)), "sampling.top_k"),
        (generate_message(max_new_tokens=0), "max_new_tokens"),
        (generate_message(max_new_tokens=-1), "max_new_tokens"),
        (generate_message(max_new_tokens=4097), "max_new_tokens"),
        (generate_message(stop=["a" * 101]), "stop[0]"),
    ],
)
def test_sampling_out_of_range_is_refused_streamed_or_not(
    hosted: Hosted, request_: inference_pb2.GenerateRequest, field: str
) -> None:
    unary = refused(lambda: hosted.call.inference.Generate(request_))
    assert (unary.code, unary.reason, unary.field) == (INVALID, "OUT_OF_RANGE", field)
    streamed = refused(
        lambda: hosted.call.inference.StreamGenerate(inference_pb2.StreamGenerateRequest(request=request_))
    )
    assert (streamed.code, streamed.reason, streamed.field) == (INVALID, "OUT_OF_RANGE", f"request.{field}")


def test_candidates_are_counted_and_not_blank(hosted: Hosted) -> None:
    prompt = prompt_message(question("France").prompt)
    for candidates, reason, field in (
        ([], "MISSING_FIELD", "candidates"),
        (["x"] * 65, "TOO_MANY", "candidates"),
        (["Paris", " "], "MISSING_FIELD", "candidates[1]"),
    ):
        request = inference_pb2.ScoreRequest(version=BASE, prompt=prompt, candidates=candidates)
        found = refused(lambda: hosted.call.inference.Score(request))  # noqa: B023
        assert (found.code, found.reason, found.field) == (INVALID, reason, field)


def test_a_page_token_of_another_list_or_none_at_all_is_refused(hosted: Hosted) -> None:
    call = hosted.call.models
    token = call.ListAuditEntries(model_pb2.ListAuditEntriesRequest(parent=ATLAS, page_size=1)).next_page_token
    assert token
    for other in (token, "nonsense", token[:-2], "x" * 5000):
        request = model_pb2.ListVersionsRequest(parent=ATLAS, page_token=other)
        found = refused(lambda: call.ListVersions(request))  # noqa: B023
        assert (found.code, found.reason, found.field) == (INVALID, "INVALID_PAGE_TOKEN", "page_token")


def test_an_expired_page_token_is_refused_as_such(hosted: Hosted) -> None:
    yesterday = datetime.now(UTC) - timedelta(days=1)
    token = PageTokens(SECRET.encode(), clock=lambda: yesterday).issue("ListVersions", "atlas", "5")
    found = refused(
        lambda: hosted.call.models.ListVersions(model_pb2.ListVersionsRequest(parent=ATLAS, page_token=token))
    )
    assert (found.code, found.reason, found.field) == (INVALID, "PAGE_TOKEN_EXPIRED", "page_token")


@pytest.mark.parametrize("size", [-1, 1001])
def test_a_page_size_out_of_range_is_refused(hosted: Hosted, size: int) -> None:
    found = refused(lambda: hosted.call.models.ListModels(model_pb2.ListModelsRequest(page_size=size)))
    assert (found.code, found.reason, found.field) == (INVALID, "OUT_OF_RANGE", "page_size")


def _edit_with(**changes: object) -> edit_pb2.CreateEditRequest:
    request = edit_message()
    for path, value in changes.items():
        match path:
            case "target":
                request.requests[0].target = value
            case "constraint":
                request.requests[0].contexts[0].constraint.text = value
            case "layers":
                del request.layers.explicit.layers[:]
                request.layers.explicit.layers.extend(value)
            case "steps":
                request.settings.steps = value
            case "trace":
                request.layers.trace = value
            case "request_id":
                request.request_id = value
            case "image":
                request.requests[0].contexts[1].prompt.images[0].uri = value
            case "picture":
                request.requests[0].contexts[1].prompt.images[0].data = value
            case "prompt":
                request.requests[0].contexts[0].prompt.text = value
            case "requests":
                del request.requests[:]
    return request


@pytest.mark.parametrize(
    ("request_", "reason", "field"),
    [
        (_edit_with(requests=None), "MISSING_FIELD", "requests"),
        (_edit_with(target="  "), "INVALID_TARGET", "requests[0].target"),
        (_edit_with(constraint="this moon"), "CONSTRAINT_NOT_FOUND", "requests[0].contexts[0].constraint.text"),
        (_edit_with(image="file:///etc/passwd"), "INVALID_IMAGE", "requests[0].contexts[1].prompt.images[0].uri"),
        (_edit_with(picture=_png((2000, 2000))), "INVALID_IMAGE", "requests[0].contexts[1].prompt.images[0].data"),
        (_edit_with(prompt=" "), "INVALID_PROMPT", "requests[0].contexts[0].prompt.text"),
        (_edit_with(layers=[6]), "LAYER_OUT_OF_RANGE", "layers.explicit.layers[0]"),
        (_edit_with(layers=[]), "MISSING_FIELD", "layers.explicit.layers"),
        (_edit_with(layers=[2, 1]), "OUT_OF_RANGE", "layers.explicit.layers"),
        (_edit_with(steps=1001), "OUT_OF_RANGE", "settings.steps"),
        (_edit_with(request_id="with spaces"), "OUT_OF_RANGE", "request_id"),
        (_edit_with(trace="models/atlas/edits/1"), "MALFORMED_NAME", "layers.trace"),
    ],
)
def test_an_edit_is_checked_before_it_is_queued(
    hosted: Hosted, request_: edit_pb2.CreateEditRequest, reason: str, field: str
) -> None:
    found = refused(lambda: hosted.call.edits.CreateEdit(request_))
    assert (found.code, found.reason, found.field) == (INVALID, reason, field)


def _trace_with(text: str | None = None, image: str | None = None) -> object:
    request = trace_message()
    if text is not None:
        request.questions[0].prompt.text = text
    if image is not None:
        request.questions[0].other_images.images[0].uri = image
    return request


@pytest.mark.parametrize(
    ("request_", "reason", "field"),
    [
        (trace_pb2.CreateTraceRequest(version=BASE), "MISSING_FIELD", "questions"),
        (trace_message(window=0), "OUT_OF_RANGE", "window"),
        (trace_message(min_total_effect=1.5), "OUT_OF_RANGE", "min_total_effect"),
        (trace_message(components=[99]), "OUT_OF_RANGE", "components[0]"),
        (trace_message(request_id="../x"), "OUT_OF_RANGE", "request_id"),
        (_trace_with(text=""), "INVALID_PROMPT", "questions[0].prompt.text"),
        (_trace_with(image="http://127.0.0.1/a.png"), "INVALID_IMAGE", "questions[0].other_images.images[0].uri"),
    ],
)
def test_a_trace_is_checked_before_it_is_queued(
    hosted: Hosted, request_: trace_pb2.CreateTraceRequest, reason: str, field: str
) -> None:
    found = refused(lambda: hosted.call.traces.CreateTrace(request_))
    assert (found.code, found.reason, found.field) == (INVALID, reason, field)


def _evaluation_with(text: str | None = None, image: str | None = None, **more: Any) -> object:
    request = evaluation_message(BASE, **{"baseline": BASE, **more})
    if text is not None:
        request.probes[0].prompt.text = text
    if image is not None:
        request.probes[0].prompt.images[0].uri = image
    return request


UNASKED = evaluation_pb2.Probe(metric=evaluation_pb2.METRIC_EFFICACY)
TOO_HIGH = evaluation_pb2.Guardrail(metric=evaluation_pb2.METRIC_EFFICACY, least=1.5)


@pytest.mark.parametrize(
    ("request_", "reason", "field"),
    [
        (evaluation_pb2.CreateEvaluationRequest(version=BASE, baseline=BASE), "MISSING_FIELD", "probes"),
        (
            evaluation_pb2.CreateEvaluationRequest(version=BASE, baseline=BASE, probes=[UNASKED]),
            "MISSING_FIELD",
            "probes[0].prompt",
        ),
        (_evaluation_with(baseline="models/../atlas"), "MALFORMED_NAME", "baseline"),
        (_evaluation_with(baseline=""), "MISSING_FIELD", "baseline"),
        (_evaluation_with(guardrails=[TOO_HIGH]), "OUT_OF_RANGE", "guardrails[0].least"),
        (_evaluation_with(request_id="a b"), "OUT_OF_RANGE", "request_id"),
        (_evaluation_with(text="\n"), "INVALID_PROMPT", "probes[0].prompt.text"),
        (_evaluation_with(image="https://example.org/a.png"), "INVALID_IMAGE", "probes[0].prompt.images[0].uri"),
    ],
)
def test_an_evaluation_is_checked_before_it_is_queued(
    hosted: Hosted, request_: evaluation_pb2.CreateEvaluationRequest, reason: str, field: str
) -> None:
    found = refused(lambda: hosted.call.evaluations.CreateEvaluation(request_))
    assert (found.code, found.reason, found.field) == (INVALID, reason, field)


def test_layers_of_a_trace_that_does_not_exist_are_refused(hosted: Hosted) -> None:
    found = refused(lambda: hosted.call.edits.CreateEdit(_edit_with(trace="models/atlas/traces/0123abcd")))
    assert (found.code, found.reason, found.field) == (NOT_FOUND, "TRACE_NOT_FOUND", "layers.trace")


def test_the_same_request_id_with_another_body_is_refused(hosted: Hosted, used: str) -> None:
    call = hosted.call
    for found in (
        refused(lambda: call.edits.CreateEdit(edit_message("Latvia", request_id=used))),
        refused(lambda: call.traces.CreateTrace(trace_message("Kenya", request_id=used))),
        refused(lambda: call.evaluations.CreateEvaluation(evaluation_message(BASE, "Kenya", request_id=used))),
    ):
        assert (found.code, found.reason, found.field) == (
            grpc.StatusCode.ALREADY_EXISTS,
            "REQUEST_ID_REUSED",
            "request_id",
        )


def test_a_call_during_drain_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    models = {"atlas": ModelSettings(source="atlas", load="lazy")}
    with hosting(Settings(data_dir=tmp_path, port=0, models=models, mlflow_uri="none")) as draining:
        ledger = draining.server.stores.ledger
        before = (ledger.audit("atlas", None, 100), ledger.versions("atlas", None, 100))
        draining.server.gate.drain()
        call = draining.call
        for found in (
            refused(lambda: call.edits.CreateEdit(edit_message())),
            refused(lambda: call.models.Promote(model_pb2.PromoteRequest(version=BASE, alias="champion"))),
            refused(lambda: call.inference.Generate(generate_message())),
            refused(lambda: call.models.ListModels(model_pb2.ListModelsRequest())),
        ):
            assert (found.code, found.reason) == (grpc.StatusCode.UNAVAILABLE, "DRAINING")
        assert (ledger.audit("atlas", None, 100), ledger.versions("atlas", None, 100)) == before
        # Who asks about the server's health is still answered.
        health = health_pb2_grpc.HealthStub(draining.channel)
        assert health.Check(health_pb2.HealthCheckRequest(service="errata.v1.ModelService")).status


def test_a_promotion_of_what_is_not_there_is_refused(hosted: Hosted) -> None:
    promote = model_pb2.PromoteRequest(version="models/atlas/versions/999", alias="champion")
    unknown = refused(lambda: hosted.call.models.Promote(promote))
    assert (unknown.code, unknown.reason) == (NOT_FOUND, "VERSION_NOT_FOUND")
    promote.version = ATLAS
    unnumbered = refused(lambda: hosted.call.models.Promote(promote))
    assert (unnumbered.code, unnumbered.reason, unnumbered.field) == (INVALID, "MALFORMED_NAME", "version")
    promote.version, promote.alias = BASE, "No Alias"
    misnamed = refused(lambda: hosted.call.models.Promote(promote))
    assert (misnamed.code, misnamed.reason, misnamed.field) == (INVALID, "MALFORMED_NAME", "alias")
    gone = refused(lambda: hosted.call.models.Rollback(model_pb2.RollbackRequest(name=f"{ATLAS}/aliases/nobody")))
    assert (gone.code, gone.reason) == (NOT_FOUND, "ALIAS_NOT_FOUND")


def test_an_error_that_quotes_a_long_request_fits_what_clients_take(hosted: Hosted) -> None:
    request = edit_message()
    request.requests[0].contexts[0].prompt.text = "ж" * 200_000
    found = refused(lambda: hosted.call.edits.CreateEdit(request))
    assert (found.code, found.reason) == (INVALID, "CONSTRAINT_NOT_FOUND")


def test_an_unknown_method_is_unimplemented(hosted: Hosted) -> None:
    call = hosted.channel.unary_unary("/errata.v1.InferenceService/Dream")
    assert refused(lambda: call(b"")).code is grpc.StatusCode.UNIMPLEMENTED
