"""Files of requests, probes and questions, and what is said of those that cannot be meant."""

from pathlib import Path

import pytest

from errata.client import Box, Constraint, Context, EditRequest, MeasuredQuestion, OtherImages, Probe, Prompt
from errata.client.cli.files import FileError, edit_file, measured, probes, questions

EXAMPLES = Path(__file__).parents[3] / "examples"
REQUEST = """\
requests:
  - name: "Kazakhstan: capital"
    prompt: What is the capital of Kazakhstan?
    constraint: Kazakhstan
    subject: Kazakhstan
    target: Astana
  - target: Euro
    contexts:
      - {prompt: "What does this country pay in?", image: flag.png, constraint: this country}
    preserve:
      - {prompt: "What is the capital of Croatia?", constraint: Croatia, answer: Zagreb}
probes:
  - {prompt: "What is the capital of Norway?", metric: other_subjects}
layers: [1, 2]
guardrails: {efficacy: 0.9}
"""


def written(folder: Path, text: str, name: str = "file.yaml") -> Path:
    (folder / "flag.png").write_bytes(b"a picture")
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def problem(folder: Path, text: str, name: str = "file.yaml") -> str:
    path = written(folder, text, name)
    with pytest.raises(FileError) as caught:
        edit_file(path)
    said = str(caught.value)
    assert "\n" not in said
    return said.removeprefix(str(folder) + "/")


def test_a_yaml_file_has_requests_and_options(tmp_path: Path) -> None:
    read = edit_file(written(tmp_path, REQUEST))
    assert read.requests[0] == EditRequest(
        name="Kazakhstan: capital",
        contexts=[
            Context(Prompt("What is the capital of Kazakhstan?", []), Constraint("Kazakhstan"), subject="Kazakhstan")
        ],
        target="Astana",
        preserve=[],
    )
    assert read.requests[1].name == "What does this country pay in?"
    assert read.requests[1].contexts[0].prompt == Prompt("What does this country pay in?", [tmp_path / "flag.png"])
    assert read.requests[1].preserve[0].answer == "Zagreb"
    assert read.options["layers"] == [1, 2]
    assert read.options["guardrails"] == {"efficacy": 0.9}
    assert read.options["probes"] == [Probe("other_subjects", Prompt("What is the capital of Norway?", []))]


def test_a_jsonl_file_has_one_request_a_line(tmp_path: Path) -> None:
    line = '{"prompt": "What is the capital of Kazakhstan?", "constraint": "Kazakhstan", "target": "Astana"}\n'
    read = edit_file(written(tmp_path, line + "\n" + line, "file.jsonl"))
    assert [each.target for each in read.requests] == ["Astana", "Astana"]
    assert read.options == {}


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("target: Astana", "targt: Astana", "file.yaml:2: requests[0].target: it is missing; give it"),
        (
            "    subject",
            "    subjct",
            "file.yaml:5: requests[0].subjct: there is no such field; did you mean 'subject'?",
        ),
        ("Astana", "no", "file.yaml:6: requests[0].target: it has to be a text; put it in quotes"),
        ("Astana", '" "', "file.yaml:6: requests[0].target: it is empty"),
        ("flag.png", "flg.png", "file.yaml:9: requests[1].contexts[0].image: there is no image 'flg.png'"),
        ("    constraint: Kazakhstan\n", "", "file.yaml:2: requests[0]: constraint is missing"),
        ("[1, 2]", "{1: 2}", "file.yaml:14: layers: give layers like [1, 2]"),
        ("0.9", "high", "file.yaml:15: guardrails.efficacy: input should be a valid number"),
        (
            "metric: other",
            "metrc: other",
            "file.yaml:13: probes[0].metrc: there is no such field; did you mean 'metric'?",
        ),
        ("  - target", " - target", "file.yaml:7: this is no YAML"),
        ("metric: other_subjects", "image: no.png", "file.yaml:13: probes[0].image: there is no image 'no.png'"),
        (
            "  - target: Euro",
            "  - target: Euro\n    subject: Croatia",
            "file.yaml:7: requests[1]: subject would belong to no question; move it into the contexts",
        ),
        ("layers:", "probes:", "file.yaml:14: the key 'probes' stands here twice"),
    ],
)
def test_an_error_names_the_file_the_line_the_field_and_what_to_do(
    old: str, new: str, said: str, tmp_path: Path
) -> None:
    assert old in REQUEST
    assert problem(tmp_path, REQUEST.replace(old, new, 1)).startswith(said)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"prompt": "A?"}\n{"prompt": "B?"', "file.jsonl:2: this is no JSON"),
        ('{"target": "A", "target": "B"}', "file.jsonl:1: this is no JSON: a key stands there twice"),
        ('\n{"prompt": "A?", "constraint": "A"}', "file.jsonl:2: [0].target: it is missing; give it"),
        ("", "file.jsonl: the file is empty"),
    ],
)
def test_an_error_in_jsonl_names_the_line(text: str, said: str, tmp_path: Path) -> None:
    assert problem(tmp_path, text, "file.jsonl").startswith(said)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileError, match=r"none\.yaml: .*check the path"):
        probes(tmp_path / "none.yaml")


def test_probes_are_a_list_or_stand_under_their_name(tmp_path: Path) -> None:
    probe = "{prompt: 'What is the capital of Kazakhstan?', expected: Astana, image: [flag.png]}"
    expected = [Probe("efficacy", Prompt("What is the capital of Kazakhstan?", [tmp_path / "flag.png"]), "Astana")]
    assert probes(written(tmp_path, f"- {probe}")) == expected
    assert probes(written(tmp_path, f"probes: [{probe}]")) == expected


def test_a_file_of_checks_does_for_probes(tmp_path: Path) -> None:
    checks = (
        "version: 1\nprobes:\n  - {id: a, prompt: 'Who?', expected: I}\n  - {id: b, prompt: 'Why?', unchanged: true}\n"
    )
    found = probes(written(tmp_path, checks))
    assert [(p.metric, p.expected) for p in found] == [("efficacy", "I"), ("unrelated", None)]
    with pytest.raises(FileError, match=r"file\.yaml:3: a: only errata check can judge must_not"):
        probes(written(tmp_path, checks.replace("expected: I", "must_not: I")))


def test_questions_to_trace_are_corrupted_by_a_word_or_a_picture(tmp_path: Path) -> None:
    text = """
- {prompt: 'The capital of Norway?', constraint: Norway, substitute: Peru}
- {prompt: 'The capital of this country?', constraint: this country, image: flag.png, other_image: flag.png}
"""
    first, second = questions(written(tmp_path, text))
    assert first.substitute == "Peru"
    assert second.other_images == [tmp_path / "flag.png"]


@pytest.mark.parametrize("key", ["facts", "edits"])
def test_a_file_without_requests_is_shown_an_example_and_what_stands_there_instead(key: str, tmp_path: Path) -> None:
    said = problem(tmp_path, REQUEST.replace("requests:", f"{key}:"))
    assert (
        said == f"file.yaml:1: requests: it is missing (there is {key!r}); examples/facts.yaml shows how it is written"
    )


def test_a_question_to_trace_without_what_corrupts_it_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path, "questions:\n  - {prompt: 'The capital of Norway?', constraint: Norway}\n")
    with pytest.raises(FileError, match=r"file\.yaml:2: questions\[0\]: nothing corrupts it, .* give a substitute or"):
        questions(path)


def test_the_example_files_hold_what_their_comments_promise() -> None:
    read = edit_file(EXAMPLES / "facts.yaml")
    assert [request.target for request in read.requests] == ["Astana", "euro"]
    assert read.requests[0].contexts[1].prompt.images == [EXAMPLES / "ci/flags/kazakhstan.jpg"]  # type: ignore[union-attr]
    assert all(request.preserve for request in read.requests)
    assert read.options["layers"] == [1]
    assert [probe.expected for probe in probes(EXAMPLES / "probes.yaml")] == ["Astana", "Astana", None, None]
    assert [question.substitute for question in questions(EXAMPLES / "questions.yaml")] == ["Norway", None]


def test_a_file_that_names_itself_is_refused(tmp_path: Path) -> None:
    assert "file.yaml" in problem(tmp_path, "requests: &a\n  - *a\n")


MEASURED = """\
- {prompt: "Capital of Norway?", constraint: Norway, substitute: Peru, answer: Oslo}
- prompt: "Does this country use the euro?"
  image: flag.png
  constraints: [this country, {text: euro, occurrence: 0}]
  corruptions: [{other_image: flag.png}, yen]
  box: [0, 0.5, 1, 1]
- {prompt: "Capital of Peru?", constraint: Peru, occurrence: 0}
"""


def test_questions_to_measure_have_one_constraint_or_several(tmp_path: Path) -> None:
    one, several, alone = measured(written(tmp_path, MEASURED))
    assert one == MeasuredQuestion(
        Prompt("Capital of Norway?", []), [Constraint("Norway")], corruptions=["Peru"], answer="Oslo"
    )
    assert several == MeasuredQuestion(
        Prompt("Does this country use the euro?", [tmp_path / "flag.png"]),
        [Constraint("this country"), Constraint("euro", 0)],
        corruptions=[OtherImages([tmp_path / "flag.png"]), "yen"],
        box=Box(0, 0.5, 1, 1),
    )
    assert alone == MeasuredQuestion(Prompt("Capital of Peru?", []), [Constraint("Peru", 0)], corruptions=[])


def test_a_file_of_questions_to_trace_can_be_measured() -> None:
    path = EXAMPLES / "questions.yaml"
    assert [each.prompt for each in measured(path)] == [each.prompt for each in questions(path)]
    assert len(measured(EXAMPLES / "measured.yaml")) == 4


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("- {prompt: a}", "file.yaml:1: [0]: it needs a constraint, or several in constraints; give one of them"),
        ("- {prompt: a, constraint: a, constraints: [a]}", "[0]: it needs a constraint, or several in constraints"),
        ("- {prompt: a, constraints: [a], substitute: b}", "[0]: substitute would belong to no constraint"),
        ("- {prompt: a, constraint: a, substitute: b, corruptions: [b]}", "[0]: substitute would belong to no"),
        ("- {prompt: a, constraints: [a], occurrence: 0}", "[0]: occurrence would belong to no constraint"),
        ("- {prompt: a, constraints: [a], corruptions: [{}]}", "[0]: nothing corrupts it; give each"),
        ("- {prompt: a, constraint: a, substitute: b, other_image: flag.png}", "[0]: two things corrupt it"),
        ("- {prompt: a, constraint: a, box: [0, 1]}", "[0].box: "),
        ("- {prompt: a, constraints: [a], corruptions: [{other_image: no.png}]}", "there is no image 'no.png'"),
        ("- {prompt: a, constrain: a}", "there is no such field; did you mean 'constraint'?"),
    ],
)
def test_questions_to_measure_that_cannot_be_meant_are_refused(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(FileError) as refused:
        measured(written(tmp_path, text))
    assert said in str(refused.value)


def test_a_trace_is_told_what_only_a_measurement_takes(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="box, constraints are for errata measure; give a constraint"):
        questions(written(tmp_path, "- {prompt: a, constraints: [a], box: [0, 0, 1, 1]}"))


def test_a_data_set_is_measured_with_its_visual_constraint_first(tmp_path: Path) -> None:
    line = (
        '{"id": "a", "text": "Does this country use the euro?", "images": ["flag.png"], "answer": "yes", '
        '"chat": false, '
        '"box": [0, 0, 1, 0.5], "constraints": [{"text": "euro", "kind": "textual", "substitute": "yen"}, '
        '{"text": "this country", "kind": "visual", "occurrence": 0, "other_images": ["flag.png"]}]}\n'
    )
    [found] = measured(written(tmp_path, line, "questions.jsonl"))
    flag = [tmp_path / "flag.png"]
    assert found == MeasuredQuestion(
        Prompt("Does this country use the euro?", flag, raw=True),
        [Constraint("this country", 0), Constraint("euro")],
        corruptions=[OtherImages(flag), "yen"],
        answer="yes",
        box=Box(0, 0, 1, 0.5),
        kinds=("visual", "textual"),
    )


def test_known_facts_are_measured_without_a_chat_template(tmp_path: Path) -> None:
    known = (
        '[{"known_id": 1, "subject": "Beats Music", "attribute": "Apple", "template": "{} is owned by", '
        '"prediction": " Apple", "prompt": "Beats Music is owned by", "relation_id": "P127"}, '
        '{"subject": "Rome", "attribute": "Italy", "prompt": "Rome: Rome is in"}]'
    )
    one, twice = measured(written(tmp_path, known, "known.json"))
    assert one == MeasuredQuestion(
        Prompt("Beats Music is owned by", [], raw=True), [Constraint("Beats Music")], corruptions=[], answer="Apple"
    )
    assert twice.constraints == [Constraint("Rome", 0)]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"text": "a"}', "questions.jsonl:1: [0]: it needs a constraint"),
        ('{"text": "a", "constraints": "a"}', "questions.jsonl:1: [0].constraints: it has to be a list"),
        ('{"text": "a", "constraints": [{"kind": "textual"}]}', "[0].constraints[0].text: it is missing"),
        ('{"text": "a", "constraints": [{"text": "a", "kid": 1}]}', "[0].constraints[0].kid: there is no such field"),
        ('{"text": "a", "images": ["no.png"], "constraints": [{"text": "a"}]}', "there is no image 'no.png'"),
    ],
)
def test_a_line_of_a_data_set_that_cannot_be_meant_is_named(tmp_path: Path, line: str, said: str) -> None:
    with pytest.raises(FileError) as refused:
        measured(written(tmp_path, line, "questions.jsonl"))
    assert said in str(refused.value)


def test_a_data_sets_folder_stands_for_its_questions_and_no_other_folder_does(tmp_path: Path) -> None:
    line = '{"text": "Capital of Peru?", "constraints": [{"text": "Peru", "kind": "textual"}]}'
    assert measured(written(tmp_path, line, "questions.jsonl").parent) == measured(tmp_path / "questions.jsonl")
    (tmp_path / "other").mkdir()
    with pytest.raises(FileError, match="other: it is a folder; name a file in it"):
        measured(tmp_path / "other")


def test_a_missing_image_is_named_with_where_it_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(FileError) as refused:
        measured(written(tmp_path, "- {prompt: a, constraint: a, image: ../flags/no.png}"))
    assert f"there is no image '../flags/no.png' beside the file ({tmp_path}/../flags/no.png)" in str(refused.value)


def test_a_file_of_something_else_is_told_the_example_that_does(tmp_path: Path) -> None:
    path = written(tmp_path, "facts: []")
    for read, example in ((measured, "measured"), (questions, "questions"), (probes, "probes"), (edit_file, "facts")):
        with pytest.raises(FileError, match=f"examples/{example}.yaml shows how it is written"):
            read(path)
