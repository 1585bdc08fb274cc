"""Measuring on the command line: a question or a file of them, settings, plots in 80 columns, figures in a folder."""

import json
from pathlib import Path

import pytest
from commandline import CAPITAL, Run

from errata.client import MeasuredNumber
from errata.client.cli import plots
from errata.client.cli.found import show_measurement
from errata.client.cli.measuring import settings_of
from errata.client.cli.output import Output
from errata.client.findings import (
    Findings,
    FindingsTable,
    HeatMap,
    HeatMapGrid,
    LinePlot,
    Measurement,
    PlotLine,
    Scatter,
)
from errata.client.measurements import KnockoutSettings, NoiseSettings, SweepSettings
from errata.client.results import Job, Progress, State

EXAMPLES = Path(__file__).parents[3] / "examples"
ASKED = (CAPITAL, "--constraint", "Kazakhstan", "--version", "atlas@0")
NAN = float("nan")
JOB = Job(
    state=State.SUCCEEDED,
    progress=Progress(stage="", done=0, total=0),
    error=None,
    created_by="",
    create_time=None,
    start_time=None,
    end_time=None,
)


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
    for name in (done["name"], done["name"].removeprefix("models/"), done["name"].removeprefix("models/atlas/")):
        assert errata("show", name).out.startswith(done["findings"]["title"])


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
        (("nois", *ASKED), "nothing is measured by 'nois'; did you mean 'noise'? give one of noise, constraints"),
        (("noise",), "give a PROMPT and its --constraint, or questions by --file"),
        (("noise", CAPITAL), "give a PROMPT and its --constraint, or questions by --file"),
        (("noise", *ASKED, "--set", "draw=5"), "noise.draw: there is no such setting; did you mean 'draws'? give one"),
        (("noise", *ASKED, "--set", "draws"), "noise.draws: it has no value; give --set draws=VALUE"),
        (("noise", *ASKED, "--set", "draws=many"), "noise.draws: 'many' is not a whole number"),
        (("noise", *ASKED, "--set", "noise=loud"), "noise.noise: 'loud' is not a number"),
        (("sweep", "--set", "together=maybe"), "sweep.together: 'maybe' is not true or false"),
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


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        (("nois", *ASKED), "kind"),
        (("noise", *ASKED, "--set", "draw=5"), "noise.draw"),
        (("noise", *ASKED, "--set", "draws=many"), "noise.draws"),
        (("noise", *ASKED, "--set", "draws=0"), "noise.draws"),
    ],
)
def test_what_is_wrong_with_a_kind_and_its_settings_names_them(
    arguments: tuple[str, ...], field: str, errata: Run
) -> None:
    assert errata("measure", *arguments, "--json").json()["error"]["field"] == field


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


def test_falls_are_drawn_by_how_far_they_fall() -> None:
    falls = PlotLine(label="image", values=(0.5, -20.0, -80.0), low=(), high=())
    plot = LinePlot(name="a", title="", caption="", x_label="layer", y_label="change, %", x=(0, 1, 2), lines=(falls,))
    _, drawn, _, up = map(str, plots.drawn(plot, 48))
    assert drawn == "image ▁▃█"
    assert up == "up: change, %, from 0.5 down to -80"


def test_values_that_hardly_differ_are_drawn_alike_and_what_is_nothing_is_told_as_0() -> None:
    alike = PlotLine(label="mlp", values=(0.9991, 0.9992), low=(), high=())
    plot = LinePlot(name="a", title="", caption="", x_label="layer", y_label="AIE", x=(0, 1), lines=(alike,))
    bars = str(plots.drawn(plot, 48)[1]).removeprefix("mlp ")
    assert bars[0] == bars[1]
    grid = HeatMapGrid(label="", values=((-1e-9, 0.5),))
    shades = HeatMap(
        name="a", title="", caption="", x_label="layer", y_label="", unit="AIE", rows=("r",), columns=("0", "1"),
        grids=(grid,),
    )  # fmt: skip
    assert str(plots.drawn(shades, 48)[-1]) == "light to dark: AIE, 0 to 0.5"


def said(found: Findings, width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    """What a terminal of so many columns is told of findings."""
    monkeypatch.setenv("COLUMNS", str(width))
    done = Measurement(
        name="models/atlas/measurements/0197", version="models/atlas/versions/0", kind="readout", questions=found.n,
        job=JOB, findings=found, files=(), mlflow_run_id="",
    )  # fmt: skip
    show_measurement(Output(as_json=False, verbose=False), done)
    told = capsys.readouterr().out
    assert max(map(len, told.splitlines())) <= width
    return told


def findings(**more: object) -> Findings:
    given = {"title": "Found", "n": 1, "settings": {}, "numbers": (), "plots": (), "tables": (), "skipped": ()}
    return Findings(**(given | more))  # type: ignore[arg-type]


def test_a_unit_stands_in_its_column_and_a_layer_before_its_number_unless_the_name_says_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    numbers = (
        MeasuredNumber(name="total effect", value=0.5, unit="probability", n=2, low=0.25, high=0.75),
        MeasuredNumber(name="layer of the largest", value=3, unit="layer", n=2, low=None, high=None),
        MeasuredNumber(name="it leads from", value=3, unit="layer", n=2, low=2, high=4),
        MeasuredNumber(name="rank of the target", value=1298.4, unit="rank", n=2, low=None, high=None),
    )
    rows = [" ".join(row.split()) for row in said(findings(numbers=numbers), 80, monkeypatch, capsys).splitlines()[-4:]]
    assert rows == [
        "total effect 0.5 0.25 to 0.75 probability 2",
        "layer of the largest 3 2",
        "it leads from layer 3 2 to 4 2",
        "rank of the target 1,298 2",
    ]


def test_long_tables_are_cut_and_say_where_the_rest_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = tuple((str(i), "–", ", ".join(["a word"] * 12)) for i in range(40))
    table = FindingsTable(name="t", title="Words", columns=("layer", "after", "before"), rows=rows)
    told = said(findings(tables=(table,)), 80, monkeypatch, capsys)
    assert len(told.splitlines()) < 22
    assert "after" not in told
    assert "more rows: --json, or the page of --out FOLDER" in told


def test_a_table_that_is_too_wide_leaves_out_intervals_and_no_figure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    columns = ("layer", *(f"measure {i}" for i in range(5)))
    row = ("1", *(f"0.98{i} (0.951–0.999)" for i in range(5)))
    table = FindingsTable(name="t", title="Sweep", columns=columns, rows=(row,))
    narrow = said(findings(tables=(table,)), 80, monkeypatch, capsys)
    assert "Sweep, without intervals" in narrow
    assert [f"0.98{i}" for i in range(5)] == narrow.splitlines()[-1].split()[1:]
    assert "(0.951–0.999)" in said(findings(tables=(table,)), 200, monkeypatch, capsys)


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
