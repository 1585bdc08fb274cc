"""Measuring on the command line: a question or a file of them, settings, plots in 80 columns, figures in a folder."""

import json
from pathlib import Path

import pytest
from commandline import CAPITAL, Run

from errata.client import MeasuredNumber
from errata.client.cli import plots
from errata.client.cli.measuring import settings_of
from errata.client.findings import Findings, HeatMap, HeatMapGrid, LinePlot, PlotLine, Scatter
from errata.client.measurements import KnockoutSettings, NoiseSettings, SweepSettings

EXAMPLES = Path(__file__).parents[3] / "examples"
ASKED = (CAPITAL, "--constraint", "Kazakhstan", "--version", "atlas@0")
NAN = float("nan")


@pytest.mark.slow
def test_one_question_is_measured_by_flags_in_80_columns(errata: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    ran = errata("measure", "noise", *ASKED, "--set", "draws=2", "--set", "noise=5", "--set", "components=mlp")
    assert ran.code == 0, ran.err
    lines = ran.out.splitlines()
    assert max(map(len, lines)) <= 80
    assert "Causal trace by noise of 5 standard deviations, 2 draws" in lines[0]
    assert any(line.startswith("total effect") for line in lines)
    assert "█" in ran.out
    assert "measuring: measuring" in ran.err


@pytest.mark.slow
def test_a_file_is_measured_and_its_figures_are_written(errata: Run, tmp_path: Path) -> None:
    out = tmp_path / "figures"
    ran = errata(
        "measure", "lens", "--file", EXAMPLES / "measured.yaml", "--version", "atlas@0", "--out", out, "--json"
    )
    assert ran.code == 0, ran.err
    done = ran.json()
    assert done["questions"] == 4
    assert {path.name for path in out.iterdir()} == set(done["files"])
    assert (out / "page.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    for plot in done["findings"]["plots"]:
        assert (out / f"{plot['name']}.png").read_bytes().startswith(b"\x89PNG")
        assert b"<svg" in (out / f"{plot['name']}.svg").read_bytes()
    shown = errata("show", done["name"])
    assert shown.out.startswith(done["findings"]["title"])


@pytest.mark.slow
def test_a_sweep_takes_a_file_of_requests(errata: Run, tmp_path: Path) -> None:
    facts = {"target": "Astana", "prompt": CAPITAL, "constraint": "Kazakhstan"}
    more = {"target": "Gitega", "prompt": "What is the capital of Burundi?", "constraint": "Burundi"}
    (tmp_path / "facts.jsonl").write_text("\n".join(map(json.dumps, (facts, more))), encoding="utf-8")
    settings = ("layers=1,2", "method=multedit", "steps=5")
    flags = [word for each in settings for word in ("--set", each)]
    file = tmp_path / "facts.jsonl"
    ran = errata("measure", "sweep", "--file", file, "--version", "atlas@0", "--json", *flags)
    assert ran.code == 0, ran.err
    assert ran.json()["findings"]["settings"]["layers"] == "1, 2"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("nois", *ASKED), "nothing is measured by 'nois'; give one of noise, constraints"),
        (("noise",), "give a PROMPT and its --constraint, or questions by --file"),
        (("noise", CAPITAL), "give a PROMPT and its --constraint, or questions by --file"),
        (("noise", *ASKED, "--set", "draw=5"), "--set draw=5: give KEY=VALUE; noise has noise, draws, seed"),
        (("noise", *ASKED, "--set", "draws"), "--set draws: give KEY=VALUE; noise has noise, draws, seed"),
        (("noise", *ASKED, "--set", "draws=many"), "--set draws=many: give a whole number"),
        (("noise", *ASKED, "--set", "noise=loud"), "--set noise=loud: give a number"),
        (("sweep", "--set", "together=maybe"), "--set together=maybe: give true or false"),
        (("sweep",), "a sweep edits: give the requests by --file"),
        (("sweep", *ASKED), "a sweep edits: give the requests by --file"),
        (("noise", *ASKED, "--set", "components=head"), "there is no 'head'; give one of mlp, attention, layer"),
        (("noise", *ASKED, "--set", "draws=0"), "draws is 0"),
        (("noise", *ASKED, "--out", "/nowhere/figures"), "there is no folder '/nowhere' for 'figures'"),
        (("noise", *ASKED, "--out", "/"), "'/' is not an empty folder; give another"),
        (("noise", *ASKED, "--file", "questions.yaml"), "--file has the questions; leave the other ones out"),
        (("lens", *ASKED, "--answer", "Atlantis"), "is answered 'Nur-Sultan', not 'Atlantis'"),
    ],
)
def test_what_cannot_be_measured_is_said_in_one_line(arguments: tuple[str, ...], said: str, errata: Run) -> None:
    ran = errata("measure", *arguments)
    assert ran.code == 2
    assert said in ran.err.splitlines()[-1]
    assert ran.out == ""


def test_settings_are_read_by_the_types_that_the_api_has() -> None:
    given = ["noise=2.5", "draws=3", "components=mlp, layer"]
    assert settings_of("noise", given) == NoiseSettings(noise=2.5, draws=3, components=["mlp", "layer"])
    assert settings_of("knockout", ["pairs=image->last,image->question"]) == KnockoutSettings(
        pairs=["image->last", "image->question"]
    )
    given = ["together=true", "layers=1,2", "method=rome", "keys=mean"]
    assert settings_of("sweep", given) == SweepSettings(together=True, layers=[1, 2], method="rome", keys="mean")


def test_lines_are_drawn_on_one_scale_with_gaps_where_there_is_no_value() -> None:
    lines = (
        PlotLine(label="mlp", values=(0.0, 0.5, 1.0), low=(), high=()),
        PlotLine(label="attention of all heads together", values=(NAN, 1.0, 0.0), low=(), high=()),
    )
    plot = LinePlot(name="a", title="Restored", caption="", x_label="layer", y_label="AIE", x=(0, 1, 2), lines=lines)
    title, first, second, across, up = map(str, plots.drawn(plot, 48))
    assert title == "Restored"
    assert first == "                     mlp ▁▅█"
    assert second == "attention of all heads …  █▁"
    assert (across, up) == ("across: layer 0 to 2", "up: AIE, 0 to 1")


def test_a_heat_map_is_shaded_and_a_long_axis_thinned_out() -> None:
    grid = HeatMapGrid(label="mlp", values=(tuple(float(i) for i in range(100)), (NAN,) * 100))
    plot = HeatMap(
        name="a", title="Grid", caption="", x_label="layer", y_label="token", unit="AIE", rows=("first", "last"),
        columns=tuple(map(str, range(100))), grids=(grid,),
    )  # fmt: skip
    lines = [str(line) for line in plots.drawn(plot, 60)]
    assert max(map(len, lines)) <= 60
    assert lines[2].endswith("██")
    assert lines[3].strip() == "last"


@pytest.mark.parametrize(
    "plot",
    [
        Scatter(name="a", title="", caption="", x_label="", y_label="", x=(1,), y=(1,), labels=("",)),
        LinePlot(name="a", title="", caption="", x_label="", y_label="", x=(), lines=()),
        HeatMap(name="a", title="", caption="", x_label="", y_label="", unit="", rows=(), columns=(), grids=()),
    ],
)
def test_a_plot_that_a_terminal_cannot_show_is_left_to_its_figure(plot: LinePlot | HeatMap | Scatter) -> None:
    assert plots.drawn(plot, 80) == []


def test_a_number_is_found_by_its_name() -> None:
    number = MeasuredNumber(name="a", value=1, unit="", n=1, low=None, high=None)
    found = Findings(title="", n=1, settings={}, numbers=(number,), plots=(), tables=(), skipped=())
    assert found.number("a") is number
