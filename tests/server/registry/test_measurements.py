"""Measurements in MLflow: one finished run each, with numbers, settings and figures, whatever is cut off."""

from datetime import timedelta

import pytest
from publishing import TIME, House

from errata.server.ledger.rows import JobKind, JobRow, JobState
from errata.server.registry.description import LIMIT
from errata.v1 import measurement_pb2

from mlflow import MlflowClient  # isort: skip

FOUND = measurement_pb2.Findings(
    title="Causal trace by *noise*",
    n=2,
    settings=[
        measurement_pb2.FindingsSetting(name="pairs", value="image->last"),
        measurement_pb2.FindingsSetting(name="standard deviation of the embeddings", value="0.2"),
    ],
    numbers=[
        measurement_pb2.MeasuredNumber(name="total effect", value=0.5, unit="probability", n=2, low=0.25, high=0.75),
        measurement_pb2.MeasuredNumber(name="fall, image → last", value=-12, unit="%", n=2),
        measurement_pb2.MeasuredNumber(name="correlation", value=float("nan"), n=1),
    ],
    skipped=["questions[1]: 'Where?' is answered 'here', not 'there'"],
)


def measurement(found: measurement_pb2.Findings = FOUND) -> JobRow:
    planned = measurement_pb2.Measurement(version="models/tiny/versions/3", kind="noise", questions=3)
    return JobRow(
        id="0197", kind=JobKind.MEASUREMENT, model="tiny", version=3, state=JobState.SUCCEEDED, stage="", done=0,
        total=0, request=b"", result=measurement_pb2.Measurement(findings=found, files=["a.png"]).SerializeToString(),
        failure=None, made=None, attempt=1, cancel_requested=False, created_by="ada", create_time=TIME,
        start_time=TIME, end_time=TIME + timedelta(seconds=2), summary=planned.SerializeToString(),
    )  # fmt: skip


def test_a_measurement_is_one_finished_run_with_numbers_settings_and_files(house: House) -> None:
    house.artifacts.write("0197", {"a.png": b"PNG", "numbers.csv": b"name"})
    run_id = house.registry().publish_measurement(measurement())
    [run] = house.runs()
    assert (run.info.run_id, run.info.status) == (run_id, "FINISHED")
    assert run.info.end_time - run.info.start_time == 2000
    assert run.data.metrics == {
        "total effect": 0.5,
        "total effect/low": 0.25,
        "total effect/high": 0.75,
        "total effect/n": 2,
        "fall image to last": -12,
        "fall image to last/n": 2,
        "correlation/n": 1,
    }
    assert run.data.params == {
        "kind": "noise",
        "questions": "3",
        "left out": "1",
        "pairs": "image->last",
        "standard deviation of the embeddings": "0.2",
    }
    assert {k: run.data.tags[k] for k in ("errata.measurement", "errata.kind", "errata.version")} == {
        "errata.measurement": "0197",
        "errata.kind": "noise",
        "errata.version": "3",
    }
    note = run.data.tags["mlflow.note.content"]
    assert r"Causal trace by \*noise\*" in note
    assert "answered 'here'" in note
    assert {file.path for file in house.client.list_artifacts(run_id)} == {"a.png", "numbers.csv"}


def test_a_measurement_is_published_once(house: House) -> None:
    registry = house.registry()
    first = registry.publish_measurement(measurement())
    assert registry.publish_measurement(measurement()) == first
    assert len(house.runs()) == 1


@pytest.mark.parametrize("step", ["log_batch", "log_artifacts", "set_terminated"])
def test_a_publication_that_was_cut_off_is_written_again_whole(
    house: House, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    house.artifacts.write("0197", {"a.png": b"PNG"})

    def cut(*_: object, **__: object) -> None:
        raise ConnectionError("MLflow is down")

    with monkeypatch.context() as broken:
        broken.setattr(MlflowClient, step, cut)
        with pytest.raises(ConnectionError):
            house.registry().publish_measurement(measurement())
    run_id = house.registry().publish_measurement(measurement())
    assert [(run.info.run_id, run.info.status) for run in house.runs()] == [(run_id, "FINISHED")]


def test_a_description_of_many_numbers_is_cut(house: House) -> None:
    found = measurement_pb2.Findings(title="many", numbers=[FOUND.numbers[0]] * 2, skipped=["x" * 150] * 500)
    run_id = house.registry().publish_measurement(measurement(found))
    note = house.client.get_run(run_id).data.tags["mlflow.note.content"]
    assert 1000 < len(note) <= LIMIT
