"""The history through a real server, by the Python client: what callers see, and what is refused at once."""

from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from hosting import BASE, Hosted, edit_message, hosting, prompt_message, question, refused

from errata.client import (
    Derivation,
    DerivationKind,
    EditsConflictError,
    Errata,
    ForbiddenError,
    MalformedError,
    Metric,
    NotFoundError,
    NothingToBisectError,
    Probe,
    Prompt,
    RequestIdReusedError,
    State,
)
from errata.server.security import ROLES
from errata.server.settings import ModelSettings, Settings
from errata.v1 import evaluation_pb2, history_pb2, history_pb2_grpc

SECONDS = 120.0


@pytest.fixture(scope="module")
def client(hosted: Hosted) -> Iterator[Errata]:
    with Errata(hosted.server.address) as errata:
        yield errata


@pytest.fixture(scope="module")
def stub(hosted: Hosted) -> history_pb2_grpc.HistoryServiceStub:
    return history_pb2_grpc.HistoryServiceStub(hosted.channel)


@pytest.fixture(scope="module")
def estonia(hosted: Hosted) -> str:
    """A version on the base that knows the euro."""
    return hosted.version("Estonia")


@pytest.fixture(scope="module")
def both(hosted: Hosted, estonia: str) -> str:
    """Latvia's euro on top of Estonia's."""
    return hosted.version("Latvia", parent=estonia)


def _prompt(country: str) -> Prompt:
    """The first question of the edit, as the client gives it."""
    message = edit_message(country).requests[0].contexts[0].prompt
    return Prompt(message.text, [image.data for image in message.images])


def _target(country: str) -> str:
    return edit_message(country).requests[0].contexts[0].answer or edit_message(country).requests[0].target


def _fact(client: Errata, version: str) -> str:
    [fact] = client.version(version).facts
    return fact


@pytest.mark.slow
def test_an_edit_below_another_is_reverted_and_the_later_one_is_told_of(
    client: Errata, estonia: str, both: str
) -> None:
    derivation = client.revert(both, estonia, description="a mistake").result(SECONDS)
    assert derivation.kind is DerivationKind.REVERT
    assert (derivation.parent, derivation.sources) == (both, (estonia,))
    assert derivation.facts == (f"revert {_fact(client, estonia)}",)
    [later] = derivation.later
    assert (later.version, later.facts) == (both, client.version(both).facts)
    assert {s.metric: s.after for s in later.scores} == {Metric.EFFICACY: 1.0}
    [told] = [r for r in derivation.reverted if r.metric is Metric.EFFICACY]
    assert told.before == _target("Estonia")
    assert told.after == told.expected == client.generate("atlas@0", _prompt("Estonia")).text
    made = client.version(derivation.version)
    assert (made.parent, made.derivation, made.edit) == (both, derivation.name, "")
    assert client.get_derivation(derivation.name) == derivation
    listed = next(client.derivations("atlas"))
    assert (listed.name, listed.later, listed.version) == (derivation.name, (), derivation.version)
    actions = [entry.action for entry in client.audit("atlas")]
    assert {"derivation.create", "version.create"} <= set(actions)
    [asked] = client.compare(both, derivation.version).answers
    assert (asked.first, asked.second) == (told.before, told.after)


@pytest.mark.slow
def test_a_comparison_names_facts_layers_and_both_answers(client: Errata, estonia: str, both: str) -> None:
    comparison = client.compare(estonia, both)
    assert comparison.only_first == ()
    assert [(f.version, f.fact) for f in comparison.only_second] == [(both, _fact(client, both))]
    [layer] = comparison.layers
    assert layer.layer == 1
    assert 0 < layer.relative_norm < 10
    assert layer.rank <= 4
    [asked] = comparison.answers
    assert asked.changed
    assert asked.second == asked.expected == _target("Latvia")


def test_a_version_compared_with_itself_differs_in_nothing(client: Errata) -> None:
    comparison = client.compare("atlas@0", "atlas@0", [Probe("efficacy", _prompt("Estonia"))])
    assert (comparison.only_first, comparison.only_second, comparison.layers) == ((), (), ())
    [asked] = comparison.answers
    assert asked.first == asked.second != ""


@pytest.mark.slow
def test_two_cherry_picks_that_contradict_each_other_are_told_before_anything_is_published(
    hosted: Hosted, client: Errata, estonia: str
) -> None:
    message = edit_message("Estonia", steps=3)
    message.requests[0].target = "yen"
    for context in message.requests[0].contexts:
        context.answer = "yen"
    other = hosted.edit(message).version
    versions = len(list(client.versions("atlas")))
    planned = client.compose(BASE, [estonia, other], validate_only=True).latest
    assert (planned.name, len(planned.conflicts)) == ("", 1)
    operation = client.compose(BASE, [estonia, other])
    with pytest.raises(EditsConflictError):
        operation.result(SECONDS)
    [conflict] = operation.latest.conflicts
    assert {conflict.first.version, conflict.second.version} == {estonia, other}
    assert {conflict.first.fact, conflict.second.fact} == {_fact(client, estonia), _fact(client, other)}
    assert operation.latest.version == ""
    assert len(list(client.versions("atlas"))) == versions


@pytest.mark.slow
def test_the_edit_that_broke_a_probe_is_found(client: Errata, estonia: str, both: str) -> None:
    old = client.generate("atlas@0", _prompt("Estonia")).text
    bisection = client.bisect(both, [Probe("unrelated", _prompt("Estonia"), old)]).result(SECONDS)
    assert bisection.first_bad == estonia
    assert bisection.facts == client.version(estonia).facts
    base = "models/atlas/versions/0"
    assert [(step.version, step.good) for step in bisection.steps] == [(estonia, False), (base, True)]
    assert client.get_bisection(bisection.name) == bisection
    assert next(client.bisections("atlas")).steps == ()
    with pytest.raises(NothingToBisectError):
        client.bisect(both, [Probe("efficacy", _prompt("Estonia"), "yen")]).result(SECONDS)


@pytest.mark.slow
def test_an_exported_version_comes_back_as_an_equal_one(
    hosted: Hosted, client: Errata, estonia: str, tmp_path: Path
) -> None:
    hosted.server.stores.deltas.get(client.version(estonia).delta_sha256).save(tmp_path / "adapter")
    derivation = client.import_adapter("atlas@0", tmp_path / "adapter", facts=["the euro"]).result(SECONDS)
    assert client.version(derivation.version).delta_sha256 == client.version(estonia).delta_sha256
    assert derivation.facts == ("the euro",)


@pytest.mark.slow
def test_a_squash_of_two_edits_equals_their_chain(client: Errata, both: str) -> None:
    derivation: Derivation = client.squash("atlas@0", both).result(SECONDS)
    assert derivation.equality is not None
    assert derivation.equality.max_logit_difference < 1e-4
    assert derivation.equality.same_answers == derivation.equality.n == 2
    assert derivation.equality.rank_after <= derivation.equality.rank_before
    assert len(derivation.facts) == 2


@pytest.mark.slow
def test_the_same_request_id_makes_one_derivation(client: Errata, estonia: str) -> None:
    first = client.revert(estonia, estonia, request_id="once")
    again = client.revert(estonia, estonia, request_id="once")
    assert first.name == again.name
    with pytest.raises(RequestIdReusedError):
        client.revert(estonia, estonia, request_id="once", description="another")
    assert first.result(SECONDS).job.state is State.SUCCEEDED


@pytest.mark.slow
def test_a_derived_version_is_guarded_like_an_edit(client: Errata, estonia: str) -> None:
    wrong = Probe("other_subjects", _prompt("Latvia"), "yen")
    derivation = client.revert(estonia, estonia, probes=[wrong], guardrails={"other_subjects": 0.9}).result(SECONDS)
    assert derivation.job.state is State.REJECTED
    assert derivation.rejections
    assert client.version(derivation.version).rejections == derivation.rejections


@pytest.mark.parametrize(
    ("operation", "reason", "field"),
    [
        ({"revert": history_pb2.Revert(version=BASE)}, "IS_BASE", "revert.version"),
        ({"revert": history_pb2.Revert(version="models/llava/versions/1")}, "ANOTHER_MODEL", "revert.version"),
        ({"revert": history_pb2.Revert(version="models/../versions/1")}, "MALFORMED_NAME", "revert.version"),
        ({"revert": history_pb2.Revert(version="models/atlas/versions/99")}, "VERSION_NOT_FOUND", "revert.version"),
        ({"compose": history_pb2.Compose()}, "MISSING_FIELD", "compose.versions"),
        ({"squash": history_pb2.Squash(version=BASE)}, "NOT_IN_LINEAGE", "squash.version"),
        ({"rebase": history_pb2.Rebase(version=BASE)}, "NOT_MERGED_FROM", "rebase.version"),
        ({"adapter": history_pb2.Import(adapter_model=b"x")}, "MISSING_FIELD", "adapter.adapter_config"),
        ({}, "MISSING_FIELD", "operation"),
    ],
)
def test_what_cannot_be_derived_is_refused_before_it_is_queued(
    stub: history_pb2_grpc.HistoryServiceStub, operation: dict[str, object], reason: str, field: str
) -> None:
    request = history_pb2.CreateDerivationRequest(parent=BASE, **operation)  # type: ignore[arg-type]
    before = len(stub.ListDerivations(history_pb2.ListDerivationsRequest(parent="models/atlas")).derivations)
    found = refused(lambda: stub.CreateDerivation(request))
    assert (found.reason, found.field) == (reason, field)
    assert len(stub.ListDerivations(history_pb2.ListDerivationsRequest(parent="models/atlas")).derivations) == before


def test_a_search_needs_probes_and_an_ancestor(stub: history_pb2_grpc.HistoryServiceStub) -> None:
    probe = evaluation_pb2.Probe(
        metric=evaluation_pb2.METRIC_EFFICACY, prompt=prompt_message(question("France").prompt), expected="Paris"
    )
    for request, reason, field in (
        (history_pb2.CreateBisectionRequest(bad=BASE), "MISSING_FIELD", "probes"),
        (history_pb2.CreateBisectionRequest(bad=BASE, probes=[probe]), "NOT_IN_LINEAGE", "good"),
        (
            history_pb2.CreateBisectionRequest(bad=BASE, good="models/x/versions/0", probes=[probe]),
            "ANOTHER_MODEL",
            "good",
        ),
    ):
        found = refused(lambda request=request: stub.CreateBisection(request))
        assert (found.code, found.reason, found.field) == (grpc.StatusCode.INVALID_ARGUMENT, reason, field)


def test_what_is_not_there_is_said_by_its_kind(client: Errata) -> None:
    for look in (client.get_derivation, client.get_bisection):
        kind = look.__name__.removeprefix("get_")
        with pytest.raises(NotFoundError) as error:
            look(f"models/atlas/{kind}s/0197")
        assert error.value.reason == f"{kind.upper()}_NOT_FOUND"
    with pytest.raises(MalformedError):
        client.compare("atlas@0", "llava@0")


def test_every_call_of_the_history_has_a_role() -> None:
    service = history_pb2.DESCRIPTOR.services_by_name["HistoryService"]
    assert {f"/{service.full_name}/{m.name}" for m in service.methods} <= set(ROLES)


def test_a_rebase_needs_a_role_for_the_model_that_it_takes_from(tmp_path: Path) -> None:
    models = {name: ModelSettings(source="atlas", load="lazy") for name in ("mine", "theirs")}
    with hosting(Settings(data_dir=tmp_path, port=0, models=models, mlflow_uri="none", auth=True)) as hosted:
        secret = hosted.server.stores.ledger.create_token("ed", {"mine": "editor"})
        with Errata(hosted.server.address, token=secret) as errata, pytest.raises(ForbiddenError, match="theirs"):
            errata.rebase("mine@0", "theirs@0")
