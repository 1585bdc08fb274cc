"""Measurements over the wire: asked for, watched, looked up, cancelled, and their files."""

import io

import grpc
import pytest
from hosting import BASE, SECONDS, Hosted, measurement_message, refused
from PIL import Image

from errata.v1 import common_pb2, measurement_pb2

ATLAS = "models/atlas"
NOISE = measurement_pb2.NoiseSettings(draws=2, noise=5, components=[1], grids=0)
LENS = measurement_pb2.LensSettings()


@pytest.fixture(scope="session")
def measured(hosted: Hosted) -> measurement_pb2.Measurement:
    """A measurement that succeeded."""
    return _measured(hosted, measurement_message("Estonia", lens=LENS))


def _measured(hosted: Hosted, request: measurement_pb2.CreateMeasurementRequest) -> measurement_pb2.Measurement:
    made = hosted.call.measurements.CreateMeasurement(request).measurement
    watch = measurement_pb2.WatchMeasurementRequest(name=made.name)
    *_, last = hosted.call.measurements.WatchMeasurement(watch, timeout=SECONDS)
    assert last.measurement.job.state == common_pb2.STATE_SUCCEEDED, last.measurement.job.error
    return last.measurement


@pytest.mark.slow
def test_a_measurement_is_watched_to_its_end_and_tells_numbers_plots_and_settings(hosted: Hosted) -> None:
    made = hosted.call.measurements.CreateMeasurement(measurement_message("Estonia", "Kenya", noise=NOISE)).measurement
    assert (made.version, made.kind, made.questions) == (BASE, "noise", 2)
    watch = measurement_pb2.WatchMeasurementRequest(name=made.name)
    *before, last = (w.measurement for w in hosted.call.measurements.WatchMeasurement(watch, timeout=SECONDS))
    assert last.job.state == common_pb2.STATE_SUCCEEDED, last.job.error
    assert all(m.job.state in (common_pb2.STATE_PENDING, common_pb2.STATE_RUNNING) for m in before)
    found = last.findings
    assert found.n == 2
    assert {s.name: s.value for s in found.settings}["draws"] == "2"
    total = next(n for n in found.numbers if n.name == "total effect")
    assert total.n == 2
    assert total.low <= total.value <= total.high
    assert {p.WhichOneof("kind") for p in found.plots} == {"line_plot", "heat_map"}
    lines = next(p.line_plot for p in found.plots if p.WhichOneof("kind") == "line_plot")
    assert [len(line.values) for line in lines.lines] == [len(lines.x)]
    assert (
        hosted.call.measurements.GetMeasurement(measurement_pb2.GetMeasurementRequest(name=made.name)).measurement
        == last
    )


def test_every_plot_has_its_figure_and_the_numbers_their_table(
    hosted: Hosted, measured: measurement_pb2.Measurement
) -> None:
    def read(file: str) -> bytes:
        asked = measurement_pb2.GetMeasurementFileRequest(name=measured.name, file=file)
        return hosted.call.measurements.GetMeasurementFile(asked).data

    assert measured.findings.plots
    for plot in measured.findings.plots:
        Image.open(io.BytesIO(read(f"{plot.name}.png"))).verify()
        assert b"<svg" in read(f"{plot.name}.svg")
    assert {"findings.json", "numbers.csv", "page.html"} <= set(measured.files)
    assert read("numbers.csv").decode().splitlines()[0] == "name,value,low,high,unit,n"
    assert read("page.html").startswith(b"<!doctype html>")


@pytest.mark.parametrize("file", ["other.png", "../ledger.sqlite", "", "page.html/"])
def test_a_file_that_a_measurement_has_not_is_refused(
    hosted: Hosted, measured: measurement_pb2.Measurement, file: str
) -> None:
    asked = measurement_pb2.GetMeasurementFileRequest(name=measured.name, file=file)
    call = refused(lambda: hosted.call.measurements.GetMeasurementFile(asked))
    assert (call.code, call.reason, call.field) == (grpc.StatusCode.NOT_FOUND, "FILE_NOT_FOUND", "file")


@pytest.mark.slow
def test_a_list_shows_what_was_asked_and_leaves_out_what_was_found(hosted: Hosted) -> None:
    done = _measured(hosted, measurement_message("Estonia", "Kenya", lens=LENS))
    listed = hosted.call.measurements.ListMeasurements(
        measurement_pb2.ListMeasurementsRequest(parent=ATLAS, page_size=1)
    ).measurements[0]
    done.ClearField("findings")
    done.ClearField("files")
    assert listed == done


def test_the_same_request_id_returns_the_first_measurement(hosted: Hosted) -> None:
    request = measurement_message("Estonia", noise=NOISE, request_id="measured-once")
    first = hosted.call.measurements.CreateMeasurement(request).measurement
    assert hosted.call.measurements.CreateMeasurement(request).measurement.name == first.name
    request.noise.draws = 3
    other = refused(lambda: hosted.call.measurements.CreateMeasurement(request))
    assert other.reason == "REQUEST_ID_REUSED"


def test_a_measurement_that_is_only_validated_is_not_queued(hosted: Hosted) -> None:
    request = measurement_message("Estonia", noise=NOISE, validate_only=True)
    planned = hosted.call.measurements.CreateMeasurement(request).measurement
    assert (planned.name, planned.version, planned.kind, planned.questions) == ("", BASE, "noise", 1)


@pytest.mark.slow
def test_a_running_measurement_is_cancelled(hosted: Hosted) -> None:
    request = measurement_message("Estonia", noise=measurement_pb2.NoiseSettings(draws=100))
    request.questions.extend([request.questions[0]] * 200)
    made = hosted.call.measurements.CreateMeasurement(request).measurement
    watch = measurement_pb2.WatchMeasurementRequest(name=made.name)
    watched = hosted.call.measurements.WatchMeasurement(watch, timeout=SECONDS)
    next(w for w in watched if w.measurement.job.progress.stage == "measuring")
    hosted.call.measurements.CancelMeasurement(measurement_pb2.CancelMeasurementRequest(name=made.name))
    *_, last = watched
    assert last.measurement.job.state == common_pb2.STATE_CANCELLED
    assert not last.measurement.HasField("findings")


def _bad(change: str) -> measurement_pb2.CreateMeasurementRequest:
    request = measurement_message("Estonia", noise=NOISE)
    [asked] = request.questions
    match change:
        case "no settings":
            request.ClearField("noise")
        case "no questions":
            del request.questions[:]
        case "too many questions":
            request.questions.extend([asked] * 500)
        case "no prompt":
            asked.ClearField("prompt")
        case "no constraint":
            del asked.constraints[:]
        case "constraint not there":
            asked.constraints[0].text = "this contry"
        case "overlapping constraints":
            asked.constraints.add(text="of Estonia")
        case "a corruption too many":
            asked.corruptions.add(substitute="Paris")
            asked.corruptions.add(substitute="Rome")
        case "an empty corruption":
            asked.corruptions.add()
        case "no other image":
            asked.corruptions.add().other_images.SetInParent()
        case "a blank answer":
            asked.answer = " "
        case "a box outside":
            asked.box.CopyFrom(measurement_pb2.Box(left=0.5, top=0, right=1.5, bottom=1))
        case "a kind too many":
            asked.kinds.extend([1, 2])
        case "an unknown kind":
            asked.kinds.append(9)  # type: ignore[arg-type]
        case "no draws":
            request.noise.draws = 0
        case "too many draws":
            request.noise.draws = 10_001
        case "infinite noise":
            request.noise.noise = float("inf")
        case "a component twice":
            request.noise.components.extend([1, 1])
        case "unknown component":
            request.noise.components.append(99)  # type: ignore[arg-type]
        case "unknown flow":
            request.attention.flows.append("here:there")
        case "unknown pair":
            request.knockout.pairs.append("here->there")
        case "a control character":
            request.knockout.pairs.append("image\x00->last")
    return request


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ("no settings", "settings"),
        ("no questions", "questions"),
        ("too many questions", "questions"),
        ("no prompt", "questions[0].prompt"),
        ("no constraint", "questions[0].constraints"),
        ("constraint not there", "questions[0].constraints[0].text"),
        ("overlapping constraints", "questions[0].constraints[1]"),
        ("a corruption too many", "questions[0].corruptions"),
        ("an empty corruption", "questions[0].corruptions[0].corruption"),
        ("no other image", "questions[0].corruptions[0].other_images.images"),
        ("a blank answer", "questions[0].answer"),
        ("a box outside", "questions[0].box"),
        ("a kind too many", "questions[0].kinds"),
        ("an unknown kind", "questions[0].kinds[0]"),
        ("no draws", "noise.draws"),
        ("too many draws", "noise.draws"),
        ("infinite noise", "noise.noise"),
        ("a component twice", "noise.components"),
        ("unknown component", "noise.components[1]"),
        ("unknown flow", "attention.flows"),
        ("unknown pair", "knockout.pairs"),
        ("a control character", "knockout.pairs[0]"),
    ],
)
def test_what_cannot_be_measured_is_refused_and_named(hosted: Hosted, change: str, field: str) -> None:
    request = _bad(change)
    call = refused(lambda: hosted.call.measurements.CreateMeasurement(request))
    assert (call.code, call.field) == (grpc.StatusCode.INVALID_ARGUMENT, field), call.message
