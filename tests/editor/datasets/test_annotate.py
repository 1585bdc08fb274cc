"""What the annotator marks, and how often it marks what people did."""

import csv
import json
from collections.abc import Iterable

import pytest
from sets import KNOWN, SAMPLE

from errata.editor.datasets.annotate import annotate
from errata.editor.datasets.records import Kind, Record, faults


def marked(text: str, *, pictured: bool = True) -> list[tuple[str, str]]:
    return [(span.kind.value, span.text) for span in annotate(text, pictured=pictured)]


@pytest.mark.parametrize(
    ("text", "visual"),
    [
        ("What is the capital of this country?", "this country"),
        ("This building is located in", "This building"),
        ("THIS building is located in", "THIS building"),
        ("In this country, the language spoken is", "this country"),
        ("This old national park is in", "This old national park"),
        ("What is this?", "this"),
        ("Where is this located?", "this"),
        ("What is this man's job?", "this man"),
        ("Who grows these flowers?", "these flowers"),
        ("What is the capital of the country in this image?", "the country in this image"),
        ("How old is the bridge shown in the picture?", "the bridge shown in the picture"),
        ("Who is the man on the left in the photo?", "the man on the left in the photo"),
        ("What can be seen in the image?", "the image"),
    ],
)
def test_visual_constraints_are_found_in_any_case(text: str, visual: str) -> None:
    assert marked(text) == [("visual", visual)]


@pytest.mark.parametrize(
    ("text", "textual"),
    [
        ("What is the capital of Estonia?", ["Estonia"]),
        ("Which movie won a Golden Globe?", ["Golden Globe"]),
        ("Who wrote “War and Peace”?", ["War and Peace"]),
        ("Who wrote 'It' for Stephen King?", ["It"]),
        ("Xbox Game Studios's owner,", ["Xbox Game Studios"]),
        ("The location of 2013 Australian Open is in", ["2013 Australian Open"]),
        ("iTunes Radio was made by", ["iTunes Radio"]),
        ("What do you think?", []),
    ],
)
def test_textual_constraints_are_what_is_quoted_or_else_proper_nouns(text: str, textual: list[str]) -> None:
    assert marked(text) == [("textual", each) for each in textual]


def test_a_question_may_have_both_and_then_the_visual_one_is_first() -> None:
    assert marked("Which language do Austria and this country share?") == [
        ("visual", "this country"),
        ("textual", "Austria"),
    ]
    assert marked("Is this Big Ben?") == [("visual", "this"), ("textual", "Big Ben")]


def test_without_an_image_nothing_is_visual() -> None:
    assert marked("Is this country near Estonia?", pictured=False) == [("textual", "Estonia")]


@pytest.mark.parametrize("text", ["this dog or this dog?", "Paris or Paris?", "", "'" * 999, "A. " * 999, "the " * 999])
def test_what_is_marked_stands_in_the_question_as_a_record_needs_it(text: str) -> None:
    spans = annotate(text, pictured=False)
    assert {span.kind for span in spans} <= {Kind.TEXTUAL}
    assert [fault for fault in faults(Record(text=text, constraints=spans)) if spans and fault[0] != "text"] == []


def scores(pairs: Iterable[tuple[set[str], str]]) -> tuple[float, float]:
    """Precision and recall of exact spans; each question has one right span."""
    told = list(pairs)
    right = sum(gold in found for found, gold in told)
    return right / sum(len(found) for found, _ in told), right / len(told)


def test_the_visual_spans_of_vqa_constraints_are_found() -> None:
    """17 of 20 exactly. Two of the others are marked there with their comma, one in the middle of its noun phrase."""
    if not SAMPLE.exists():
        pytest.skip(f"the sample is not at {SAMPLE}: it is data outside of the repository")
    with SAMPLE.open(encoding="utf-8", newline="") as file:
        rows = [({s.text for s in annotate(row["question"])}, row["main_entity"]) for row in csv.DictReader(file)]
    assert scores(rows) == (0.85, 0.85)
    assert scores((found, gold.rstrip(",")) for found, gold in rows) == (0.95, 0.95)


def test_most_subjects_of_the_known_facts_are_found() -> None:
    if not KNOWN.exists():
        pytest.skip(f"the known facts are not at {KNOWN}: they are data outside of the repository")
    facts = json.loads(KNOWN.read_text(encoding="utf-8"))
    precision, recall = scores(
        ({s.text for s in annotate(fact["prompt"], pictured=False)}, fact["subject"]) for fact in facts
    )
    assert precision > 0.84
    assert recall > 0.87
