"""VQA-Constraints' files (methods.md §1) are joined to images and answers; what cannot be joined is listed."""

import csv
import json
from pathlib import Path

import pytest
from PIL import Image
from sets import KNOWN, ROWS, SAMPLE, table

from errata.editor.datasets.loading import load
from errata.editor.datasets.records import DatasetError, Kind, Span
from errata.editor.datasets.vqa_constraints import read_vqa_constraints
from errata.editor.errors import InvalidInputError


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for name in ("A photo of Space Needle.JPG", "A photo of Audible.com.png", "A photo of MacApp.webp"):
        Image.new("RGB", (4, 4), "red").save(folder / name)
    (folder / "A photo of MacApp.txt").write_text("no image")
    return folder


def written(path: Path, answers: object) -> Path:
    path.write_text(json.dumps(answers), encoding="utf-8")
    return path


def test_a_row_becomes_a_question_with_its_visual_constraint_and_image(tmp_path: Path, images: Path) -> None:
    found = read_vqa_constraints(table(tmp_path / "known.csv"), images=images, chat=False)
    assert found.skipped == ()
    assert [r.constraints for r in found.records] == [
        (Span(text=text, kind=Kind.VISUAL),) for text in ("This building", "This company", "This application,")
    ]
    assert [r.images[0].name for r in found.records] == [
        "A photo of Space Needle.JPG", "A photo of Audible.com.png", "A photo of MacApp.webp",
    ]  # fmt: skip
    assert [(r.id, r.answer, r.place) for r in found.records][2] == ("5", None, "known.csv:4")
    asked = load(found.records).questions
    assert [q.prompt.chat for q in asked] == [False] * 3


@pytest.mark.parametrize("entity", ["subject", "director", "title"])
def test_the_entity_s_column_has_any_name_and_may_join_the_answers(tmp_path: Path, images: Path, entity: str) -> None:
    path = table(tmp_path / "movies.csv", header=("", "question", entity, "main_entity", "image_url"))
    answers = tmp_path / "answers.csv"
    answers.write_text(f"{entity},answer\nspace needle,Seattle\nAudible.com,Amazon\nMacApp,Apple\n")
    found = read_vqa_constraints(path, images=images, answers=answers)
    assert [r.answer for r in found.records] == ["Seattle", "Amazon", "Apple"]


@pytest.mark.parametrize(
    "answers",
    [
        {"0": "Seattle", "2": "Amazon", "5": "Apple"},
        {"Space Needle": "Seattle", "Audible.com": "Amazon", "MacApp": "Apple"},
        {q: a for (_, q, *_), a in zip(ROWS, ("Seattle", "Amazon", "Apple"), strict=True)},
        [{"index": 0, "answer": "Seattle"}, {"index": 2, "answer": "Amazon"}, {"index": 5, "answer": "Apple"}],
        # As the known facts of Meng et al. are: named, and under numbers of their own.
        [
            {"known_id": 2, "subject": "Space Needle", "prompt": "Space Needle is located in", "attribute": "Seattle"},
            {"known_id": 0, "subject": "Audible.com", "prompt": "Audible.com is owned by", "attribute": "Amazon"},
            {"known_id": 1, "subject": "MacApp", "prompt": "MacApp, a product by", "attribute": "Apple"},
        ],
    ],
    ids=["index", "entity", "question", "rows", "known facts"],
)
def test_answers_are_joined_by_index_entity_or_question(tmp_path: Path, images: Path, answers: object) -> None:
    given = written(tmp_path / "answers.json", answers)
    found = read_vqa_constraints(table(tmp_path / "known.csv"), images=images, answers=given)
    assert [r.answer for r in found.records] == ["Seattle", "Amazon", "Apple"]


def test_what_cannot_be_joined_is_left_out_and_listed_with_its_line(tmp_path: Path, images: Path) -> None:
    rows = (
        *ROWS,
        ("6", "This city is in", "Trento", "This city", "./A photo of Trento"),
        ("7", "The building is in", "Space Needle", "This building", "./A photo of Space Needle"),
        ("8", "this building is in", "Space Needle", "This building", "./A photo of Space Needle"),
    )
    (images / "A photo of MacApp.png").write_bytes((images / "A photo of MacApp.webp").read_bytes())
    answers = written(
        tmp_path / "answers.json",
        [
            {"entity": "Space Needle", "question": "This building is located in", "answer": "Seattle"},
            {"entity": "Audible.com", "question": "This company is owned by", "answer": "Amazon"},
            {"entity": "Audible.com", "question": "This company is owned by", "answer": "Audible"},
        ],
    )
    found = read_vqa_constraints(table(tmp_path / "known.csv", rows), images=images, answers=answers)
    assert [r.answer for r in found.records] == ["Seattle"]
    for line, reason in zip(
        found.skipped,
        (
            "known.csv:3: the answers about 'Audible.com' disagree: 'Amazon', 'Audible'",
            "known.csv:4: 2 images are named 'A photo of MacApp': A photo of MacApp.png, A photo of MacApp.webp",
            "known.csv:5: there is no image 'A photo of Trento'",
            "known.csv:6: constraints[0].text: 'This building' does not occur in 'The building is in'",
            "known.csv:7: there is no answer to 'this building is in' about 'Space Needle'",
        ),
        strict=True,
    ):
        assert line.startswith(reason)


def test_a_constraint_in_another_case_is_taken_as_the_question_writes_it(tmp_path: Path, images: Path) -> None:
    path = table(tmp_path / "known.csv", [("8", "Is this building high?", "x", "This building", "A photo of MacApp")])
    [record] = read_vqa_constraints(path, images=images).records
    assert record.constraints[0].text == "this building"


@pytest.mark.parametrize(
    "header",
    [
        ("question", "subject", "main_entity", "image_url"),
        ("index", "question", "subject", "main_entity", "image_url"),
        ("", "subject", "question", "main_entity", "image_url"),
        (),
    ],
)
def test_wrong_columns_are_refused_with_what_there_has_to_be(
    tmp_path: Path, images: Path, header: tuple[str, ...]
) -> None:
    with pytest.raises(DatasetError, match=r"wrong\.csv:1: the columns are .*; there have to be an index"):
        read_vqa_constraints(table(tmp_path / "wrong.csv", header=header), images=images)


@pytest.mark.parametrize(
    ("rows", "problem"),
    [
        (",question,subject,main_entity,image_url\n", "wrong.csv:1: there are no rows"),
        (',question,subject,main_entity,image_url\n0,"a\nb",c,d,e\n1,a,b\n', "wrong.csv:4: it has 3 cells"),
        (',question,subject,main_entity,image_url\n0,"a"b,c,d,e\n', "wrong.csv:2: it is no CSV"),
    ],
)
def test_rows_that_are_no_rows_are_refused_with_their_line(
    tmp_path: Path, images: Path, rows: str, problem: str
) -> None:
    path = tmp_path / "wrong.csv"
    path.write_text(rows)
    with pytest.raises(DatasetError) as caught:
        read_vqa_constraints(path, images=images)
    assert str(caught.value).startswith(problem)


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("a.csv", "name,answer\nx,y\n", "a.csv:2: there is no column question, entity or index"),
        ("a.csv", "entity,target\nx,y\n", "a.csv:2: it has no answer"),
        ("a.csv", "entity,answer\nx\n", "a.csv:2: it has not the 2 cells of the header"),
        ("a.csv", "entity,answer\n", "a.csv:1: there are no answers"),
        ("a.json", "[", "a.json:1: it is no JSON"),
        ("a.json", "[3]", "a.json:1: give a list of objects"),
        ("a.json", '[{"entity": "x", "answer": ["y"]}]', "a.json:1: 'answer' of entry 0"),
        ("a.json", "[" * 100_000, "a.json:1: it is no JSON"),
    ],
)
def test_a_file_of_answers_that_cannot_be_used_is_refused(
    tmp_path: Path, images: Path, name: str, content: str, problem: str
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(DatasetError) as caught:
        read_vqa_constraints(table(tmp_path / "known.csv"), images=images, answers=tmp_path / name)
    assert str(caught.value).startswith(problem)


def test_files_and_folders_that_are_not_there_are_named(tmp_path: Path, images: Path) -> None:
    path = table(tmp_path / "known.csv")
    for given in ({"path": tmp_path / "no.csv"}, {"images": tmp_path / "no"}, {"answers": tmp_path / "no.json"}):
        with pytest.raises(InvalidInputError, match="no"):
            read_vqa_constraints(**({"path": path, "images": images} | given))  # type: ignore[arg-type]


def test_the_real_sample_is_read_and_joined_to_the_known_facts(tmp_path: Path) -> None:
    if not SAMPLE.exists() or not KNOWN.exists():
        pytest.skip(f"the sample is not at {SAMPLE}: it is data outside of the repository")
    with SAMPLE.open(encoding="utf-8", newline="") as file:
        for row in list(csv.DictReader(file))[:-1]:
            (tmp_path / f"{row['image_url']}.png").write_bytes(b"")
    found = read_vqa_constraints(SAMPLE, images=tmp_path)
    assert len(found.records) == 19
    assert found.skipped == (f"{SAMPLE.name}:21: there is no image 'A photo of Yellowstone National Park'",)
    told = {r.id: r.answer for r in read_vqa_constraints(SAMPLE, images=tmp_path, answers=KNOWN).records}
    assert len(told) == 15
    assert (told["1"], told["2"], told["5"], told["103"]) == ("Antarctica", "Apple", "Apple", "English")
