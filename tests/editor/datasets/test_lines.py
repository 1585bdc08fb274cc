"""Our format is read whole or refused with every problem's place, and what is written can be read back."""

import json
from pathlib import Path
from typing import Any

import pytest
from sets import LINE, THIS, picture, written

from errata.editor.datasets.lines import FILE, parse_lines, read_lines, write_lines
from errata.editor.datasets.loading import load, question
from errata.editor.datasets.records import DatasetError, Kind, Record, Span
from errata.editor.errors import ImageError, InvalidInputError
from errata.editor.measurements.questions import Box
from errata.editor.prompts import Constraint
from errata.editor.trace import OtherImage, Substitution


def said(folder: Path, *lines: dict[str, Any] | str) -> list[str]:
    return [str(problem) for problem in parse_lines(written(folder, *lines))[1]]


def test_a_line_becomes_the_question_it_says(tmp_path: Path) -> None:
    picture(tmp_path / "latvia.png", "red")
    line = LINE | {
        "text": "Which language do Finland and this country share?",
        "constraints": [
            {"text": "Finland", "kind": "textual", "substitute": "Austria"},
            {"text": "this country", "kind": "visual", "other_images": ["latvia.png"]},
        ],
        "answer": "Estonian", "box": [0, 0.25, 0.5, 1], "chat": False,
    }  # fmt: skip
    [found] = load(read_lines(written(tmp_path, line))).questions
    # The visual constraint comes first.
    assert found.constraints == (Constraint(text="this country"), Constraint(text="Finland"))
    assert found.kinds == (Kind.VISUAL, Kind.TEXTUAL)
    first, second = found.corruptions
    assert isinstance(first, OtherImage)
    assert first.images[0].getpixel((0, 0)) == (255, 0, 0)
    assert second == Substitution(word="Austria")
    assert (found.answer, found.box) == ("Estonian", Box(left=0, top=0.25, right=0.5, bottom=1))
    assert (found.prompt.text, found.prompt.chat) == (line["text"], False)
    assert found.prompt.images[0].getpixel((0, 0)) == (0, 0, 255)


def test_a_folder_stands_for_its_file_and_blank_lines_for_nothing(tmp_path: Path) -> None:
    written(tmp_path, "\ufeff" + json.dumps(LINE), "", LINE)
    assert [record.place for record in read_lines(tmp_path)] == [f"{FILE}:1", f"{FILE}:3"]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"text": ""}, "text: it is empty; give a text"),
        ({"text": 3}, "text: input should be a valid string"),
        ({"question": "x"}, "question: there is no such field; known: id, text, images"),
        ({"anwser": "x"}, "anwser: there is no such field; did you mean 'answer'?"),
        ({"constraints": []}, "constraints: it is empty; give at least one"),
        ({"constraints": [{"text": "this country"}]}, "constraints[0].kind: it is missing; give it"),
        ({"constraints": [THIS | {"kind": "seen"}]}, "constraints[0].kind: input should be 'visual' or 'textual'"),
        ({"constraints": [THIS | {"text": "This country"}]}, "constraints[0].text: 'This country' does not occur"),
        ({"constraints": [THIS | {"text": "t"}]}, "constraints[0].occurrence: 't' occurs 5 times; say which"),
        ({"constraints": [THIS | {"occurrence": 1}]}, "constraints[0].occurrence: 'this country' occurs 1 time(s)"),
        ({"constraints": [THIS | {"occurrence": -1}]}, "constraints[0].occurrence: 'this country' occurs 1 time(s)"),
        ({"constraints": [THIS, THIS | {"kind": "textual"}]}, "constraints[1]: it overlaps constraints[0]"),
        ({"constraints": [THIS, THIS | {"text": "capital"}]}, "constraints[1].kind: a question has one visual"),
        ({"images": []}, "constraints[0].kind: a visual constraint refers to an image"),
        ({"box": [0, 0, 1]}, "box[3]: it is missing; give it"),
        ({"box": [0, 0, 1.5, 1]}, "box: it does not lie in the image"),
        ({"box": ["0", 0, 1, 1]}, "box[0]: input should be a valid number"),
        ({"images": ["../x.png"]}, "images[0]: the path '../x.png' leads out of the data set's folder"),
        ({"images": ["/etc/passwd"]}, "images[0]: the path '/etc/passwd' leads out of the data set's folder"),
        ({"images": ["C:/x.png"]}, "images[0]: the path 'C:/x.png' leads out of the data set's folder"),
        ({"images": ["a\\b.png"]}, "images[0]: the path 'a\\\\b.png' has a character"),
        ({"images": ["a\x00b.png"]}, "images[0]: the path 'a\\x00b.png' has a character"),
        (
            {"constraints": [THIS | {"other_images": ["images/../../x.png"]}]},
            "constraints[0].other_images[0]: the path 'images/../../x.png' leads out",
        ),
        (
            {"constraints": [THIS | {"other_images": ["a.png", "b.png"]}]},
            "constraints[0].other_images: 2 would stand for 1 image(s)",
        ),
        (
            {"constraints": [THIS | {"other_images": ["a.png"], "substitute": "Paris"}]},
            "constraints[0].other_images: it has a substitute as well",
        ),
        (
            {"constraints": [THIS | {"substitute": "Paris"}, {"text": "capital", "kind": "textual"}]},
            "constraints: some say how they are corrupted and some do not",
        ),
        (
            {"constraints": [{"text": "capital", "kind": "textual", "other_images": ["a.png"]}]},
            "constraints[0].other_images: other images corrupt a visual constraint only",
        ),
    ],
)  # fmt: skip
def test_what_is_wrong_is_told_with_file_line_and_field(tmp_path: Path, change: dict[str, Any], problem: str) -> None:
    first, *_ = said(tmp_path, LINE, LINE | change)
    assert first.startswith(f"{FILE}:2: {problem}")


@pytest.mark.parametrize("line", ["{", "[]", "3", "{'text': 1}", "[" * 10_000, '{"text": "\\ud800"}', '{"box": [NaN]}'])
def test_a_line_that_is_no_object_is_told_and_the_next_one_still_read(tmp_path: Path, line: str) -> None:
    records, problems = parse_lines(written(tmp_path, line, LINE))
    assert {problem.line for problem in problems} == {1}
    assert len(records) == 1


def test_reading_names_every_problem_and_its_field_is_the_first_one_s_place(tmp_path: Path) -> None:
    with pytest.raises(DatasetError) as caught:
        read_lines(written(tmp_path, LINE | {"text": ""}, LINE, LINE | {"answer": " "}))
    assert [problem.line for problem in caught.value.problems] == [1, 3]
    assert str(caught.value).splitlines() == [
        f"{FILE}:1: text: it is empty; give a text",
        f"{FILE}:3: answer: it is empty; give a text",
    ]


def test_a_field_given_twice_is_not_lost(tmp_path: Path) -> None:
    line = json.dumps(LINE)[:-1] + ', "answer": "a", "answer": "b"}'
    assert said(tmp_path, line) == [f"{FILE}:1: answer: it is there more than once; give it once"]


def test_ids_are_unique(tmp_path: Path) -> None:
    assert said(tmp_path, LINE | {"id": "a"}, LINE | {"id": "a"}) == [
        f"{FILE}:2: id: line 1 has the id 'a' already; give this one another"
    ]


def test_a_link_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    secret = picture(tmp_path / "secret.png")
    folder = tmp_path / "set"
    written(folder, LINE)
    (folder / "link.png").symlink_to(secret)
    [problem] = said(folder, LINE | {"images": ["link.png"]})
    assert "is a link out of the data set's folder" in problem


@pytest.mark.parametrize("content", [b"", b"\n\n", b"\xff\xfe{}"])
def test_a_file_of_nothing_or_of_no_text_is_refused_with_its_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / FILE).write_bytes(content)
    with pytest.raises(DatasetError, match=f"{FILE}:1: "):
        read_lines(tmp_path)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="No such file"):
        read_lines(tmp_path)


def test_questions_whose_images_cannot_be_had_are_left_out_and_listed(tmp_path: Path) -> None:
    file = written(tmp_path, LINE | {"images": ["no.png"]}, LINE, LINE | {"images": ["bad.png"]})
    (tmp_path / "bad.png").write_bytes(b"no image")
    loaded = load(read_lines(file), skipped=("from before",))
    assert len(loaded.questions) == 1
    before, missing, bad = loaded.skipped
    assert (before, missing) == ("from before", f"{FILE}:1: there is no image 'no.png'")
    assert bad.startswith(f"{FILE}:3: images[0]: the image, which starts with b'no image', is none of PNG")


def test_where_nothing_can_be_asked_the_error_says_why(tmp_path: Path) -> None:
    file = written(tmp_path, LINE | {"images": ["no.png"]}, LINE | {"images": ["neither.png"]})
    with pytest.raises(InvalidInputError, match=r"no question that can be asked: .*'no\.png', and 1 more"):
        load(read_lines(file))


def test_no_more_images_are_opened_than_questions_asked_for(tmp_path: Path) -> None:
    records = read_lines(written(tmp_path, LINE, LINE | {"images": ["no.png"]}))
    assert load(records, limit=1).skipped == ()
    with pytest.raises(ImageError):
        question(records[1])


def records(tmp_path: Path) -> tuple[Record, ...]:
    one, two = picture(tmp_path / "a" / "flag.png"), picture(tmp_path / "b" / "FLAG.png", "red")
    this = Span(text="this country", kind=Kind.VISUAL, other_images=(two,))
    return (
        Record(text="“Où” is this country?", constraints=(this,), images=(one,), answer="là\u2028", id="1"),
        Record(text="Is it in it?", constraints=(Span(text="it", kind=Kind.TEXTUAL, occurrence=1),), chat=False),
        Record(text="a this country", constraints=(Span(text="this country", kind=Kind.VISUAL),), images=(one,),
               box=(0.0, 0.0, 0.5, 1.0)),
    )  # fmt: skip


def test_what_is_written_is_read_back_with_its_images(tmp_path: Path) -> None:
    given = records(tmp_path)
    found = read_lines(write_lines(tmp_path / "set", given))
    for before, after in zip(given, found, strict=True):
        assert (after.text, after.answer, after.id, after.box, after.chat) == (
            before.text, before.answer, before.id, before.box, before.chat,
        )  # fmt: skip
        assert [s.text for s in after.constraints] == [s.text for s in before.constraints]
        assert [p.read_bytes() for p in after.files] == [p.read_bytes() for p in before.files]
    # Two files of one name keep apart, also where a disk does not tell letters' case.
    assert sorted(p.name for p in (tmp_path / "set" / "images").iterdir()) == ["FLAG (2).png", "flag.png"]


def test_a_data_set_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    good, *_ = records(tmp_path)
    missing = Record(text="this", constraints=(Span(text="this", kind=Kind.VISUAL),), images=(tmp_path / "no.png",))
    wrong = Record(text="this", constraints=(Span(text="that", kind=Kind.TEXTUAL),))
    for bad in (missing, wrong):
        with pytest.raises(InvalidInputError):
            write_lines(tmp_path / "set", [good, bad])
        assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]
    with pytest.raises(InvalidInputError, match="is not empty"):
        write_lines(tmp_path / "a", [good])
