"""A data set is judged without being decoded, and without anything that a client's machine lacks."""

import subprocess
import sys
from pathlib import Path

import pytest
from sets import LINE, THIS, table, written

from errata.editor.datasets.validate import validate
from errata.editor.errors import InvalidInputError


def test_a_data_set_in_order_is_counted(tmp_path: Path) -> None:
    both = {
        "constraints": [THIS | {"substitute": "Paris"}, {"text": "capital", "kind": "textual", "substitute": "sea"}]
    }
    found = validate(written(tmp_path, LINE, LINE | {"answer": "Tallinn", "box": [0, 0, 1, 1]}, LINE | both))
    assert found.complete
    assert found.counts == {
        "questions": 3,
        "images": 1,
        "with a visual constraint only": 2,
        "with textual constraints only": 0,
        "with both": 1,
        "with an answer": 1,
        "with a corruption": 1,
        "with a box": 1,
    }


def test_missing_images_are_listed_and_what_remains_is_usable(tmp_path: Path) -> None:
    found = validate(written(tmp_path, LINE, LINE | {"images": ["no.png"]}))
    assert found.skipped == ("questions.jsonl:2: there is no image 'no.png'",)
    assert (found.usable, found.complete, found.counts["questions"]) == (True, False, 1)


def test_a_data_set_of_missing_images_only_is_not_usable(tmp_path: Path) -> None:
    assert not validate(written(tmp_path, LINE | {"images": ["no.png"]})).usable


@pytest.mark.parametrize("line", ["{", {}, LINE | {"text": "What?"}])
def test_problems_are_listed_with_their_lines(tmp_path: Path, line: dict[str, object] | str) -> None:
    found = validate(written(tmp_path, LINE, line))
    assert {problem.line for problem in found.problems} == {2}
    assert not found.usable


def test_a_file_that_is_no_text_is_a_problem_of_it(tmp_path: Path) -> None:
    (tmp_path / "questions.jsonl").write_bytes(b"{}\n\xff")
    assert [problem.line for problem in validate(tmp_path).problems] == [2]


def test_vqa_constraints_are_judged_with_the_images_that_they_need(tmp_path: Path) -> None:
    path = table(tmp_path / "known.csv")
    images = tmp_path / "images"
    images.mkdir()
    (images / "A photo of MacApp.png").write_bytes(b"")
    found = validate(path, images=images)
    assert (found.counts["questions"], len(found.skipped)) == (1, 2)
    with pytest.raises(InvalidInputError, match="give their folder"):
        validate(path)
    assert validate(table(tmp_path / "wrong.csv", header=("a",)), images=images).problems[0].line == 1


def test_images_and_answers_are_not_joined_to_a_data_set_that_names_its_own(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="joined to a CSV"):
        validate(written(tmp_path, LINE), images=tmp_path)


def test_checking_needs_neither_torch_nor_pillow_nor_numpy() -> None:
    code = (
        "import sys\n"
        "sys.modules |= dict.fromkeys(('torch', 'PIL', 'numpy', 'transformers'))\n"  # importing them now fails
        "import errata.editor.datasets.validate, errata.editor.datasets.annotate"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": ":".join(sys.path)})
