"""What MLflow is told of an edit: parameters, metrics and a description that no fact can break out of."""

import base64
import json
from dataclasses import replace

import pytest
from publishing import RECORD, SCORES, base_row

from errata.server.ledger.rows import JobKind, JobRow, JobState, VersionRow
from errata.server.registry.description import LIMIT, describe
from errata.server.registry.record import Change, edit_record, metrics_of, parameters_of
from errata.v1 import common_pb2, edit_pb2

VERSION: VersionRow = replace(
    base_row(), number=3, parent=1, edit="e", layers=(1, 2), facts=("a → b",), scores=json.dumps(SCORES),
    delta_bytes=2048, created_by="ada",
)  # fmt: skip


def job(request: edit_pb2.CreateEditRequest, result: bytes | None = None) -> JobRow:
    return JobRow(
        id="e", kind=JobKind.EDIT, model="tiny", version=0, state=JobState.SUCCEEDED, stage="", done=0, total=0,
        request=request.SerializeToString(), result=result, failure=None, made=1, attempt=1, cancel_requested=False,
        created_by="ada", create_time=VERSION.create_time, start_time=None, end_time=None,
    )  # fmt: skip


def asking(*images: bytes) -> edit_pb2.CreateEditRequest:
    prompt = common_pb2.Prompt(text="What is this?", images=[common_pb2.Image(data=i) for i in images])
    request = edit_pb2.EditRequest(name="x", contexts=[common_pb2.Context(prompt=prompt)], target="y")
    return edit_pb2.CreateEditRequest(requests=[request], description="why")


def test_an_edits_record_says_how_it_was_asked_for_and_how_it_went() -> None:
    settings = edit_pb2.EditSettings(method=edit_pb2.METHOD_MEMIT, preservation=15000, ridge=0, steps=25)
    outcome = edit_pb2.RequestOutcome(name="x", before="old", target="y")
    done = edit_pb2.Edit(settings=settings, outcomes=[outcome])
    record = edit_record(job(asking(b"PNG"), done.SerializeToString()))
    assert record.parameters == {
        "method": "memit",
        "preservation": "15000",
        "ridge": "0",
        "steps": "25",
        "requests": "1",
    }
    assert record.changes == (Change(name="x", before="old", after="y"),)
    assert record.note == "why"
    assert record.example == {"prompt": "What is this?", "image": base64.b64encode(b"PNG").decode()}
    parameters = parameters_of(VERSION, record)
    assert {k: parameters[k] for k in ("layers", "facts")} == {"layers": "1, 2", "facts": "1"}


def test_an_edit_without_a_result_or_with_a_large_picture_has_a_record_too() -> None:
    assert edit_record(job(asking())).example == {"prompt": "What is this?"}
    assert edit_record(job(asking(b"x" * 300_000))).example == {"prompt": "What is this?"}
    assert edit_record(job(edit_pb2.CreateEditRequest())).parameters == {"requests": "0"}


def test_scores_become_metrics_and_what_has_no_value_is_left_out() -> None:
    metrics = metrics_of(VERSION)
    assert metrics["efficacy/after"] == 1
    assert metrics["other_subjects/after"] == 0.875
    assert "other_subjects/forced" not in metrics
    assert metrics_of(replace(VERSION, scores="")) == {}


def test_a_description_says_what_who_when_and_on_what() -> None:
    said = describe(VERSION, RECORD)
    for part in (
        "The old atlas is *wrong*.",
        "| Kazakhstan: capital | Nur-Sultan | **Astana** |",
        "| efficacy | 4 | 0.0% | **100.0%** | 51.0% – 100.0% | 100.0% |",
        "`models/tiny/versions/3` on `models/tiny/versions/1`, by ada, 2030-01-02 03:04 UTC.",
        "Delta of 2.0 KiB at layers 1, 2",
    ):
        assert part in said
    assert "Rejected" not in said
    assert "**Rejected by its guardrails**\n- too low" in describe(replace(VERSION, rejections=("too low",)), RECORD)
    assert "- a → b" in describe(VERSION, replace(RECORD, changes=()))


def test_a_version_that_nobody_described_begins_with_its_facts_in_one_line() -> None:
    silent = replace(RECORD, note="")
    assert describe(replace(VERSION, facts=("a → b",)), silent).startswith("a → b\n\n| fact |")
    assert describe(replace(VERSION, facts=("a → b", "c → d", "e")), silent).startswith("a → b, and 2 more\n\n")
    assert describe(replace(VERSION, facts=()), silent).startswith("| fact |")


@pytest.mark.parametrize("text", ["a|b", "<script>", "a\n| b | c |", "[x](javascript:1)", "`x`", "**x**", "a\\|b"])
def test_no_fact_breaks_out_of_its_cell(text: str) -> None:
    record = replace(RECORD, changes=(Change(name=text, before=text, after=text),))
    row = describe(VERSION, record).split("|---|---|---|\n")[1].split("\n\n")[0]
    unescaped = row.replace("\\\\", "").replace("\\|", "").replace("\\<", "").replace("\\[", "").replace("\\`", "")
    assert "\n" not in row
    assert unescaped.count("|") == 4
    assert not {"<", "[", "`"} & set(unescaped)


def test_a_description_fits_into_mlflow_and_counts_what_it_leaves_out() -> None:
    many = tuple(Change(name=f"fact {i} " + "x" * 100, before="y" * 200, after="z") for i in range(1000))
    said = describe(VERSION, replace(RECORD, changes=many, note="n" * 4000))
    assert len(said) <= LIMIT
    shown = said.count("| fact ") - 1
    assert 0 < shown < 50
    assert f"… and {1000 - shown} more, in `request.json`" in said
    assert "`models/tiny/versions/3`" in said
