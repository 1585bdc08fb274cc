import json

from errata.editor.evaluation import Evaluation, Metric, Probe, ProbeResult
from errata.editor.prompts import Prompt
from errata.server.jobs.artifacts import evaluation_files


def _evaluation(*answers: str) -> Evaluation:
    results = tuple(
        ProbeResult(
            probe=Probe(metric=Metric.EFFICACY, prompt=Prompt(text="<script>alert(1)</script>"), request="<b>"),
            before="<i>old</i>",
            after=answer,
            expected="new",
            forced_before=0.0,
            forced=1.0,
        )
        for answer in answers
    )
    return Evaluation(results=results, drift=0.0, fluency_before=0.0, fluency=0.0)


def test_what_models_and_callers_say_is_no_markup() -> None:
    page = evaluation_files(_evaluation("new"))["before_after.html"].decode()
    assert "<script>" not in page
    assert "<i>old" not in page
    assert "&lt;script&gt;" in page


def test_the_page_shows_what_failed_first_and_the_table_keeps_the_order() -> None:
    files = evaluation_files(_evaluation("new", "wrong"))
    page = files["before_after.html"].decode()
    assert page.index("wrong") < page.rindex("<td>new</td>")
    assert [row[6] for row in json.loads(files["before_after.json"])["data"]] == ["new", "wrong"]


def test_the_page_says_how_many_probes_it_leaves_out() -> None:
    files = evaluation_files(_evaluation(*["new"] * 1003))
    assert "3 more stand in before_after.json" in files["before_after.html"].decode()
    assert len(json.loads(files["before_after.json"])["data"]) == 1003


def test_the_same_evaluation_gives_the_same_bytes() -> None:
    assert evaluation_files(_evaluation("new")) == evaluation_files(_evaluation("new"))
