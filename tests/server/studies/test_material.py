"""What a study measures on: questions of files and of Atlas's world, edits, and a model with its adapter."""

import json
from pathlib import Path

import pytest
from tiny import picture, random_delta

from errata.editor.errors import InvalidInputError
from errata.server.studies.format import DataEntry, ModelEntry
from errata.server.studies.material import edited_questions, edits_of, questions_of
from errata.server.studies.measuring import open_model

CAPITALS = [("Norway", "Oslo"), ("Peru", "Lima"), ("Japan", "Tokyo"), ("France", "Paris")]


@pytest.fixture
def known(tmp_path: Path) -> DataEntry:
    facts = [{"prompt": f"The capital of {c} is", "subject": c, "attribute": a} for c, a in CAPITALS]
    (tmp_path / "known.json").write_text(json.dumps(facts))
    return DataEntry(path="known.json", n=2)


def texts(data: DataEntry, folder: Path, seed: int) -> list[str]:
    return [q.prompt.text for q in questions_of([data], folder, seed).questions]


def test_a_seed_draws_the_same_questions_again_and_another_seed_others(known: DataEntry, tmp_path: Path) -> None:
    drawn = [texts(known, tmp_path, seed) for seed in range(6)]
    assert all(len(set(each)) == 2 for each in drawn)
    assert drawn == [texts(known, tmp_path, seed) for seed in range(6)]
    assert len({tuple(each) for each in drawn}) > 1


def test_all_questions_of_a_file_stand_in_its_order(known: DataEntry, tmp_path: Path) -> None:
    whole = known.model_copy(update={"n": None})
    assert texts(whole, tmp_path, 3) == [f"The capital of {c} is" for c, _ in CAPITALS]


def test_a_csv_of_vqa_constraints_brings_its_answers_and_lists_what_is_missing(tmp_path: Path) -> None:
    picture().save(tmp_path / "oslo.png")
    rows = ["0,Where is this place?,Oslo,this place,x/oslo.png", "1,Where is this place?,Rome,this place,x/rome.png"]
    (tmp_path / "places.csv").write_text("\n".join([",question,place,main_entity,image_url", *rows]))
    (tmp_path / "answers.csv").write_text("entity,answer\nOslo,Norway\nRome,Italy\n")
    entry = DataEntry(path="places.csv", images=".", answers="answers.csv", substitute="Paris")
    found = questions_of([entry], tmp_path, 0)
    [question] = found.questions
    assert (question.answer, len(question.corruptions)) == ("Norway", 1)
    assert found.skipped == ("places.csv:3: there is no image 'rome.png'",)


def test_sets_are_joined_in_their_order(known: DataEntry, tmp_path: Path) -> None:
    atlas = DataEntry(atlas="textual", n=3)
    found = questions_of([atlas, known], tmp_path, 1).questions
    assert [q.prompt.text for q in found[3:]] == texts(known, tmp_path, 1)


def test_questions_are_edited_to_their_answers(known: DataEntry, tmp_path: Path) -> None:
    edits = edits_of([known], tmp_path, 0)
    asked = questions_of([known], tmp_path, 0).questions
    assert [r.target for r in edits.requests] == [q.answer for q in asked]
    assert [q.prompt.text for q in edited_questions(edits).questions] == [q.prompt.text for q in asked]
    assert [p.expected for p in edits.probes] == [q.answer for q in asked]


def test_questions_without_answers_cannot_be_edited_to_them(tmp_path: Path) -> None:
    line = {"text": "Where is Oslo?", "constraints": [{"text": "Oslo", "kind": "textual"}]}
    (tmp_path / "q.jsonl").write_text(json.dumps(line))
    with pytest.raises(InvalidInputError, match="no question has an answer to edit it to"):
        edits_of([DataEntry(path="q.jsonl")], tmp_path, 0)


def test_atlas_errata_are_edits_with_probes_of_their_own() -> None:
    edits = edits_of([DataEntry(atlas="errata", n=2)], Path(), 0)
    assert 1 <= len(edits.requests) <= 2
    assert {p.metric.value for p in edits.probes} >= {"efficacy", "image generalization"}


def test_a_model_comes_with_what_its_adapter_adds(furniture: Path, tmp_path: Path) -> None:
    (tmp_path / "model").symlink_to(furniture / "model")
    base = open_model(ModelEntry(source="model"), tmp_path)
    delta = random_delta(base.model, {1: 2})
    delta.save(tmp_path / "adapter")
    opened = open_model(ModelEntry(source="model", adapter="adapter"), tmp_path)
    assert base.deltas == ()
    assert [each.sha256 for each in opened.deltas] == [delta.sha256]
    assert opened.model.base_sha256 == base.model.base_sha256
