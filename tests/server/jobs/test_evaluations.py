import json

import pytest
from house import House, Worker, edit_message, probe_message, question, small_edit, succeeded, working

from errata.editor.atlas.world import Attribute
from errata.server.ledger.rows import JobState
from errata.v1 import evaluation_pb2


@pytest.fixture(scope="module")
def child(house: House) -> int:
    """A version that says that Estonia pays in euros."""
    with working(house) as worker:
        return succeeded(worker.run(edit_message(small_edit("Estonia"), steps=40))).made or 0


def _evaluation(version: int, baseline: int = 0) -> evaluation_pb2.CreateEvaluationRequest:
    about_money = question("Estonia", Attribute.CURRENCY).prompt
    return evaluation_pb2.CreateEvaluationRequest(
        version=f"models/atlas/versions/{version}",
        baseline=f"models/atlas/versions/{baseline}",
        probes=[
            probe_message(about_money, "euro"),
            probe_message(question("Japan").prompt, metric=evaluation_pb2.METRIC_OTHER_SUBJECTS),
        ],
    )


def _result(worker: Worker, message: evaluation_pb2.CreateEvaluationRequest, version: int) -> evaluation_pb2.Evaluation:
    return evaluation_pb2.Evaluation.FromString(succeeded(worker.run(message, version=version)).result or b"")


def test_a_version_is_compared_with_its_baseline(worker: Worker, child: int) -> None:
    result = _result(worker, _evaluation(child), child)
    assert result.baseline == "models/atlas/versions/0"
    first = result.results[0]
    assert (first.before, first.after, first.passed) == ("kroon", "euro", True)
    assert [(s.metric, s.before, s.after) for s in result.scores] == [
        (evaluation_pb2.METRIC_EFFICACY, 0.0, 1.0),
        (evaluation_pb2.METRIC_OTHER_SUBJECTS, 1.0, 1.0),
    ]


def test_the_baseline_may_be_the_later_version(worker: Worker, child: int) -> None:
    result = _result(worker, _evaluation(0, child), 0)
    assert (result.results[0].before, result.results[0].after) == ("euro", "kroon")


def test_a_version_does_not_drift_from_itself(worker: Worker, child: int) -> None:
    result = _result(worker, _evaluation(child, child), child)
    assert result.drift == 0.0


def test_an_edited_version_drifts_from_the_base(worker: Worker, child: int) -> None:
    assert _result(worker, _evaluation(child), child).drift > 0.0


def test_an_evaluation_below_its_guardrail_is_rejected_and_keeps_its_results(worker: Worker) -> None:
    message = _evaluation(0)
    message.guardrails.add(metric=evaluation_pb2.METRIC_EFFICACY, least=0.5)
    row = worker.run(message)
    assert row.state is JobState.REJECTED
    result = evaluation_pb2.Evaluation.FromString(row.result or b"")
    assert list(result.rejections) == ["efficacy 0.00 is below 0.50 (n = 1)"]
    assert len(result.results) == 2


def test_the_answers_are_left_as_a_page_and_a_table(house: House, worker: Worker, child: int) -> None:
    row = succeeded(worker.run(_evaluation(child), version=child))
    folder = house.artifacts.folder(row.id)
    assert {p.name for p in folder.iterdir()} == {"before_after.html", "before_after.json", "scores.json"}
    assert json.loads((folder / "scores.json").read_text(encoding="utf-8"))["scores"][0]["after"] == 1.0
