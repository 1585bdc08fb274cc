"""Every method of both clients, against a real server in memory."""

import asyncio
import math
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
from fake_server import CAPITAL, Fake

from errata.client import (
    AsyncErrata,
    Component,
    Constraint,
    Context,
    EditRequest,
    Errata,
    EtagMismatchError,
    FinishReason,
    InvalidInputError,
    MeasuredQuestion,
    Method,
    Metric,
    Probe,
    Prompt,
    PublishState,
    RejectedVersionError,
    State,
    TracedQuestion,
    VersionInUseError,
    VersionState,
)
from errata.v1 import (
    edit_pb2,
    evaluation_pb2,
    export_pb2,
    history_pb2,
    inference_pb2,
    measurement_pb2,
    model_pb2,
    trace_pb2,
)

SERVICES = [
    file.DESCRIPTOR.services_by_name[name]
    for file, name in (
        (model_pb2, "ModelService"),
        (trace_pb2, "TraceService"),
        (edit_pb2, "EditService"),
        (evaluation_pb2, "EvaluationService"),
        (inference_pb2, "InferenceService"),
        (export_pb2, "ExportService"),
        (history_pb2, "HistoryService"),
        (measurement_pb2, "MeasurementService"),
    )
]
QUESTION = TracedQuestion(CAPITAL, "Kazakhstan", substitute="Norway")
MEASURED = MeasuredQuestion(CAPITAL, "Kazakhstan")
PROBE = Probe(Metric.EFFICACY, CAPITAL, "Astana")
UNCHANGED = Probe("unrelated", CAPITAL)


def test_the_client_reaches_every_call_of_the_api(
    client: Errata, fake: Fake, astana: EditRequest, tmp_path: Path
) -> None:
    edit = client.edit("atlas", [astana]).result()
    list(client.models()), client.model("atlas"), list(client.versions("atlas")), client.version(edit.version)
    client.lineage(edit.version), client.promote("atlas@0"), client.promote(edit.version)
    client.rollback("atlas@champion"), list(client.audit("atlas"))
    client.delete_version(edit.version)
    for operation in (
        client.trace("atlas", [QUESTION]),
        client.measure("atlas", "noise", [MEASURED]),
        client.edit("atlas", [astana]),
        client.evaluate("atlas", [PROBE], baseline="atlas@0"),
    ):
        operation.refresh(), operation.cancel()
    client.trace("atlas", [QUESTION]).result(), client.evaluate("atlas", [PROBE], baseline="atlas").result()
    list(client.traces("atlas")), list(client.edits("atlas")), list(client.evaluations("atlas"))
    measured = client.measure("atlas", "noise", [MEASURED]).result()
    list(client.measurements("atlas")), client.measurement_file(measured, "aie.png")
    (
        client.generate("atlas", CAPITAL),
        client.stream("atlas", CAPITAL).result(),
        client.score("atlas", CAPITAL, ["Oslo"]),
        client.export("atlas", tmp_path / "out"),
    )
    version = client.edit("atlas@0", [astana]).result().version
    for search in (client.revert(version, version), client.bisect(version, [PROBE])):
        search.refresh(), search.cancel()
    client.squash("atlas@0", version).result(), client.bisect(version, [UNCHANGED]).result()
    list(client.derivations("atlas")), list(client.bisections("atlas")), client.compare("atlas@0", version)
    assert set(fake.calls) == {method.name for service in SERVICES for method in service.methods}


def test_the_asyncio_client_reaches_every_call_of_the_api(
    server: str, fake: Fake, astana: EditRequest, tmp_path: Path
) -> None:
    async def everything() -> None:
        async with AsyncErrata(server) as client:
            edit = await (await client.edit("atlas", [astana])).result()
            await client.model("atlas"), await client.version(edit.version), await client.lineage(edit.version)
            await client.promote("atlas@0"), await client.promote(edit.version)
            await client.rollback("atlas@champion")
            await client.delete_version(edit.version)
            for operation in (
                await client.trace("atlas", [QUESTION]),
                await client.measure("atlas", "noise", [MEASURED]),
                await client.edit("atlas", [astana]),
                await client.evaluate("atlas", [PROBE], baseline="atlas@0"),
            ):
                await operation.refresh(), await operation.cancel()
            await (await client.trace("atlas", [QUESTION])).result()
            await (await client.evaluate("atlas", [PROBE], baseline="atlas")).result()
            for listed in (client.models(), client.versions("atlas"), client.audit("atlas"), client.traces("atlas")):
                await _all(listed)
            await _all(client.edits("atlas")), await _all(client.evaluations("atlas"))
            measured = await (await client.measure("atlas", "noise", [MEASURED])).result()
            await _all(client.measurements("atlas")), await client.measurement_file(measured, "aie.png")
            await client.generate("atlas", CAPITAL), await client.score("atlas", CAPITAL, ["Oslo"])
            await client.stream("atlas", CAPITAL).result(), await client.export("atlas", tmp_path / "out")
            version = (await (await client.edit("atlas@0", [astana])).result()).version
            for search in (await client.revert(version, version), await client.bisect(version, [PROBE])):
                await search.refresh(), await search.cancel()
            await (await client.squash("atlas@0", version)).result()
            await (await client.bisect(version, [UNCHANGED])).result()
            await _all(client.derivations("atlas")), await _all(client.bisections("atlas"))
            await client.compare("atlas@0", version)

    asyncio.run(everything())
    assert set(fake.calls) == {method.name for service in SERVICES for method in service.methods}


def test_both_clients_have_the_same_methods_with_the_same_parameters() -> None:
    assert _signatures(Errata) == _signatures(AsyncErrata)


def test_an_asyncio_client_may_be_made_before_any_event_loop_runs(server: str) -> None:
    client = AsyncErrata(server)

    async def ask() -> str:
        async with client:
            return (await client.generate("atlas", CAPITAL)).text

    assert asyncio.run(ask()) == "Nur-Sultan"


def test_lists_run_over_all_pages_and_ask_for_each_when_it_is_needed(
    client: Errata, fake: Fake, astana: EditRequest
) -> None:
    for _ in range(4):
        client.edit("atlas", [astana]).result()
    versions = client.versions("atlas")
    assert fake.count("ListVersions") == 0
    assert next(versions).number == 4
    assert fake.count("ListVersions") == 1
    assert [version.number for version in versions] == [3, 2, 1, 0]
    assert fake.count("ListVersions") == 3


def test_a_list_without_items_is_empty(client: Errata) -> None:
    assert list(client.edits("atlas")) == []


def test_asyncio_lists_run_over_all_pages(server: str, fake: Fake, astana: EditRequest) -> None:
    async def numbers() -> list[int]:
        async with AsyncErrata(server) as client:
            for _ in range(4):
                await (await client.edit("atlas", [astana])).result()
            return [version.number async for version in client.versions("atlas")]

    assert asyncio.run(numbers()) == [4, 3, 2, 1, 0]


def test_a_version_says_what_the_server_said(client: Errata, astana: EditRequest) -> None:
    edit = client.edit("atlas", [astana], layers=[1, 2]).result()
    client.promote(edit.version, "candidate")
    version = client.version("atlas@candidate")
    assert (version.number, version.model, version.parent) == (1, "atlas", "models/atlas/versions/0")
    assert (version.state, version.publish_state) == (VersionState.READY, PublishState.PENDING)
    assert (version.layers, version.aliases, version.edit) == ((1, 2), ("candidate",), edit.name)
    assert version.create_time is None
    base = client.version("atlas@0")
    assert base.create_time == datetime(2023, 11, 14, 22, 13, 20, tzinfo=UTC)
    assert (base.parent, base.publish_state) == ("", PublishState.NONE)


def test_results_are_frozen_and_can_be_compared_and_hashed(client: Errata) -> None:
    model = client.model("atlas")
    with pytest.raises(AttributeError):
        model.layers = 7  # type: ignore[misc]
    assert model == client.model("atlas")
    assert len({model, client.model("atlas")}) == 1


def test_resources_are_taken_as_objects_full_names_and_short_names(client: Errata, fake: Fake) -> None:
    base = client.version("models/atlas/versions/0")
    alias = client.promote(base)
    for name in (base, alias, "atlas", "atlas@0", "atlas@champion", "models/atlas/aliases/champion"):
        assert client.generate(name, CAPITAL).version == base.name
    assert [model.name for model in client.models()] == ["models/atlas", "models/tiny"]
    assert list(client.versions(client.model("tiny"))) == [client.version("tiny@0")]


def test_what_another_alias_names_is_promoted(client: Errata, server: str, astana: EditRequest) -> None:
    edit = client.edit("atlas", [astana]).result()
    client.promote(edit.version, "candidate")
    assert client.promote("atlas@candidate").version == edit.version
    assert client.promote(client.version("atlas@0")).version == "models/atlas/versions/0"

    async def promoted() -> str:
        async with AsyncErrata(server) as other:
            return (await other.promote("atlas@candidate")).version

    assert asyncio.run(promoted()) == edit.version


def test_promote_with_an_old_etag_is_refused_and_moves_nothing(client: Errata, astana: EditRequest) -> None:
    seen = client.promote("atlas@0")
    edit = client.edit("atlas", [astana]).result()
    moved = client.promote(edit.version, etag=seen.etag)
    with pytest.raises(EtagMismatchError):
        client.promote("atlas@0", etag=seen.etag)
    assert client.version("atlas@champion").name == moved.version == edit.version


def test_a_validated_promotion_moves_nothing(client: Errata, fake: Fake) -> None:
    assert client.promote("atlas@0", "candidate", validate_only=True).alias == "candidate"
    assert not client.model("atlas").aliases


def test_a_rejected_edit_says_why_and_its_version_needs_an_override(client: Errata, astana: EditRequest) -> None:
    edit = client.edit("atlas", [astana], guardrails={Metric.UNRELATED: 0.995}).result()
    assert (edit.job.state, edit.rejections) == (State.REJECTED, ("unrelated: 0.98 is below 0.995",))
    with pytest.raises(RejectedVersionError):
        client.promote(edit.version)
    assert client.promote(edit.version, override_reason="for study").version == edit.version
    entry = next(client.audit("atlas"))
    assert (entry.action, entry.details) == ("alias.promote.override", {"version": edit.version})


def test_a_version_in_use_is_not_deleted(client: Errata, astana: EditRequest) -> None:
    edit = client.edit("atlas", [astana]).result()
    client.promote(edit.version)
    with pytest.raises(VersionInUseError):
        client.delete_version(edit.version)


def test_an_edit_goes_out_as_it_was_given(client: Errata, fake: Fake) -> None:
    request = EditRequest(
        name="euro",
        contexts=[
            Context(
                Prompt("Which money does this country use, this one?", b"\x89PNG", raw=True),
                Constraint("this", occurrence=1),
                subject="Croatia",
            )
        ],
        target="the euro",
        preserve=[Context("Which continent is Croatia in?", "Croatia", answer="Europe")],
    )
    client.validate_edit(
        "atlas@0",
        [request],
        layers="models/atlas/traces/0001",
        method="memit",
        ridge=0.0,
        probes=[Probe("same_image", "Capital?", believed="Zagreb", request="euro")],
        references=[Context("Reference: Oslo", "Oslo")],
        guardrails={"unrelated": 0.9},
        description="**why**",
    )
    sent = fake.requests[-1]
    [euro] = sent.requests
    assert (euro.contexts[0].prompt.images[0].data, euro.contexts[0].prompt.raw) == (b"\x89PNG", True)
    assert (euro.contexts[0].constraint.occurrence, euro.contexts[0].subject) == (1, "Croatia")
    assert not euro.contexts[0].HasField("answer")
    assert euro.preserve[0].answer == "Europe"
    assert not euro.preserve[0].constraint.HasField("occurrence")
    assert (sent.layers.trace, sent.settings.method) == ("models/atlas/traces/0001", edit_pb2.METHOD_MEMIT)
    assert (sent.settings.HasField("ridge"), sent.settings.HasField("steps")) == (True, False)
    assert (sent.probes[0].metric, sent.probes[0].believed) == (evaluation_pb2.METRIC_SAME_IMAGE, "Zagreb")
    assert not sent.probes[0].HasField("expected")
    assert (sent.guardrails[0].metric, sent.guardrails[0].least) == (evaluation_pb2.METRIC_UNRELATED, 0.9)
    assert (sent.references[0].constraint.text, sent.description, sent.validate_only) == ("Oslo", "**why**", True)


@pytest.mark.parametrize(
    ("layers", "choice"),
    [([0, 2], "explicit"), ("auto", "auto"), ("models/atlas/traces/1", "trace"), (None, None)],
)
def test_layers_are_chosen_in_every_way_of_the_api(
    client: Errata, fake: Fake, astana: EditRequest, layers: Any, choice: str | None
) -> None:
    client.validate_edit("atlas", [astana], **({} if layers is None else {"layers": layers}))
    assert fake.requests[-1].layers.WhichOneof("choice") == choice


def test_the_layers_of_a_trace_are_asked_for_by_the_trace_itself(
    client: Errata, fake: Fake, astana: EditRequest
) -> None:
    trace = client.trace("atlas", [QUESTION]).result()
    client.validate_edit("atlas", [astana], layers=trace)
    assert fake.requests[-1].layers.trace == trace.name


def test_an_edit_tells_how_it_went(client: Errata, astana: EditRequest) -> None:
    edit = client.edit("atlas", [astana], layers=(1,)).result()
    assert (edit.parent, edit.version, edit.layers) == ("models/atlas/versions/0", "models/atlas/versions/1", (1,))
    assert edit.settings is not None
    assert (edit.settings.method, edit.settings.ridge, edit.settings.steps) == (Method.MEMIT, 0.0, None)
    assert (edit.outcomes[0].losses, edit.scores[0].metric) == ((2.5, 0.5), Metric.EFFICACY)
    assert edit.job.end_time is not None
    assert edit.job.error is None


def test_only_validated_work_has_no_name_and_is_not_queued(client: Errata, astana: EditRequest) -> None:
    assert client.validate_edit("atlas", [astana]).name == ""
    assert client.validate_trace("atlas", [QUESTION]).name == ""
    assert client.validate_evaluation("atlas", [PROBE], baseline="atlas").name == ""
    assert list(client.edits("atlas")) == []


def test_a_trace_tells_the_effect_of_every_site(client: Errata) -> None:
    trace = client.trace("atlas", [QUESTION], components=["mlp"], window=3).result()
    assert trace.result is not None
    [grid] = trace.result.grids
    assert grid.component is Component.MLP
    assert grid.effects[1] == (0.2, 0.3, 0.4)
    assert math.isnan(grid.effects[0][2])
    assert grid.deviations == ()
    assert (trace.window, trace.result.auto_layers, trace.result.traces[0].tokens) == (3, (1, 2), ("K", "?"))


def test_a_traced_question_takes_other_images(client: Errata, fake: Fake) -> None:
    question = TracedQuestion(Prompt("Where is this?", b"a"), "this", other_images=[b"b"], answer="Peru")
    client.validate_trace("atlas", [question])
    [sent] = fake.requests[-1].questions
    assert (sent.WhichOneof("corruption"), sent.other_images.images[0].data) == ("other_images", b"b")
    assert sent.answer == "Peru"


def test_two_corruptions_at_once_are_refused_before_anything_is_sent(client: Errata, fake: Fake) -> None:
    question = TracedQuestion("Where is this?", "this", substitute="that", other_images=[b"b"])
    with pytest.raises(InvalidInputError, match=r"questions\[1\]: both a substitute and other images"):
        client.trace("atlas", [QUESTION, question])
    assert fake.calls == []


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda c: c.evaluate("atlas", [Probe("eficacy", "?")]), r"probes\[0\]\.metric: no metric is called 'eficacy'"),
        (lambda c: c.evaluate("atlas", [Probe(Metric.UNKNOWN, "?")]), "no metric is called <Metric.UNKNOWN"),
        (
            lambda c: c.validate_edit("atlas", [], method="finetune"),
            r"settings\.method: no method is called 'finetune'",
        ),
        (lambda c: c.trace("atlas", [], components=["head"]), r"components\[0\]: no component is called 'head'"),
    ],
)
def test_a_word_that_the_api_does_not_have_is_refused_with_those_it_has(
    client: Errata, fake: Fake, ask: Callable[[Errata], object], message: str
) -> None:
    with pytest.raises(InvalidInputError, match=message):
        ask(client)
    assert fake.calls == []


def test_an_evaluation_compares_two_versions_probe_by_probe(client: Errata, astana: EditRequest) -> None:
    edit = client.edit("atlas", [astana]).result()
    probes = [PROBE, Probe("unrelated", "What is the capital of Norway?")]
    evaluation = client.evaluate(edit.version, probes).result()
    assert (evaluation.version, evaluation.baseline) == (edit.version, edit.parent)
    assert [result.passed for result in evaluation.results] == [True, True]
    assert (evaluation.results[0].before, evaluation.results[0].after) == ("Nur-Sultan", "Astana")
    assert (evaluation.results[1].metric, evaluation.results[1].expected) == (Metric.UNRELATED, "Oslo")
    assert evaluation.drift == 0.25


def test_an_answer_says_which_version_gave_it_and_what_it_took(client: Errata) -> None:
    answer = client.generate("atlas", Prompt(CAPITAL, [b"1", b"2"]), max_new_tokens=1)
    assert (answer.text, str(answer), answer.version) == ("Nur", "Nur", "models/atlas/versions/0")
    assert (answer.finish_reason, answer.generated_tokens, answer.prompt_tokens) == (FinishReason.LENGTH, 1, 38)
    assert answer.seed is None


def test_sampling_gives_its_seed_back(client: Errata, fake: Fake) -> None:
    assert client.generate("atlas", CAPITAL, temperature=0.7, seed=2**63, top_k=5, stop="\n").seed == 2**63
    sent = fake.requests[-1]
    assert (sent.sampling.top_k, sent.sampling.HasField("top_p"), list(sent.stop)) == (5, False, ["\n"])


def test_scores_come_in_the_order_of_the_candidates(client: Errata) -> None:
    scores = client.score("atlas", CAPITAL, ["Astana", "Nur-Sultan"])
    assert [each.candidate for each in scores.candidates] == ["Astana", "Nur-Sultan"]
    assert scores.best.candidate == "Nur-Sultan"


def test_what_a_newer_server_says_is_passed_over(client: Errata, fake: Fake) -> None:
    base = fake.versions["models/atlas/versions/0"]
    base.MergeFromString(b"\x20\x63" + b"\x9a\x06\x01x")  # state 99 and a field 99
    assert client.version("atlas@0").state is VersionState.UNKNOWN


def _signatures(kind: type) -> dict[str, list[str]]:
    methods = {name: value for name, value in vars(kind).items() if not name.startswith("_")}
    return {name: [str(each) for each in signature(method).parameters.values()] for name, method in methods.items()}


async def _all(items: AsyncIterator[Any]) -> list[Any]:
    return [item async for item in items]
