"""What a file of checks may say, and how it is told what is wrong with it: the line, the field, what to do."""

from collections.abc import Callable
from pathlib import Path

import jsonschema
import pytest
import yaml

from errata.client.check.checks import Match
from errata.client.check.errors import CheckError
from errata.client.check.format import load_checks, schema_text

ROOT = Path(__file__).parents[3]
Write = Callable[[str], Path]

ONE = """\
version: 1
probes:
  - id: estonia
    prompt: What is the currency of Estonia?
"""


def refused(path: Path) -> list[str]:
    with pytest.raises(CheckError) as caught:
        load_checks(path)
    return str(caught.value).replace(str(path), "FILE").splitlines()


def test_a_probe_has_its_place_and_takes_from_the_file_what_it_does_not_say(write: Write, tmp_path: Path) -> None:
    (tmp_path / "flag.png").write_bytes(b"PNG")
    checks = load_checks(
        write("""\
            version: 1
            max_new_tokens: 8
            match: contains
            baseline: old.json
            thresholds: {euro: 0.5}
            probes:
              - id: estonia
                prompt: What is the currency of this country?
                image: flag.png
                expected: [euro, euros]
                must_not: kroon
                tags: [euro, baltic]
                weight: 3

              - id: spell
                prompt: Spell Lagos.
                raw: true
                max_new_tokens: 2
                match: exact
                unchanged: true
        """)
    )
    estonia, spell = checks.probes
    assert estonia.question.images == (tmp_path / "flag.png",)
    assert (estonia.expected, estonia.must_not, estonia.weight) == (("euro", "euros"), ("kroon",), 3)
    assert (estonia.match, estonia.question.max_new_tokens, estonia.line) == (Match.CONTAINS, 8, 7)
    assert (spell.match, spell.question.max_new_tokens, spell.line) == (Match.EXACT, 2, 15)
    assert spell.question.raw
    assert spell.unchanged
    assert (checks.thresholds, checks.baseline) == ({"euro": 0.5}, tmp_path / "old.json")


def test_a_verdict_on_some_probes_takes_along_those_that_share_a_threshold(write: Write) -> None:
    checks = load_checks(
        write("""\
            version: 1
            thresholds: {a: 0.5, b: 0.5}
            probes:
              - {id: one, prompt: x, expected: y, tags: [a]}
              - {id: two, prompt: x, expected: y, tags: [a, free]}
              - {id: three, prompt: x, expected: y, tags: [b]}
              - {id: four, prompt: x, expected: y, tags: [free]}
        """)
    )
    judged = checks.judged_with({"two", "four"})
    assert [p.id for p in judged.probes] == ["one", "two", "four"]
    assert judged.thresholds == {"a": 0.5}


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (
            "    expcted: euro\n    unchanged: true",
            "FILE:5: probes[0].expcted: there is no such field; did you",
        ),
        ("    expected: no", "FILE:5: probes[0].expected: it has to be a text; put it in quotes"),
        ("    expected: 42", "FILE:5: probes[0].expected: it has to be a text; put it in quotes"),
        ("    expected: []", "FILE:5: probes[0].expected: it is empty; give at least one"),
        ("    must_not: ' '", "FILE:5: probes[0].must_not[0]: it is empty, or has spaces where none may be"),
        ("    tags: [a]", "FILE:3: probes[0]: it expects nothing; give expected, must_not or unchanged"),
        ("    unchanged: false", "FILE:3: probes[0]: it expects nothing; give expected, must_not or unchanged"),
        ("    unchanged: 'yes'", "FILE:5: probes[0].unchanged: input should be a valid boolean"),
        ("    expected: a\n    weight: 0", "FILE:6: probes[0].weight: input should be greater than 0"),
        ("    expected: a\n    weight: .inf", "FILE:6: probes[0].weight: input should be a finite number"),
        ("    expected: a\n    image: no.png", "FILE:6: probes[0].image: there is no image 'no.png' beside"),
        ("    expected: a\n    tags: [a b]", "FILE:6: probes[0].tags[0]: it is empty, or has spaces where"),
        ("    expected: a\n    expected: b", "FILE:6: the key 'expected' stands here twice; keep one"),
        ("    expected: a\nthresholds: {b: 0.5}", "FILE:6: thresholds.b: no probe has the tag 'b'; tag the probes"),
        ("    expected: a\nthresholds: {b: 50}", "FILE:6: thresholds.b: input should be less than or equal to 1"),
        ("    expected: a\nprobs: []", "FILE:6: probs: there is no such field; did you mean 'probes'?"),
        ("    expected: a\n  - just a text", "FILE:6: probes[1]: it has to be a mapping of fields to values"),
        ("    expected: a\n  - prompt: b\n    expected: c", "FILE:6: probes[1].id: it is missing; give it"),
        ("    expected: a: b", "FILE:5: this is no YAML: mapping values are not allowed here"),
        ("    expected: !!python/name:os.system", "FILE:5: this is no YAML: could not determine a constructor"),
        ("    expected: 2020-13-45", "FILE: this is no YAML: month must be in 1..12"),
    ],
)
def test_a_mistake_is_named_with_its_line_and_field(write: Write, more: str, said: str) -> None:
    (line,) = refused(write(f"{ONE}{more}\n"))
    assert line.startswith(said)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "FILE:1: the file is empty; write at least one entry"),
        ("# only a comment\n", "FILE:1: the file is empty; write at least one entry"),
        ("- a list\n", "FILE:1: it has to be a mapping of fields to values"),
        ("version: 1\nprobes: []\n", "FILE:2: probes: it is empty; give at least one"),
        ("probes: [{id: a, prompt: b, expected: c}]\n", "FILE:1: version: it is missing; give it"),
        ("version: 2\nprobes: [{id: a, prompt: b, expected: c}]\n", "FILE:1: version: input should be 1"),
        ("a: [\n", "FILE:2: this is no YAML: expected the node content, but found '<stream end>'"),
        ("a: 1\n---\nb: 2\n", "FILE:2: this is no YAML: but found another document"),
        ("\x07\n", "FILE:1: this is no YAML: it holds the character #x0007"),
    ],
)
def test_a_file_that_holds_no_checks_says_so_in_one_line(write: Write, text: str, said: str) -> None:
    assert refused(write(text))[0] == said


def test_every_mistake_is_told_at_once(write: Write) -> None:
    lines = refused(
        write("""\
            version: 1
            probes:
              - {id: a, prompt: b, expected: c}
              - {id: a, prompt: b, expected: c, image: no.png}
        """)
    )
    assert lines == [
        "FILE:4: probes[1].id: the probe on line 3 has the id 'a' already; give this one another",
        "FILE:4: probes[1].image: there is no image 'no.png' beside the file; check the path",
    ]


def test_a_file_that_cannot_be_read_or_is_not_in_utf8_is_refused(tmp_path: Path) -> None:
    assert refused(tmp_path / "no.yaml") == ["FILE: the file cannot be read: No such file or directory; check the path"]
    (tmp_path / "latin.yaml").write_bytes("version: é".encode("latin-1"))
    assert refused(tmp_path / "latin.yaml") == ["FILE: the file is not in UTF-8; save it so"]


def test_mistakes_stand_in_the_order_of_the_file(write: Write) -> None:
    text = """\
        max_new_tokens: 0
        probes:
          - {id: a, prompt: "?", expcted: b}
          - {id: b, prompt: "?"}
        version: 2
        nothing: here
    """
    places = [line.split(":")[1] for line in refused(write(text))]
    assert places == ["1", "3", "4", "5", "6"]


def test_aliases_that_would_grow_without_bound_are_refused_at_once(write: Write) -> None:
    nine = [", ".join([f"*a{i - 1}"] * 9) for i in range(1, 30)]
    for first, rest in (("[x, x]", "[{}]"), ("{k: x}", "{{<<: [{}]}}")):
        bomb = "\n".join([f"a0: &a0 {first}", *(f"a{i}: &a{i} {rest.format(n)}" for i, n in enumerate(nine, 1))])
        [said] = refused(write(f"{bomb}\nversion: 1\nprobes: *a29\n"))
        assert said.startswith("FILE: with all that its aliases (*) repeat it has ")
        assert said.endswith(" parts; 1000000 are read at most")


def test_a_merged_default_holds_and_its_mistakes_are_found(write: Write) -> None:
    text = """\
        version: 1
        probes:
          - &first {id: a, prompt: b, expected: c}
          - {<<: *first, id: b, weight: WEIGHT}
    """
    assert [p.weight for p in load_checks(write(text.replace("WEIGHT", "2"))).probes] == [1, 2]
    (line,) = refused(write(text.replace("WEIGHT", "-2")))
    assert line == "FILE:4: probes[1].weight: input should be greater than 0"


def test_the_schema_in_the_package_is_that_of_the_code_and_takes_the_example() -> None:
    shipped = (ROOT / "client/errata/client/check/checks.schema.json").read_text(encoding="utf-8")
    assert shipped == schema_text(), "errata check --schema > client/errata/client/check/checks.schema.json"
    validator = jsonschema.Draft202012Validator(yaml.safe_load(shipped))
    example = yaml.safe_load((ROOT / "examples/ci/atlas.errata.yaml").read_text(encoding="utf-8"))
    validator.validate(example)
    del example["probes"][0]["expected"], example["probes"][0]["must_not"]
    assert not validator.is_valid(example)
