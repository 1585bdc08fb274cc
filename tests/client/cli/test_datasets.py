"""`errata dataset`: what is wrong with a set of questions, before anything is measured."""

import json
from pathlib import Path

import pytest
from commandline import Run
from PIL import Image

LINE = {
    "text": "What is the capital of this country?",
    "images": ["flag.png"],
    "constraints": [{"text": "this country", "kind": "visual"}],
    "answer": "Tallinn",
}


def written(folder: Path, *lines: object) -> Path:
    path = folder / "questions.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    Image.new("RGB", (8, 8)).save(folder / "flag.png")
    return path


@pytest.mark.usefixtures("installed")
def test_a_whole_data_set_is_counted_and_found_good(run: Run, tmp_path: Path) -> None:
    ran = run("dataset", "validate", written(tmp_path, LINE, LINE))
    assert ran.code == 0
    assert "questions                      2" in ran.out
    assert "nothing is wrong with it" in ran.out


@pytest.mark.usefixtures("installed")
def test_a_missing_image_and_a_wrong_field_are_told_with_their_lines(run: Run, tmp_path: Path) -> None:
    path = written(tmp_path, LINE, {**LINE, "images": ["gone.png"]}, {**LINE, "colour": "red"})
    ran = run("dataset", "validate", path, "--json")
    assert ran.code == 1
    assert ran.json()["counts"]["questions"] == 1
    assert [said.partition(": ")[0] for said in ran.json()["skipped"]] == ["questions.jsonl:2"]
    assert [said.partition(": ")[0] for said in ran.json()["problems"]] == ["questions.jsonl:3"]
    assert "gone.png" in run("dataset", "validate", path).out


@pytest.mark.usefixtures("installed")
def test_a_csv_without_its_images_is_a_wrong_command_line(run: Run, tmp_path: Path) -> None:
    ran = run("dataset", "validate", tmp_path / "movies.csv")
    assert (ran.code, "--images FOLDER" in ran.err) == (2, True)
    assert run("dataset", "validate", written(tmp_path, LINE), "--images", tmp_path).code == 2


@pytest.mark.usefixtures("installed")
def test_a_path_where_nothing_is_is_a_wrong_command_line_and_no_fault_of_ours(run: Run, tmp_path: Path) -> None:
    for path in (tmp_path / "nowhere", tmp_path):
        ran = run("dataset", "validate", path)
        assert ran.code == 2
        assert str(path) in ran.err
        assert "fault of errata" not in ran.err


def test_without_a_reader_the_remedy_is_named(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("errata.client.cli.datasets.GROUP", "errata.nobody")
    ran = run("dataset", "validate", written(tmp_path, LINE))
    assert (ran.code, "errata[server]" in ran.err) == (2, True)
