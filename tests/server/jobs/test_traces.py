import csv
import io
import json

from house import House, Worker, image_message, succeeded, trace_message
from PIL import Image

from errata.editor.states import Component
from errata.server.jobs.traces import averaged_trace
from errata.server.ledger.rows import JobState
from errata.v1 import trace_pb2


def test_a_trace_finds_where_atlas_looks_its_facts_up(house: House, worker: Worker) -> None:
    row = succeeded(worker.run(trace_message(2)))
    result = trace_pb2.CausalTraceResult.FromString(row.result or b"")
    assert list(result.auto_layers) == [1]
    assert result.total_effect > 0.5
    assert len(result.traces) == 2
    files = house.artifacts.folder(row.id)
    Image.open(io.BytesIO((files / "causal_trace.png").read_bytes())).verify()
    table = list(csv.DictReader(io.StringIO((files / "causal_trace.csv").read_text(encoding="utf-8"))))
    assert {r["component"] for r in table} == {c.value for c in Component}
    assert json.loads((files / "causal_trace.json").read_text(encoding="utf-8"))["auto_layers"] == [1]


def test_a_question_whose_corruption_fails_is_left_out_with_its_reason(worker: Worker) -> None:
    message = trace_message(2)
    _corrupt_by_itself(message.questions[1])
    result = trace_pb2.CausalTraceResult.FromString(succeeded(worker.run(message)).result or b"")
    assert len(result.traces) == 1
    assert len(result.skipped) == 1
    assert result.skipped[0].startswith("questions[1]: the corruption does not corrupt")


def test_a_trace_where_nothing_corrupts_fails(worker: Worker) -> None:
    message = trace_message(1)
    _corrupt_by_itself(message.questions[0])
    row = worker.run(message)
    assert row.state is JobState.FAILED
    assert row.failure is not None
    assert row.failure.reason == "CORRUPTION_FAILED"


def test_a_trace_without_mlps_says_why_it_chooses_no_layers(worker: Worker) -> None:
    message = trace_message(1)
    message.components.append(trace_pb2.COMPONENT_LAYER)
    result = trace_pb2.CausalTraceResult.FromString(succeeded(worker.run(message)).result or b"")
    assert not result.auto_layers
    assert "no MLP component" in result.auto_refusal


def test_a_stored_trace_gives_back_its_average(worker: Worker) -> None:
    result = trace_pb2.CausalTraceResult.FromString(succeeded(worker.run(trace_message(1))).result or b"")
    averaged = averaged_trace(result, window=1)
    grid = next(g for g in result.grids if g.component == trace_pb2.COMPONENT_MLP)
    again = averaged.aie(Component.MLP).ravel()
    assert all(a == b or (a != a and b != b) for a, b in zip(again, grid.effects, strict=True))


def _corrupt_by_itself(question: trace_pb2.TracedQuestion) -> None:
    question.other_images.CopyFrom(trace_pb2.OtherImages(images=question.prompt.images))


def test_an_image_that_cannot_be_decoded_names_its_question(worker: Worker) -> None:
    message = trace_message(2)
    message.questions[1].prompt.images[0].CopyFrom(image_message(Image.new("RGB", (8, 8))))
    message.questions[1].prompt.images[0].data = b"no image"
    row = worker.run(message)
    assert row.failure is not None
    assert row.failure.reason == "INVALID_IMAGE"
    assert row.failure.field.startswith("questions[1].prompt.images[0]")
