"""The work of measurements: every kind of the API, on Atlas, with its files."""

import csv
import io
import json
from dataclasses import fields
from typing import Any

import pytest
from house import House, Worker, edit_message, image_message, prompt_message, question, small_edit, succeeded

from errata.editor.measurements.noise import NoiseSettings
from errata.server.conversion import SETTINGS
from errata.server.jobs.measurements import MEASURES
from errata.server.ledger.rows import JobState
from errata.v1 import edit_pb2, measurement_pb2, trace_pb2

BASE = "models/atlas/versions/0"
KINDS = measurement_pb2.CreateMeasurementRequest.DESCRIPTOR.oneofs_by_name["settings"].fields
SMALL: dict[str, Any] = {
    "noise": measurement_pb2.NoiseSettings(noise=5, draws=2, grids=1),
    "constraints": measurement_pb2.ConstraintSettings(components=[1]),
    "windows": measurement_pb2.WindowSettings(windows=[1, 2], components=[1]),
    "attention": measurement_pb2.AttentionSettings(overlays=1, tokens=2),
    "failure": measurement_pb2.FailureSettings(draws=20),
    "knockout": measurement_pb2.KnockoutSettings(pairs=["constraint->last"], window=1),
    "lens": measurement_pb2.LensSettings(max_rows=4),
    "readout": measurement_pb2.ReadoutSettings(neurons=2),
}


def asked(*countries: str, answer: str | None = None, shown: bool = True, **more: Any) -> Any:
    """Questions about capitals by the countries' flags, corrupted by another flag."""
    other = image_message(question("Japan").prompt.images[0])
    request = measurement_pb2.CreateMeasurementRequest(version=BASE, **more)
    for country in countries or ("Estonia", "Kenya"):
        one = question(country, shown=shown)
        made = request.questions.add(prompt=prompt_message(one.prompt), answer=answer)
        made.constraints.add(text=one.constraint.text)
        if shown:
            made.corruptions.add(other_images=trace_pb2.OtherImages(images=[other]))
        else:
            made.corruptions.add(substitute="Norway")
    return request


def found(worker: Worker, request: Any, version: int = 0) -> Any:
    row = succeeded(worker.run(request, version=version))
    return row, measurement_pb2.Measurement.FromString(row.result or b"").findings


@pytest.mark.parametrize("kind", [field.name for field in KINDS])
def test_a_kind_of_the_api_has_the_editors_settings_and_work(kind: str) -> None:
    wire = next(field for field in KINDS if field.name == kind).message_type
    assert [f.name for f in wire.fields] == [f.name for f in fields(SETTINGS[kind])]  # type: ignore[arg-type]
    # Without presence a 0 could not be told from the server's default.
    assert all(f.is_repeated or f.has_presence for f in wire.fields)
    assert kind in MEASURES


def test_no_kind_of_the_editor_is_without_its_api() -> None:
    assert {field.name for field in KINDS} == set(SETTINGS) == set(MEASURES)


@pytest.mark.slow
@pytest.mark.parametrize("kind", sorted(SMALL))
def test_every_kind_is_measured_through_the_service(worker: Worker, house: House, kind: str) -> None:
    request = asked(shown=kind != "noise", **{kind: SMALL[kind]})
    if kind == "failure":
        request.questions[0].answer, request.questions[1].answer = "Tallinn", "Atlantis"
    row, told = found(worker, request)
    assert told.n > 0, told.skipped
    assert told.numbers or told.tables
    folder = house.artifacts.folder(row.id)
    names = {path.name for path in folder.iterdir()}
    assert {f"{plot.name}.{end}" for plot in told.plots for end in ("png", "svg")} < names
    assert set(measurement_pb2.Measurement.FromString(row.result or b"").files) == names
    numbers = list(csv.DictReader(io.StringIO((folder / "numbers.csv").read_text(encoding="utf-8"))))
    assert [n["name"] for n in numbers] == [n.name for n in told.numbers]
    assert json.loads((folder / "findings.json").read_text(encoding="utf-8"))["title"] == told.title
    assert (folder / "page.html").read_text(encoding="utf-8").startswith("<!doctype html>")


@pytest.mark.slow
def test_a_layer_sweep_edits_at_each_layer_and_makes_no_version(worker: Worker, house: House) -> None:
    request = measurement_pb2.CreateMeasurementRequest(version=BASE)
    request.requests.extend(edit_message(small_edit("Estonia", "Latvia")).requests)
    request.sweep.CopyFrom(measurement_pb2.SweepSettings(layers=[1, 4], method=edit_pb2.METHOD_MULTEDIT, steps=12))
    before = house.versions()
    _, told = found(worker, request)
    assert told.n == 2
    [plot] = [p.line_plot for p in told.plots if p.WhichOneof("kind") == "line_plot"]
    efficacy = next(line.values for line in plot.lines if line.label == "efficacy")
    assert list(plot.x) == [1, 4]
    assert efficacy[0] > efficacy[1]
    assert house.versions() == before


@pytest.mark.slow
def test_the_read_out_of_a_version_is_of_its_own_edit(worker: Worker, house: House) -> None:
    made = succeeded(worker.run(edit_message(small_edit("Estonia")))).made
    assert made is not None
    request = asked("Estonia", readout=measurement_pb2.ReadoutSettings())
    _, base = found(worker, request)
    _, version = found(worker, request, version=made)
    layers = {s.name: s.value for s in version.settings}["layers"]
    assert layers == "1"
    assert {s.name: s.value for s in base.settings}["layers"] != layers


@pytest.mark.slow
def test_the_defaults_are_the_editors(worker: Worker) -> None:
    _, told = found(worker, asked("Estonia", shown=False, noise=measurement_pb2.NoiseSettings(noise=5, draws=1)))
    settings = {s.name: s.value for s in told.settings}
    assert settings["min_total_effect"] == f"{NoiseSettings().min_total_effect:g}"
    assert settings["draws"] == "1"


def test_a_question_that_is_answered_otherwise_is_left_out_with_its_reason(worker: Worker) -> None:
    request = asked("Estonia", "Kenya", shown=False, lens=measurement_pb2.LensSettings())
    request.questions[1].answer = "Atlantis"
    _, told = found(worker, request)
    assert told.n == 1
    assert [line.partition(":")[0] for line in told.skipped] == ["questions[1]"]


def test_a_setting_that_only_the_model_can_refuse_is_named_as_in_the_request(worker: Worker) -> None:
    request = asked("Estonia", "Kenya", shown=False, failure=measurement_pb2.FailureSettings(first_layer=99))
    for each in request.questions:
        each.answer = "Nairobi"
    row = worker.run(request)
    assert row.state is JobState.FAILED
    assert row.failure is not None
    assert (row.failure.reason, row.failure.field) == ("LAYER_OUT_OF_RANGE", "failure.first_layer")


def test_a_measurement_of_nothing_fails_and_leaves_no_files(worker: Worker, house: House) -> None:
    row = worker.run(asked("Estonia", answer="Atlantis", lens=measurement_pb2.LensSettings()))
    assert row.state is JobState.FAILED
    assert row.result is None
    with pytest.raises(Exception, match="has no files"):
        house.artifacts.folder(row.id)


def test_whoever_tells_mlflow_is_woken(worker: Worker, house: House) -> None:
    row, _ = found(worker, asked("Estonia", lens=measurement_pb2.LensSettings()))
    tasks = [json.loads(task.payload) for task in house.ledger.tasks_due(row.create_time.replace(year=9000), 100)]
    assert {"measurement": row.id} in tasks
    assert house.published
