"""Figures and pages of findings say what the numbers say, and can be made of any text and any numbers."""

import base64
import io
import re
from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations, pairwise

import numpy as np
import pytest
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

from errata.editor.measurements.drawing import captioned, draw, page, plate, png, section, svg
from errata.editor.measurements.findings import (
    Findings,
    Grid,
    HeatMap,
    Line,
    LinePlot,
    Number,
    Overlay,
    Plot,
    Scatter,
    Table,
)

HOSTILE = "<script>alert(1)</script>$\\frac{"


def line_plot(*lines: Line, n: int = 6, title: str = "Knockout", caption: str = "n = 7 questions") -> LinePlot:
    return LinePlot(
        name="knockout", title=title, x_label="layer", y_label="p(answer)", x=np.arange(float(n)), lines=lines,
        caption=caption,
    )  # fmt: skip


def line(label: str, values: Sequence[float], *, half: float | None = None) -> Line:
    at = np.array(values, dtype=float)
    return Line(label=label, values=at) if half is None else Line(label=label, values=at, low=at - half, high=at + half)


def heat_map(*grids: NDArray[np.float64], rows: Sequence[str] = (), columns: Sequence[str] = ()) -> HeatMap:
    down, across = grids[0].shape
    return HeatMap(
        name="effects", title="Effects", x_label="layer", y_label="token", unit="indirect effect",
        rows=tuple(rows) or tuple(f"t{i}" for i in range(down)),
        columns=tuple(columns) or tuple(map(str, range(across))),
        grids=tuple(Grid(label=f"panel {i}", values=g) for i, g in enumerate(grids)),
    )  # fmt: skip


def scatter(x: Sequence[float], y: Sequence[float], labels: Sequence[str]) -> Scatter:
    return Scatter(
        name="sweep", title="Sweep", x_label="AIE", y_label="efficacy", x=np.array(x, dtype=float),
        y=np.array(y, dtype=float), labels=tuple(labels),
    )  # fmt: skip


def overlay(patches: NDArray[np.float64], size: tuple[int, int] = (60, 40)) -> Overlay:
    return Overlay(name="patches", title="Patches", unit="norm", image=Image.new("RGB", size, "red"), patches=patches)


def findings(*plots: Plot, **more: object) -> Findings:
    given = {"kind": "knockout", "title": "Attention knockout", "settings": {"window": "9 layers"}, "n": 7}
    return Findings(**(given | {"plots": plots} | more))  # type: ignore[arg-type]


def words(figure: Figure) -> str:
    figure.draw_without_rendering()
    return "\n".join(t.get_text() for t in figure.findobj(lambda a: hasattr(a, "get_text")))  # type: ignore[attr-defined]


EVERY_KIND: tuple[Plot, ...] = (
    line_plot(line("a", [0.1, 0.2], half=0.05), n=2),
    heat_map(np.array([[0.1, np.nan], [0.2, -0.4]])),
    scatter([0, 1], [1, 0], ["layer 0", ""]),
    overlay(np.array([[0.1, 0.9]])),
)


def test_lines_and_their_intervals_are_those_given() -> None:
    axes = draw(line_plot(line("image", [0.1, 0.2, 0.3], half=0.05), line("last", [0.5, 0.6, 0.4]), n=3)).axes[0]
    first, second = axes.lines
    np.testing.assert_allclose(first.get_ydata(), [0.1, 0.2, 0.3])
    np.testing.assert_allclose(second.get_ydata(), [0.5, 0.6, 0.4])
    bars = axes.collections[0].get_paths()
    np.testing.assert_allclose([p.vertices[:, 1] for p in bars], [[0.05, 0.15], [0.15, 0.25], [0.25, 0.35]])


def test_many_points_have_bands_and_the_caption_says_so() -> None:
    figure = draw(line_plot(line("image", np.linspace(0, 1, 32).tolist(), half=0.1), n=32))
    [band] = figure.axes[0].collections
    assert band.get_paths()[0].vertices[:, 1].max() == pytest.approx(1.1)
    assert "bands: 95 % interval" in words(figure)


def test_twelve_lines_differ_in_more_than_colour_and_all_stand_in_the_legend() -> None:
    names = ["_hidden"] + [f"window of {i} layers" for i in range(11)]
    axes = draw(line_plot(*(line(name, [0.1 * i, 0.2]) for i, name in enumerate(names)), n=2)).axes[0]
    looks = {
        (drawn.get_color(), drawn.get_marker(), drawn.get_linestyle())
        for drawn in axes.lines
        if drawn.get_zorder() == 3
    }
    assert len(looks) == 12
    legend = axes.get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == names


@pytest.mark.parametrize(
    "names",
    [
        ("single visual", "multi visual", "multi textual", "all, at visual", "all, at textual", "all, together"),
        ("a", "b", "c", "d", "e", "image → a long constraint"),
        tuple(f"window of {i} layers" for i in range(7)),
        ("one",),
    ],
)
def test_a_legend_lies_in_the_figure_and_leaves_the_plot_its_width(names: tuple[str, ...]) -> None:
    figure = draw(line_plot(*(line(name, [0.1, 0.2]) for name in names), n=2))
    legend = figure.axes[0].get_legend()
    assert legend is not None
    box = legend.get_window_extent()
    assert figure.bbox.x0 <= box.x0
    assert box.x1 <= figure.bbox.x1
    assert figure.axes[0].get_window_extent().width > 0.75 * figure.bbox.width


def test_a_sample_count_is_not_folded() -> None:
    caption = "Norms in the residual stream, summed over heads and tokens; mean, n = 4 questions; and more"
    told = words(draw(line_plot(line("a", [0.1, 0.2]), n=2, caption=caption)))
    assert "n\N{NO-BREAK SPACE}=\N{NO-BREAK SPACE}4" in told


def test_heat_maps_are_the_grids_on_one_scale() -> None:
    grids = [np.random.default_rng(seed).uniform(0, 0.4 + seed, (3, 5)) for seed in range(4)]
    panels = [a for a in draw(heat_map(*grids)).axes if a.get_title()]
    for axes, grid in zip(panels, grids, strict=True):
        np.testing.assert_allclose(np.asarray(axes.images[0].get_array()), grid)
    assert {a.images[0].get_clim() for a in panels} == {(0, max(g.max() for g in grids))}


def test_negative_values_diverge_around_zero_and_cells_without_a_value_are_hatched() -> None:
    figure = draw(heat_map(np.array([[0.2, np.nan, -0.8]])))
    image = figure.axes[0].images[0]
    assert image.get_clim() == (-0.8, 0.8)
    assert image.get_cmap().name == "RdBu_r"
    assert figure.axes[0].patch.get_hatch()
    assert "hatched: no value" in words(figure)


@pytest.mark.parametrize(("shape", "panels"), [((1, 1), 1), ((11, 6), 1), ((200, 80), 1), ((5, 32), 1), ((8, 6), 5)])
def test_labels_of_rows_and_columns_do_not_overlap(shape: tuple[int, int], panels: int) -> None:
    figure = draw(heat_map(*[np.zeros(shape)] * panels))
    figure.draw_without_rendering()
    names = [axes.get_yticklabels() for axes in figure.axes], [axes.get_xticklabels() for axes in figure.axes]
    assert all(map(any, names))
    for labels in (*names[0], *names[1]):
        boxes = [t.get_window_extent() for t in labels]
        assert not any(a.overlaps(b) for a, b in pairwise(boxes))


def test_points_without_a_value_are_left_out_and_counted() -> None:
    figure = draw(scatter([0, 1, np.nan], [0.5, np.nan, 1], ["a", "b", "c"]))
    assert figure.axes[0].lines[0].get_xydata().tolist() == [[0, 0.5]]
    assert "2 points without a value left out" in words(figure)


def test_labels_of_points_hide_neither_each_other_nor_a_point() -> None:
    rng = np.random.default_rng(0)
    figure = draw(
        scatter(rng.normal(size=40).tolist(), rng.normal(size=40).tolist(), [f"layer {i}" for i in range(40)])
    )
    figure.draw_without_rendering()
    axes = figure.axes[0]
    boxes = [t.get_window_extent() for t in axes.texts]
    assert len(boxes) > 10
    assert not any(a.overlaps(b) for a, b in combinations(boxes, 2))
    points = axes.transData.transform(axes.lines[0].get_xydata())
    assert not any(box.contains(x, y) for box in boxes for x, y in points)


def test_an_overlay_lays_each_patch_s_value_over_its_part_of_the_image() -> None:
    patches = np.array([[0.1, 0.9, 0.2], [0.0, 0.3, np.nan]])
    picture, laid = draw(overlay(patches)).axes[:2]
    assert picture.images[0].get_size() == (40, 60)
    np.testing.assert_array_equal(np.ma.filled(laid.images[1].get_array(), np.nan), patches)
    assert list(laid.images[1].get_extent()) == list(laid.images[0].get_extent()) == [-0.5, 59.5, 39.5, -0.5]


@pytest.mark.parametrize("plot", EVERY_KIND, ids=lambda plot: type(plot).__name__)
def test_a_figure_is_a_column_wide_and_the_same_bytes_each_time(plot: Plot) -> None:
    assert draw(plot).get_figwidth() == 3.5
    assert Image.open(io.BytesIO(png(draw(plot), 100))).width == 350
    figure = draw(plot)
    first, drawn = png(figure, 100), svg(figure)
    assert drawn == svg(figure) == svg(draw(plot))
    assert first == png(figure, 100) == png(draw(plot), 100)
    assert b"<dc:date>" not in drawn


@pytest.mark.parametrize("plot", EVERY_KIND, ids=lambda plot: type(plot).__name__)
def test_any_text_can_be_drawn_and_none_is_a_formula(plot: Plot) -> None:
    text = HOSTILE + " 日本 \x1b[31m \n 😀" * 9
    hostile = replace(plot, title=text, caption=text)
    match hostile:
        case LinePlot(lines=lines):
            hostile = replace(
                hostile, x_label=text, y_label=text, lines=tuple(replace(each, label=text) for each in lines)
            )
        case HeatMap():
            hostile = replace(hostile, x_label=text, y_label=text, unit=text, rows=(text, ""), columns=(text, "\n"))
        case Scatter():
            hostile = replace(hostile, x_label=text, y_label=text, labels=(text, text))
        case Overlay():
            hostile = replace(hostile, unit=text)
    assert "$" in words(draw(hostile))
    assert png(draw(hostile), 60)


@pytest.mark.parametrize(
    "plot",
    [
        line_plot(),
        line_plot(line("", [np.nan] * 6)),
        line_plot(line("one", [0.5], half=0.1), n=1),
        heat_map(np.full((2, 2), np.nan)),
        scatter([], [], []),
        scatter([1, 1], [2, 2], ["a", "b"]),
        overlay(np.full((2, 2), np.nan), size=(1, 300)),
    ],
)
def test_a_figure_can_be_made_of_nothing_or_of_one_value(plot: Plot) -> None:
    assert png(draw(plot), 60)


def test_a_line_without_values_is_said_to_have_none() -> None:
    assert "empty (no values)" in words(draw(line_plot(line("empty", [np.nan] * 6), line("full", [0.0] * 6))))


def test_captions_state_samples_settings_and_what_was_left_out() -> None:
    [given, own] = captioned(
        findings(line_plot(), replace(line_plot(), caption="All pairs."), skipped=("questions[1]: wrong",))
    )
    assert given.caption == "n = 7 questions; 1 left out; window: 9 layers"
    assert own.caption == "All pairs; n = 7 questions; 1 left out; window: 9 layers"


def test_a_page_shows_numbers_figures_tables_and_what_was_left_out() -> None:
    number = Number(name="AUROC", value=0.84123, unit="share", n=120, low=0.79, high=-0.02)
    table = Table(name="tokens", title="Tokens", columns=("token", "norm"), rows=(("this", "0.42"),))
    text = page([findings(*EVERY_KIND, numbers=(number,), tables=(table,), skipped=("questions[1]: not known",))])
    shown = ("0.841", "0.79 to −0.02", "share", "120", "<bdi>this</bdi>", "0.42", "questions[1]: not known", "9 layers",
             "1 question left out", "bars: 95 % interval", "hatched: no value")  # fmt: skip
    assert [each for each in shown if each not in text] == []
    assert text.count("data:image/png;base64,") == 4


def test_a_page_of_one_measurement_says_its_title_once_and_of_several_each_where_it_stands() -> None:
    one = findings(title="Knockout")
    assert page([one], title="Knockout").count("<h1>Knockout</h1>") == 1
    assert "<h2>" not in page([one], title="Knockout")
    assert page([one, one], title="Both").count("<h2>Knockout</h2>") == 2


def test_a_page_counts_what_a_sweep_edits_as_requests_and_writes_large_numbers_out() -> None:
    rank = Number(name="rank", value=1298.4, unit="rank", n=1)
    text = page([findings(kind="sweep", n=3, numbers=(rank,), skipped=("requests[0]: known",))])
    assert [each for each in ("3 requests", "1 request left out", "1,298<") if each not in text] == []


@pytest.mark.parametrize("plot", EVERY_KIND)
def test_a_plate_is_drawn_once_for_its_files_and_without_title_and_caption_for_the_page(plot: Plot) -> None:
    told = findings(replace(plot, title="A title that is long enough to stand on two lines of a column"))
    made = plate(told, told.plots[0])
    whole = Image.open(io.BytesIO(made.png))
    bare = Image.open(io.BytesIO(base64.b64decode(made.uri.partition(",")[2])))
    assert bare.width == whole.width
    # Two lines of title and two of caption, each of about a tenth of an inch.
    assert 0.25 < (whole.height - bare.height) / whole.width * 3.5 < 0.9
    assert set(np.asarray(bare.convert("L"))[0].tolist()) == {255}
    assert page([told], plates=[[made]]) == page([told])
    assert section(told, anchor="a", plates=[made]) == section(told, anchor="a")


def test_the_legend_of_many_lines_stays_within_the_figure_and_off_the_labels() -> None:
    names = [f"{a} → {b}" for a in ("image", "outside", "constraint") for b in ("constraint", "question", "last")]
    figure = draw(
        replace(line_plot(*(line(n, [0.1, 0.2], half=0.1) for n in names), n=2), y_label="AIE (share of total effect)")
    )
    figure.draw_without_rendering()
    (axes,) = figure.axes
    legend = axes.get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == names
    box = legend.get_window_extent()
    assert box.x0 >= 0
    assert box.x1 <= figure.bbox.x1
    assert not box.overlaps(axes.yaxis.label.get_window_extent())


def test_a_page_loads_nothing_and_what_models_say_is_inert() -> None:
    number = Number(name=HOSTILE, value=float("nan"), unit=HOSTILE, n=0)
    table = Table(name="t", title=HOSTILE, columns=(HOSTILE,), rows=((HOSTILE,),))
    plot = line_plot(line(HOSTILE, [0.0] * 6), title=HOSTILE, caption=HOSTILE)
    told = findings(
        plot, numbers=(number,), tables=(table,), skipped=(HOSTILE,), title=HOSTILE, settings={HOSTILE: HOSTILE}
    )
    text = page([told, told], title=HOSTILE)
    markup = re.sub(r"data:image/png;base64,[A-Za-z0-9+/=]+", "data:", text)
    assert "default-src 'none'" in markup
    assert "<script" not in markup
    assert "://" not in markup
    assert set(re.findall(r"(?:src=\"|url\()([^\")]*)", markup)) == {"data:"}
    assert page([told, told], title=HOSTILE) == text
