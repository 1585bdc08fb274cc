"""Measurements as the client asks for them and reads them."""

import math
from dataclasses import fields
from typing import Any

import pytest
from fake_server import CAPITAL, Fake

from errata.client import (
    Box,
    Component,
    Constraint,
    EditRequest,
    Errata,
    HeatMap,
    InvalidInputError,
    KnockoutSettings,
    LinePlot,
    MeasuredQuestion,
    NoiseSettings,
    NotFoundError,
    OtherImages,
    Overlay,
    Prompt,
    Scatter,
    SweepSettings,
)
from errata.client.measurements import KINDS
from errata.client.measuring import fields_of
from errata.v1 import measurement_pb2

QUESTION = MeasuredQuestion(CAPITAL, "Kazakhstan")


@pytest.mark.parametrize("kind", [f.name for f in measurement_pb2.CreateMeasurementRequest.DESCRIPTOR.oneofs[0].fields])
def test_a_kind_of_the_api_has_its_settings_here(kind: str) -> None:
    assert [f.name for f in fields(KINDS[kind])] == list(fields_of(kind))


def test_a_measurement_tells_numbers_plots_tables_and_what_was_left_out(client: Errata) -> None:
    done = client.measure("atlas", NoiseSettings(draws=5), [QUESTION]).result()
    found = done.findings
    assert found is not None
    assert (done.kind, done.questions, found.n, found.settings) == ("noise", 1, 1, {"draws": "5"})
    total = found.number("total effect")
    assert (total.value, total.low, total.high, total.unit, total.n) == (0.5, 0.25, 0.75, "probability", 1)
    assert found.number("layer of the highest AIE").low is None
    with pytest.raises(KeyError, match="there are total effect, layer of the highest AIE"):
        found.number("effect")
    [plot] = found.plots
    assert isinstance(plot, LinePlot)
    assert plot.lines[0].values[0] == 1
    assert math.isnan(plot.lines[0].values[1])
    assert found.tables[0].rows == (("Oslo", "0.5"),)
    assert len(found.skipped) == 1


def test_a_question_goes_out_as_it_was_given(client: Errata, fake: Fake) -> None:
    asked = MeasuredQuestion(
        Prompt("Does this country use the euro?", b"PNG"),
        ["this country", Constraint("euro", 0)],
        corruptions=[OtherImages(b"other"), "yen"],
        answer="yes",
        box=Box(0, 0.25, 0.5, 1),
        kinds=["visual", "textual"],
    )
    settings = NoiseSettings(noise=3, draws=0, components=["mlp", Component.LAYER])
    client.validate_measurement("atlas@0", settings, [asked, QUESTION])
    request = fake.requests[-1]
    first, second = request.questions
    assert [c.text for c in first.constraints] == ["this country", "euro"]
    assert [c.HasField("occurrence") for c in first.constraints] == [False, True]
    assert [c.WhichOneof("corruption") for c in first.corruptions] == ["other_images", "substitute"]
    assert first.corruptions[0].other_images.images[0].data == b"other"
    assert (first.answer, first.box.top, first.box.right) == ("yes", 0.25, 0.5)
    assert list(first.kinds) == [
        measurement_pb2.CONSTRAINT_KIND_VISUAL,
        measurement_pb2.CONSTRAINT_KIND_TEXTUAL,
    ]
    assert not second.HasField("box")
    assert not second.kinds
    assert [c.text for c in second.constraints] == ["Kazakhstan"]
    assert request.WhichOneof("settings") == "noise"
    assert request.noise == measurement_pb2.NoiseSettings(noise=3, draws=0, components=[1, 3])
    assert request.noise.HasField("draws")
    assert request.request_id
    assert request.validate_only


def test_a_kind_alone_leaves_every_setting_to_the_server(client: Errata, fake: Fake) -> None:
    client.validate_measurement("atlas", "knockout", [QUESTION])
    assert fake.requests[-1].WhichOneof("settings") == "knockout"
    assert fake.requests[-1].knockout == measurement_pb2.KnockoutSettings()


def test_a_layer_sweep_takes_requests(client: Errata, fake: Fake, astana: EditRequest) -> None:
    client.validate_measurement("atlas", SweepSettings(layers=[1, 2], method="rome", keys="mean"), requests=[astana])
    request = fake.requests[-1]
    assert request.requests[0].target == "Astana"
    assert (list(request.sweep.layers), request.sweep.keys) == ([1, 2], measurement_pb2.KEYS_MEAN)


@pytest.mark.parametrize(
    ("settings", "field", "said"),
    [
        ("nois", "settings", "give one of noise, constraints"),
        (Box(0, 0, 1, 1), "settings", "Box are the settings of no measurement"),
        (NoiseSettings(components=["head"]), "noise.components", "give one of mlp, attention, layer"),
        (NoiseSettings(draws="many"), "noise.draws", "'many' cannot be said"),  # type: ignore[arg-type]
        (NoiseSettings(draws=2**40), "noise.draws", "cannot be said"),
        (KnockoutSettings(pairs=[1]), "knockout.pairs", "cannot be said"),  # type: ignore[list-item]
    ],
)
def test_settings_that_the_wire_cannot_say_are_refused_before_anything_is_sent(
    client: Errata, fake: Fake, settings: Any, field: str, said: str
) -> None:
    with pytest.raises(InvalidInputError, match=said) as refused:
        client.measure("atlas", settings, [QUESTION])
    assert refused.value.field == field
    assert fake.calls == []


def test_every_kind_of_plot_is_read_and_what_a_newer_server_draws_is_passed_over(client: Errata, fake: Fake) -> None:
    fake.plots = (
        measurement_pb2.Plot(
            name="map",
            heat_map=measurement_pb2.HeatMap(
                rows=["a", "b"], columns=["0", "1"], grids=[measurement_pb2.HeatMapGrid(label="mlp", values=range(4))]
            ),
        ),
        measurement_pb2.Plot(name="points", scatter=measurement_pb2.Scatter(x=[1], y=[2], labels=["layer 1"])),
        measurement_pb2.Plot(name="over", overlay=measurement_pb2.Overlay(rows=1, columns=2, values=[3, 4])),
        measurement_pb2.Plot(name="newer"),
    )
    findings = client.measure("atlas", "lens", [QUESTION]).result().findings
    assert findings is not None
    heat, points, over = findings.plots
    assert isinstance(heat, HeatMap)
    assert heat.grids[0].values == ((0, 1), (2, 3))
    assert isinstance(points, Scatter)
    assert (points.x, points.y, points.labels) == ((1,), (2,), ("layer 1",))
    assert isinstance(over, Overlay)
    assert over.values == ((3, 4),)


def test_a_file_is_fetched_by_its_name(client: Errata) -> None:
    done = client.measure("atlas", "lens", [QUESTION]).result()
    assert client.measurement_file(done, "aie.png") == b"PNG"
    with pytest.raises(NotFoundError) as refused:
        client.measurement_file(done.name, "other.png")
    assert refused.value.reason == "FILE_NOT_FOUND"


def test_lists_show_measurements_without_waiting(client: Errata) -> None:
    name = client.measure("atlas", "lens", [QUESTION]).name
    assert [each.name for each in client.measurements("atlas")] == [name]
    assert client.operation(client.get_measurement(name)).result().job.state == "succeeded"


def test_a_kind_of_constraint_that_there_is_not_is_refused_before_it_goes_out(client: Errata) -> None:
    asked = MeasuredQuestion(CAPITAL, "Kazakhstan", kinds=["spoken"])
    with pytest.raises(InvalidInputError, match=r"'spoken'; give one of visual, textual") as refused:
        client.validate_measurement("atlas", "knockout", [asked])
    assert refused.value.field == "questions[0].kinds[0]"
