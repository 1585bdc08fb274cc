"""Baselines on file: bound to the questions that were asked, written whole, and read with suspicion."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from errata.client.check.baseline import read_baseline, write_baseline
from errata.client.check.checks import Checks, Probe, Question
from errata.client.check.errors import CheckError
from errata.client.check.judging import Subject

SUBJECT = Subject(name="atlas@3", base_sha256="ab" * 32, delta_sha256="cd" * 32)


def probe(name: str, *images: Path, prompt: str = "?", unchanged: bool = True, line: int = 7) -> Probe:
    return Probe(id=name, question=Question(prompt=prompt, images=images), unchanged=unchanged, line=line)


def checks(*probes: Probe) -> Checks:
    return Checks(path=Path("facts.errata.yaml"), probes=probes)


def test_a_baseline_comes_back_as_it_was_written_and_says_whose_it_is(tmp_path: Path) -> None:
    asked = checks(probe("a"), probe("b", prompt="Grüße?"))
    write_baseline(tmp_path / "old.json", asked, SUBJECT, {"a": "ja", "b": "nein\n"})
    found = read_baseline(tmp_path / "old.json")
    assert found.subject == SUBJECT
    assert found.answers_to(asked) == {"a": "ja", "b": "nein\n"}
    assert list(tmp_path.iterdir()) == [tmp_path / "old.json"]


def test_an_unchanged_probe_that_is_new_or_asks_something_else_is_named_with_its_line(tmp_path: Path) -> None:
    flag = tmp_path / "flag.png"
    flag.write_bytes(b"old")
    first = checks(probe("a"), probe("b", flag))
    write_baseline(tmp_path / "old.json", first, SUBJECT, {"a": "x", "b": "y"})
    found = read_baseline(tmp_path / "old.json")
    flag.write_bytes(b"new")
    with pytest.raises(CheckError) as caught:
        found.answers_to(checks(probe("a", prompt="other?", line=3), probe("b", flag, line=5), probe("c", line=9)))
    assert [p.line for p in caught.value.problems] == [3, 5, 9]
    assert "holds another question for 'a'; write it anew with --update" in str(caught.value)
    assert "holds no answer for 'c'" in str(caught.value)


def test_a_probe_that_may_change_needs_no_answer_in_it(tmp_path: Path) -> None:
    asked = checks(probe("a"))
    write_baseline(tmp_path / "old.json", asked, SUBJECT, {"a": "x"})
    more = checks(probe("a"), replace(probe("b"), unchanged=False, expected=("y",)))
    assert read_baseline(tmp_path / "old.json").answers_to(more) == {"a": "x"}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "this is no baseline (Invalid JSON"),
        ("[]", "this is no baseline (Input should be an object)"),
        ('{"version": 2, "subject": {}, "answers": {}}', "version: this is no baseline (Input should be 1)"),
        ('{"version": 1, "answers": {}}', "subject: this is no baseline (Field required)"),
    ],
)
def test_what_is_no_baseline_is_refused(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "old.json"
    path.write_text(text)
    with pytest.raises(CheckError) as caught:
        read_baseline(path)
    assert str(caught.value).startswith(f"{path}: {said}")
    assert str(caught.value).endswith("write one with --update")


def test_a_baseline_that_cannot_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    asked = checks(probe("a"))
    with pytest.raises(CheckError, match="cannot be written"):
        write_baseline(tmp_path / "none" / "old.json", asked, SUBJECT, {"a": "x"})
    path = tmp_path / "old.json"
    write_baseline(path, asked, SUBJECT, {"a": "x"})
    kept = path.read_text()
    with pytest.raises(UnicodeEncodeError):
        write_baseline(path, asked, SUBJECT, {"a": "\ud800"})
    assert path.read_text() == kept
    assert list(tmp_path.iterdir()) == [path]
    assert json.loads(kept)["answers"]["a"]["answer"] == "x"
