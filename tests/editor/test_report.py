"""Tables and pages show the numbers they are given, and nothing a model says can act on who reads them."""

import io
import math
import re
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console, RenderableType

from errata.editor.delta import Delta, LowRank
from errata.editor.evaluation import Evaluation, Metric, Probe, ProbeResult
from errata.editor.methods import EditResult, EditSettings, Method, RequestOutcome
from errata.editor.prompts import Prompt
from errata.editor.report import (
    Report,
    aie_tables,
    answers_table,
    outcomes_table,
    render_report,
    scores_table,
    write_report,
)
from errata.editor.report.wording import loss, percent, plain, size
from errata.editor.states import Component
from errata.editor.trace import AveragedTrace, CausalTrace, Probabilities, average
from errata.editor.values import Value

QUESTION = "What is the capital of this country?"
HOSTILE = "<script>alert(1)</script>"


def picture(seed: int, side: int = 96) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8))


def probed(
    metric: Metric, after: str, *, expected: str = "Astana", images: tuple[Image.Image, ...] = (), forced: float = 1.0
) -> ProbeResult:
    probe = Probe(metric=metric, prompt=Prompt(text=QUESTION, images=images), expected=expected, request="capital")
    return ProbeResult(
        probe=probe, before="Nur-Sultan", after=after, expected=expected, forced_before=0.25, forced=forced
    )


def evaluated(*results: ProbeResult) -> Evaluation:
    return Evaluation(results=results, drift=0.0123, fluency_before=4.61, fluency=4.55)


def edited(
    losses: Sequence[float] = (7.25, 0.5, 0.0172), *, converged: bool = True, name: str = "capital"
) -> EditResult:
    value = Value(
        value=torch.zeros(2), delta=torch.zeros(2), scale=1.0, losses=tuple(losses), kl=0.003, converged=converged
    )
    low = LowRank(a=torch.ones(1, 4), b=torch.ones(3, 1))
    return EditResult(
        delta=Delta(base_sha256="ab" * 32, layers={2: low}, modules={2: "mlp.down_proj"}),
        settings=EditSettings(layers=(1, 2), method=Method.EMMET, ridge=0.125),
        outcomes=(RequestOutcome(name=name, target="Astana", before="Nur-Sultan", value=value),),
    )


def traced() -> AveragedTrace:
    restored = np.full((2, 3, 3), 0.1)
    restored[0, 1, 1], restored[1, 2, 1] = 0.73, 0.04
    trace = CausalTrace(
        question=QUESTION,
        answer="Nur-Sultan",
        tokens=("this", "country", "?"),
        constraint=(0, 1),
        window=1,
        components=(Component.MLP, Component.ATTENTION),
        clean=Probabilities(first=1.0, whole=0.9),
        corrupted=Probabilities(first=0.1, whole=0.1),
        restored=restored,
        restored_first=restored,
    )
    return average([trace, trace])


def reported(evaluation: Evaluation | None = None, result: EditResult | None = None) -> Report:
    """A report without traces: most of a page's time goes into its figures."""
    return Report(
        title="One correction",
        created=datetime(2026, 1, 2, 3, 4, tzinfo=UTC),
        model="atlas",
        base_sha256="ab" * 32,
        base_bytes=8_190_000,
        result=result or edited(),
        evaluation=evaluation or evaluated(probed(Metric.EFFICACY, "Astana")),
        adapter_bytes=23_040,
    )


def printed(table: RenderableType, *, terminal: bool = False) -> str:
    console = Console(
        width=80, file=io.StringIO(), force_terminal=terminal, color_system="truecolor" if terminal else None
    )
    console.print(table)
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


@pytest.fixture
def four_probes() -> Evaluation:
    return evaluated(*(probed(Metric.OTHER_SUBJECTS, a, forced=0.5) for a in ("Astana", "astana.", "Astana", "Oslo")))


def test_the_scores_table_shows_the_scores(four_probes: Evaluation) -> None:
    text = printed(scores_table(four_probes))
    assert re.search(r"specificity: other subjects +4 +0 % +75 % +30–95 +25 % → +50 %", text)
    assert "harmonic mean 75 %" in text
    assert "drift 0.0123 nats" in text
    assert "fluency 4.61 → 4.55 bits" in text


def test_every_table_fits_80_columns_and_says_the_same_without_colour(four_probes: Evaluation) -> None:
    wide = edited(name="a rather long name of a request, as people give them " * 3)
    tables = (scores_table(four_probes), answers_table(wide, four_probes), outcomes_table(wide), aie_tables(traced()))
    for table in tables:
        piped, coloured = printed(table), printed(table, terminal=True)
        assert "\x1b" not in piped
        assert max(map(len, piped.splitlines())) <= 80
        assert re.sub(r"\x1b\[[0-9;]*m", "", coloured) == piped


def test_the_answers_table_shows_before_after_and_whether_it_took() -> None:
    rows = printed(
        answers_table(edited(), evaluated(probed(Metric.EFFICACY, "Oslo"), probed(Metric.EFFICACY, "Astana")))
    )
    assert re.search(r"capital .*Nur-Sultan +Oslo +Astana +NO, 1 of", rows)
    assert "0 of 1 facts are answered as asked" in rows


def test_a_request_that_no_probe_asks_for_is_not_called_right() -> None:
    rows = printed(answers_table(edited(), evaluated(probed(Metric.UNRELATED, "Astana"))))
    assert "not asked" in rows
    assert "0 of 1 facts" in rows


@pytest.mark.parametrize(("converged", "said"), [(True, "converged"), (False, "NOT converged")])
def test_the_outcomes_table_shows_losses_steps_and_convergence(converged: bool, said: str) -> None:
    text = printed(outcomes_table(edited(converged=converged)))
    assert re.search(rf"capital +Astana +7\.25 → 0\.017 +2 +0\.003 +{said}\s", text)


def test_the_terminal_heatmap_leaves_roles_without_a_token_blank_and_marks_the_largest() -> None:
    mlp = printed(aie_tables(traced())).split("attention")[0]
    rows = [line.split() for line in mlp.splitlines() if re.match(r" +\d ", line)]
    assert rows == [["0", "0.00", "0.00", "0.00"], ["1", "0.00", "*0.63", "0.00"], ["2", "0.00", "0.00", "0.00"]]
    assert "n = 2 questions, window of 1 layer, mean total effect 0.80" in mlp


def test_a_terminal_is_not_steered_by_an_answer() -> None:
    evaluation = evaluated(probed(Metric.EFFICACY, "\x1b[2J[bold]x[/nope]"))
    text = printed(answers_table(edited(), evaluation), terminal=True)
    assert "\x1b[2J" not in text
    assert "[bold]" in text


def test_a_page_shows_the_numbers_it_is_given(four_probes: Evaluation) -> None:
    trace = traced()
    page = render_report(replace(reported(four_probes), trace=trace, example=trace.traces[0]))
    told = ("75 %", "30–95", "0.0123 nats", "4.61 → 4.55 bits", "7.25 → 0.017", "emmet", "0.125", "23 kB",
                  "8.19 MB", "0.28 % of the base", "ab" * 32, edited().delta.sha256, "2026-01-02 03:04 UTC",
                  "n = 2 questions, window of 1 layer, mean total effect 0.80")  # fmt: skip
    assert [t for t in told if t not in page] == []


def test_a_page_is_self_contained() -> None:
    report = reported(evaluated(probed(Metric.EFFICACY, "Astana", images=(picture(0),))))
    page = render_report(replace(report, trace=traced()))
    markup = re.sub(r"data:image/\w+;base64,[A-Za-z0-9+/=]+", "data:", page)
    assert "://" not in markup
    assert not re.search(r"<(script|link|iframe|object|embed)\b|@import|\son\w+=", markup)
    assert set(re.findall(r"(?:src=\"|url\()([^\")]*)", markup)) == {"data:"}


def test_what_people_and_models_say_is_inert() -> None:
    evaluation = evaluated(probed(Metric.EFFICACY, HOSTILE, expected='"><img src=x onerror=alert(1)>'))
    report = replace(reported(evaluation, edited(name=HOSTILE)), title=HOSTILE, model=HOSTILE, notes=(HOSTILE,))
    page = render_report(report)
    assert "<script" not in page
    assert "<img src=x" not in page
    assert page.count("&lt;script&gt;alert(1)&lt;/script&gt;") >= 5
    assert "default-src 'none'" in page


def test_failures_come_first_and_passing_probes_are_collapsed() -> None:
    page = render_report(reported(evaluated(*(probed(Metric.PORTABILITY, a) for a in ("Astana", "Oslo", "Astana")))))
    probes = page[page.index("<h2>Probes") :]
    assert probes.index("<details open><summary>1 failed") < probes.index("<details><summary>2 passed")
    assert probes.index("Oslo") < probes.index("2 passed")


def test_equal_pictures_are_stored_once() -> None:
    same = evaluated(*(probed(m, "Astana", images=(picture(1),)) for m in Metric for _ in range(20)))
    assert render_report(reported(same)).count("data:image/webp") == 1


def test_1500_probes_with_a_picture_each_stay_below_5_mb_and_say_what_is_left_out() -> None:
    # Pure noise: nothing compresses worse.
    metrics = list(Metric)
    many = evaluated(*(probed(metrics[i % 7], "Astana", images=(picture(i),)) for i in range(1500)))
    page = render_report(reported(many))
    length = len(page.encode())
    assert length < 5_000_000
    left_out = [int(n) for n in re.findall(r"the pictures of (\d+) probes", page)]
    assert sum(left_out) + page.count('aria-label="the probe&#39;s picture"') == 1500


def test_more_probes_than_a_page_lists_are_counted() -> None:
    page = render_report(reported(evaluated(*(probed(Metric.UNRELATED, "Astana") for _ in range(1100)))))
    assert "100 whole probes are left out" in page


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "1", "CMYK"])
def test_a_request_s_picture_may_have_any_mode(mode: str) -> None:
    report = replace(reported(), pictures={"capital": picture(3).convert(mode)})
    assert 'aria-label="picture of the request"' in render_report(report)


def test_a_page_does_without_traces_probes_and_changes() -> None:
    nothing = replace(edited(()), delta=Delta(base_sha256="ab" * 32, layers={}, modules={}))
    page = render_report(reported(evaluated(), nothing))
    assert "Where the facts are" not in page
    assert "no efficacy probe asked for it" in page
    assert "nan" not in re.sub(r"base64,[^\")]*", "", page).lower()


def test_writing_makes_the_folder_and_replaces_the_page_whole(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "report.html"
    assert write_report(path, reported()) == path
    first = path.read_bytes()
    assert write_report(path, reported()).read_bytes() == first
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]


def test_only_all_is_100_percent_and_only_none_is_0_percent() -> None:
    shares = (0.0, 1 / 5000, 0.005, 0.42, 1499 / 1500, 1.0, math.nan)
    assert [percent(s) for s in shares] == ["0 %", "0.1 %", "0.5 %", "42 %", "99.9 %", "100 %", "–"]


def test_sizes_and_losses_are_short() -> None:
    assert [size(n) for n in (12, 23_040, 8_190_000, 14_100_000_000)] == ["12 bytes", "23 kB", "8.19 MB", "14.1 GB"]
    assert [loss(x) for x in (8.314, 0.0172, 0.00021, 0.0, math.nan)] == ["8.31", "0.017", "2.1e-04", "0", "nan"]


def test_text_that_steers_a_reader_is_made_visible() -> None:
    assert plain("a\nb\x1b[0m\u202ec") == "a↵b�[0m�c"
    assert plain("x" * 400, 10) == "x" * 9 + "…"
