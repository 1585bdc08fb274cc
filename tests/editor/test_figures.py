"""Figures say what the numbers say, and can be made of any text and any numbers."""

import io
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

from errata.editor.delta import Delta
from errata.editor.methods import EditResult, EditSettings, RequestOutcome
from errata.editor.report import aie_heatmap, aie_lines, loss_curves, png, trace_heatmap
from errata.editor.states import Component
from errata.editor.trace import CausalTrace, Probabilities, average
from errata.editor.values import Value


def traced(
    effects: NDArray[np.float64],
    tokens: tuple[str, ...] = (" this", " country", "?"),
    constraint: tuple[int, ...] = (0, 1),
    question: str = "What is the capital of this country?",
) -> CausalTrace:
    """A trace whose indirect effects, components × layers × tokens, are the given ones."""
    return CausalTrace(
        question=question,
        answer="Astana",
        tokens=tokens,
        constraint=constraint,
        window=3,
        components=tuple(Component)[: len(effects)],
        clean=Probabilities(first=0.95, whole=0.9),
        corrupted=Probabilities(first=0.2, whole=0.1),
        restored=effects + 0.1,
        restored_first=effects + 0.2,
    )


def result(*values: tuple[str, Sequence[float], bool]) -> EditResult:
    outcomes = tuple(
        RequestOutcome(
            name=name,
            target="Astana",
            before="Nur-Sultan",
            value=Value(
                value=torch.zeros(2), delta=torch.zeros(2), scale=1.0, losses=tuple(losses), kl=0.0, converged=converged
            ),
        )
        for name, losses, converged in values
    )
    delta = Delta(base_sha256="ab" * 32, layers={}, modules={})
    return EditResult(delta=delta, settings=EditSettings(layers=(1, 2)), outcomes=outcomes)


def some_effects(seed: int = 0) -> NDArray[np.float64]:
    return np.random.default_rng(seed).uniform(0, 0.8, (3, 4, 3))


def words(figure: Figure) -> str:
    """Everything written on a figure."""
    figure.draw_without_rendering()
    return "\n".join(t.get_text() for t in figure.findobj(lambda a: hasattr(a, "get_text")))  # type: ignore[attr-defined]


def test_a_heatmap_shows_each_component_s_effects_on_one_scale() -> None:
    effects = some_effects()
    panels = [a for a in trace_heatmap(traced(effects)).axes if a.get_title()]
    assert [a.get_title() for a in panels] == ["MLP", "Attention", "Whole layer"]
    for axes, shown in zip(panels, effects, strict=True):
        np.testing.assert_allclose(np.asarray(axes.images[0].get_array()), shown.T, atol=1e-12)
    assert len({a.images[0].get_clim() for a in panels}) == 1


def test_the_constraint_s_tokens_are_marked() -> None:
    labels = trace_heatmap(traced(some_effects(), constraint=(1,))).axes[0].get_yticklabels()
    assert [t.get_text() for t in labels] == ["this", "country *", "?"]
    assert [t.get_fontweight() for t in labels] == ["normal", "bold", "normal"]


def test_captions_state_window_sample_count_and_total_effect() -> None:
    one, many = traced(some_effects()), average([traced(some_effects(s)) for s in range(5)])
    for expected, figure in (
        ("n = 1 question, window of 3 layers, total effect 0.80", trace_heatmap(one)),
        ("n = 5 questions, window of 3 layers, mean total effect 0.80", aie_heatmap(many)),
        ("n = 5 questions, window of 3 layers, mean total effect 0.80", aie_lines(many)),
    ):
        assert expected in words(figure).replace("\n", " ")
    assert "window" not in words(aie_heatmap(many, caption=False))


@pytest.mark.parametrize(("lowest", "map_name"), [(0.0, "viridis"), (-0.3, "RdBu_r")])
def test_the_colours_diverge_around_zero_where_restoring_does_harm(lowest: float, map_name: str) -> None:
    effects = some_effects()
    effects[0, 0, 0] = lowest
    image = trace_heatmap(traced(effects)).axes[0].images[0]
    low, high = image.get_clim()
    assert image.get_cmap().name == map_name
    assert low == (0 if lowest == 0 else -high)


def test_a_role_that_no_question_has_is_left_blank() -> None:
    shown = aie_heatmap(average([traced(some_effects())])).axes[0].images[0].get_array()
    assert shown is not None
    blank = np.ma.getmaskarray(np.ma.masked_invalid(shown))
    assert blank.all(axis=1).tolist() == [False, True, False, True, False]
    assert png(aie_heatmap(average([traced(some_effects())])))


def test_lines_are_the_mean_and_its_standard_error() -> None:
    many = average([traced(some_effects(s)) for s in range(6)])
    for component, drawn in zip(Component, aie_lines(many).axes[0].containers, strict=True):
        line, _, (bars,) = drawn
        np.testing.assert_allclose(line.get_ydata(), many.aie(component)[:, 2])
        half = [(s[1, 1] - s[0, 1]) / 2 for s in bars.get_segments()]
        np.testing.assert_allclose(half, many.spread(component)[:, 2])


def test_one_question_has_no_error_bars() -> None:
    for drawn in aie_lines(average([traced(some_effects())])).axes[0].containers:
        assert all(len(s) == 0 for s in drawn[2][0].get_segments())


def test_loss_curves_name_each_request_and_dash_those_that_did_not_converge() -> None:
    figure = loss_curves(result(("capital", [7.0, 1.0, 0.01], True), ("_odd $x$", [7.0, 6.0], False)))
    curves = {line.get_label(): line for line in figure.axes[0].lines}
    assert list(curves[" capital"].get_ydata()) == [7.0, 1.0, 0.01]
    assert curves[" capital"].get_linestyle() == "-"
    assert curves[" _odd $x$"].get_linestyle() == "--"
    assert "1 of 2 values converged, optimised at layer 2" in words(figure)
    assert "_odd $x$" in [t.get_text().strip() for t in figure.legends[0].get_texts()]


def test_many_loss_curves_are_counted_in_the_legend() -> None:
    figure = loss_curves(result(*((f"r{i}", [5.0, 0.0], i > 2) for i in range(30))))
    texts = [t.get_text() for t in figure.legends[0].get_texts()]
    assert texts == ["stop at 0.02", "converged (27)", "not converged (3)"]


def test_any_text_can_be_drawn() -> None:
    hostile = ("$", "\\frac{", "日本", "\x1b[31m", "", "\n", "😀" * 50)
    effects = np.zeros((1, 2, len(hostile)))
    picture = png(trace_heatmap(traced(effects, hostile, (2,), question="$\\bad{ 漢 " + "long " * 60)))
    assert Image.open(io.BytesIO(picture)).format == "PNG"


def test_labels_of_a_long_prompt_do_not_overlap() -> None:
    figure = trace_heatmap(traced(np.zeros((1, 2, 200)), tuple(f"t{i}" for i in range(200))))
    figure.draw_without_rendering()
    boxes = [t.get_window_extent() for t in figure.axes[0].get_yticklabels()]
    assert all(not a.overlaps(b) for a, b in pairwise(boxes))


def test_the_same_numbers_give_the_same_bytes() -> None:
    many = average([traced(some_effects(s)) for s in range(3)])
    assert png(aie_heatmap(many)) == png(aie_heatmap(many))
