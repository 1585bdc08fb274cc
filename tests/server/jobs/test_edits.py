"""Edits of Atlas, small: two facts at most, few contexts, few references."""

import io
import json
from dataclasses import replace

import pytest
from google.protobuf.json_format import Parse
from house import (
    LAYER,
    House,
    Worker,
    context_message,
    edit_message,
    fact,
    probe_message,
    question,
    small_edit,
    succeeded,
    trace_message,
    working,
)
from PIL import Image

from errata.editor.atlas.world import Attribute
from errata.editor.checkpoints import load_model
from errata.editor.delta import applied
from errata.editor.evaluation import Metric
from errata.editor.methods import edit
from errata.server.jobs.earlier import earlier_edits
from errata.server.jobs.edits import own_probes
from errata.server.jobs.lineages import Lineages
from errata.server.ledger.rows import JobKind, JobRow, JobState, PublishState
from errata.v1 import edit_pb2, evaluation_pb2, trace_pb2


def _outcome(row: JobRow) -> edit_pb2.Edit:
    return edit_pb2.Edit.FromString(row.result or b"")


def _answer(house: House, number: int, country: str, attribute: Attribute) -> str:
    """What a version says about a country's flag."""
    loaded = house.models.get("atlas")
    with loaded.borrow() as model, applied(model, *loaded.deltas_of(number)):
        return model.generate([question(country, attribute).prompt])[0].text


@pytest.fixture(scope="module")
def edited(house: House) -> JobRow:
    """One edit by the server's defaults: AUTO layers, MEMIT, guardrails that it passes."""
    message = edit_message(
        small_edit("Estonia", "Latvia", contexts=4, preserve=1),
        layers=None,
        method=edit_pb2.METHOD_UNSPECIFIED,
        steps=40,
    )
    message.guardrails.add(metric=evaluation_pb2.METRIC_EFFICACY, least=1.0)
    message.probes.append(probe_message(question("Japan").prompt, metric=evaluation_pb2.METRIC_OTHER_SUBJECTS))
    with working(house) as worker:
        return succeeded(worker.run(message))


@pytest.mark.slow
def test_auto_edits_the_layer_where_atlas_looks_its_facts_up(edited: JobRow) -> None:
    assert LAYER in _outcome(edited).layers


def test_the_version_gives_the_new_answer_and_the_base_the_old_one(house: House, edited: JobRow) -> None:
    assert edited.made is not None
    assert _answer(house, edited.made, "Estonia", Attribute.CURRENCY) == "euro"
    assert _answer(house, 0, "Estonia", Attribute.CURRENCY) == "kroon"


def test_the_ledger_holds_what_the_edit_did(house: House, edited: JobRow) -> None:
    outcome, version = _outcome(edited), house.ledger.version("atlas", edited.made or 0)
    assert [o.before for o in outcome.outcomes] == ["kroon", "lats"]
    assert outcome.settings.method == edit_pb2.METHOD_MEMIT
    assert (outcome.scores[0].metric, outcome.scores[0].after) == (evaluation_pb2.METRIC_EFFICACY, 1.0)
    assert version.parent == 0
    assert version.edit == edited.id
    assert version.layers == tuple(outcome.layers)
    assert version.facts == ("Estonia: currency → euro", "Latvia: currency → euro")
    assert version.base_sha256 == house.models.get("atlas").base.base_sha256
    assert version.publish_state is PublishState.PENDING
    assert house.deltas.get(version.delta_sha256).nbytes == version.delta_bytes


def test_the_edit_leaves_its_report_figures_tables_and_request(house: House, edited: JobRow) -> None:
    folder = house.artifacts.folder(edited.id)
    assert {p.name for p in folder.iterdir()} == {
        "report.html",
        "causal_trace.png",
        "before_after.html",
        "before_after.json",
        "request.json",
        "scores.json",
    }
    Image.open(io.BytesIO((folder / "causal_trace.png").read_bytes())).verify()
    assert "data:image/webp" in (folder / "before_after.html").read_text(encoding="utf-8")
    assert "Estonia" in (folder / "report.html").read_text(encoding="utf-8")
    table = json.loads((folder / "before_after.json").read_text(encoding="utf-8"))
    rows = [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]
    assert ("kroon", "euro", True) in [(r["before"], r["after"], r["passed"]) for r in rows]


def test_the_stored_request_can_be_sent_again(house: House, edited: JobRow) -> None:
    text = (house.artifacts.folder(edited.id) / "request.json").read_text(encoding="utf-8")
    assert Parse(text, edit_pb2.CreateEditRequest()) == edit_pb2.CreateEditRequest.FromString(edited.request)


def test_the_base_is_bit_identical_after_edits(house: House, edited: JobRow) -> None:
    fresh = dict(load_model("atlas").model.state_dict())
    ours = house.models.get("atlas").base.model.state_dict()
    assert all(bool((ours[name] == tensor).all()) for name, tensor in fresh.items())


def test_an_edit_on_a_version_is_judged_beside_that_version(house: House, worker: Worker, edited: JobRow) -> None:
    number = edited.made or 0
    again = edit_message(small_edit("Estonia"), target="kroon", steps=40)
    row = succeeded(worker.run(again, version=number))
    assert _outcome(row).outcomes[0].before == "euro"
    assert house.ledger.version("atlas", row.made or 0).parent == number
    assert len(house.models.get("atlas").deltas_of(row.made or 0)) == 2
    assert _answer(house, row.made or 0, "Estonia", Attribute.CURRENCY) == "kroon"


def test_two_edits_of_one_parent_are_two_children(house: House, worker: Worker) -> None:
    rows = [succeeded(worker.run(edit_message(small_edit(country)))) for country in ("Croatia", "Bulgaria")]
    assert [house.ledger.version("atlas", r.made or 0).parent for r in rows] == [0, 0]


def test_the_same_edit_twice_shares_one_stored_delta(house: House, worker: Worker) -> None:
    rows = [succeeded(worker.run(edit_message(small_edit(contexts=2)))) for _ in range(2)]
    assert len({house.ledger.version("atlas", r.made or 0).delta_sha256 for r in rows}) == 1


def test_an_edit_below_a_guardrail_is_kept_as_rejected_and_says_why(house: House, worker: Worker) -> None:
    message = edit_message(small_edit("Estonia", contexts=2), steps=1)
    message.guardrails.add(metric=evaluation_pb2.METRIC_EFFICACY, least=0.9)
    row = worker.run(message)
    assert row.state is JobState.REJECTED
    version = house.ledger.version("atlas", row.made or 0)
    assert version.rejections == ("efficacy 0.00 is below 0.90 (n = 1)",)
    assert tuple(_outcome(row).rejections) == version.rejections


def test_an_edit_to_the_present_answer_is_refused(worker: Worker) -> None:
    row = worker.run(edit_message(small_edit("Estonia", contexts=2), target="kroon"))
    assert row.state is JobState.FAILED
    assert row.failure is not None
    assert (row.failure.reason, row.failure.field) == ("NO_OP_EDIT", "requests[0].target")


def test_a_model_without_references_says_how_to_configure_them(worker: Worker) -> None:
    message = edit_message(small_edit(contexts=2), method=edit_pb2.METHOD_MEMIT)
    message.parent = "models/bare/versions/0"
    row = worker.run(message, model="bare")
    assert row.state is JobState.FAILED
    assert row.failure is not None
    assert (row.failure.reason, row.failure.field) == ("REFERENCES_MISSING", "references")
    assert "models.bare.references" in row.failure.message


def test_a_request_may_bring_its_own_references(house: House, worker: Worker) -> None:
    message = edit_message(small_edit(contexts=2), method=edit_pb2.METHOD_MEMIT)
    message.parent = "models/bare/versions/0"
    message.references.extend(context_message(question(c)) for c in ("Japan", "France"))
    succeeded(worker.run(message, model="bare"))


@pytest.mark.slow
def test_layers_can_come_from_a_trace(house: House, worker: Worker) -> None:
    traced = succeeded(worker.run(trace_message(1)))
    message = edit_message(small_edit(contexts=2))
    message.layers.trace = f"models/atlas/traces/{traced.id}"
    row = succeeded(worker.run(message))
    found = trace_pb2.CausalTraceResult.FromString(traced.result or b"")
    assert list(_outcome(row).layers) == list(found.auto_layers)
    assert (house.artifacts.folder(row.id) / "causal_trace.png").is_file()


def test_a_trace_that_has_not_ended_gives_no_layers(house: House, worker: Worker) -> None:
    waiting = house.create(trace_message(1))
    house.ledger.request_cancel(JobKind.TRACE, "atlas", waiting.id, "tester")
    message = edit_message(small_edit(contexts=2))
    message.layers.trace = f"models/atlas/traces/{waiting.id}"
    row = worker.run(message)
    assert row.failure is not None
    assert (row.failure.reason, row.failure.field) == ("TRACE_NOT_DONE", "layers.trace")


def test_every_edit_is_judged_by_its_first_questions_and_what_it_preserves() -> None:
    request = small_edit("Estonia", contexts=4, preserve=2)[0]
    probes = own_probes([request])
    assert [(p.metric, p.expected, p.believed) for p in probes] == [
        (Metric.EFFICACY, fact("Estonia").target, None),
        *((Metric.SAME_IMAGE, None, c.answer) for c in request.preserve),
    ]
    assert {p.request for p in probes} == {request.name}


def test_the_next_edit_holds_what_the_version_has(house: House, worker: Worker, edited: JobRow) -> None:
    assert edited.made is not None
    message = edit_message(small_edit("Croatia", contexts=2), method=edit_pb2.METHOD_MEMIT, steps=4)
    row = succeeded(worker.run(message, version=edited.made))
    earlier = earlier_edits(
        Lineages(house.ledger), house.decoder, "atlas", edited.made, house.models.get("atlas").keys_folder
    )
    assert [r.subjects for r in earlier.requests] == [{"Estonia"}, {"Latvia"}]
    order = house.decoder.edit(message)
    loaded = house.models.get("atlas")
    with loaded.borrow() as model:
        settings = replace(order.settings, layers=(LAYER,))
        statistics = loaded.statistics(model, (LAYER,), loaded.references)
        held, free = (
            edit(model, order.requests, settings, statistics, parent=loaded.composed(edited.made), earlier=e).delta
            for e in (earlier, None)
        )
    assert row.made is not None
    assert house.ledger.version("atlas", row.made).delta_sha256 == held.sha256 != free.sha256
