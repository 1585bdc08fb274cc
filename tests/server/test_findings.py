"""Measurements between the wire and the editor: images that are pinned, and every kind of plot on its way out."""

import math
from pathlib import Path

import numpy as np
from PIL import Image

from errata.editor.measurements.findings import (
    Findings,
    Grid,
    HeatMap,
    Line,
    LinePlot,
    Number,
    Overlay,
    Scatter,
    Table,
)
from errata.server.conversion import Decoder
from errata.server.conversion.findings import findings_message
from errata.server.images import ImagePolicy
from errata.v1 import common_pb2, measurement_pb2, trace_pb2

PICTURE = Image.new("RGB", (8, 8))


def test_the_images_of_questions_and_corruptions_are_kept_with_the_request(tmp_path: Path) -> None:
    PICTURE.save(tmp_path / "flag.png")
    by_uri = common_pb2.Image(uri=(tmp_path / "flag.png").as_uri())
    request = measurement_pb2.CreateMeasurementRequest(version="models/atlas", lens=measurement_pb2.LensSettings())
    asked = request.questions.add(prompt=common_pb2.Prompt(text="What is this?", images=[by_uri]))
    asked.constraints.add(text="this")
    asked.corruptions.add(other_images=trace_pb2.OtherImages(images=[by_uri]))
    decoder = Decoder(ImagePolicy(schemes=frozenset({"file"}), folders=(tmp_path,)))
    pinned = decoder.pinned(request)
    (tmp_path / "flag.png").unlink()
    [question] = decoder.measurement(pinned).questions
    [corruption] = question.corruptions
    assert [image.size for image in (*question.prompt.images, *corruption.images)] == [(8, 8), (8, 8)]  # type: ignore[union-attr]


def test_everything_that_is_found_is_told() -> None:
    gap = np.array([0.5, math.nan])
    line = Line(label="mlp", values=gap, low=gap - 1, high=gap + 1)
    findings = Findings(
        kind="noise",
        title="All",
        settings={"draws": "5"},
        n=3,
        numbers=(
            Number(name="a", value=0.5, unit="share", n=3, low=0.0, high=1.0),
            Number(name="b", value=2, unit="layer", n=3),
        ),
        plots=(
            LinePlot(
                name="lines", title="Lines", x_label="layer", y_label="p", x=np.arange(2.0),
                lines=(line, Line(label="bare", values=gap)), caption="said",
            ),
            HeatMap(
                name="map", title="Map", x_label="layer", y_label="token", unit="p", rows=("a", "b"), columns=("0",),
                grids=(Grid(label="mlp", values=gap[:, None]),),
            ),
            Scatter(
                name="points", title="Points", x_label="x", y_label="y", x=np.arange(2.0), y=np.ones(2),
                labels=("0", "1"),
            ),
            Overlay(name="over", title="Over", unit="norm", image=PICTURE, patches=np.arange(6.0).reshape(2, 3)),
        ),
        tables=(Table(name="words", title="Words", columns=("token", "p"), rows=(("Oslo", "0.5"),)),),
        skipped=("questions[1]: why",),
    )  # fmt: skip
    told = findings_message(findings)
    lines, heat, points, over = told.plots
    assert (lines.name, lines.caption, list(lines.line_plot.x)) == ("lines", "said", [0, 1])
    first, bare = lines.line_plot.lines
    assert (first.values[0], first.low[0], first.high[0], list(bare.low)) == (0.5, -0.5, 1.5, [])
    assert math.isnan(first.values[1])
    assert heat.heat_map.grids[0].values[0] == 0.5
    assert (list(heat.heat_map.rows), list(heat.heat_map.columns)) == (["a", "b"], ["0"])
    assert (list(points.scatter.y), list(points.scatter.labels)) == ([1, 1], ["0", "1"])
    assert (over.overlay.rows, over.overlay.columns, list(over.overlay.values)) == (2, 3, [0, 1, 2, 3, 4, 5])
    bounded, plain = told.numbers
    assert (bounded.low, bounded.HasField("low"), plain.HasField("low")) == (0, True, False)
    assert [list(row.cells) for row in told.tables[0].rows] == [["Oslo", "0.5"]]
    assert ([(s.name, s.value) for s in told.settings], list(told.skipped)) == (
        [("draws", "5")],
        ["questions[1]: why"],
    )
