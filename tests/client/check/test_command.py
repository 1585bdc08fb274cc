"""`errata check` through its real entry point, against a server whose candidate has forgotten Norway."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from xml.etree import ElementTree

import grpc
import pytest
from fake_server import CAPITAL, Fake, Fault, serving

from errata.client.cli import main

Write = Callable[..., Path]
Run = Callable[..., int]

CHECKS = """\
version: 1
thresholds: {facts: 0.5}
probes:
  - id: kazakhstan
    prompt: What is the capital of Kazakhstan?
    expected: Astana
    tags: [facts]
  - id: kazakhstan-as-it-was
    prompt: What is the capital of Kazakhstan?
    expected: Nur-Sultan
    tags: [facts]
  - id: norway
    prompt: What is the capital of Norway?
    unchanged: true
  - id: nobody
    prompt: Who knows?
    expected: unknown
"""
GOOD = CHECKS.replace("unchanged: true", "must_not: Lima")


@pytest.fixture(autouse=True)
def _plain_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """80 columns, and no GitHub even where these tests run there."""
    monkeypatch.setenv("COLUMNS", "80")
    for name in ("GITHUB_ACTIONS", "GITHUB_STEP_SUMMARY", "GITHUB_WORKSPACE", "ERRATA_SERVER", "ERRATA_TOKEN"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def run(edited: Fake, server: str) -> Run:
    """`errata check` on the server; its exit code."""

    def running(path: Path, *options: str) -> int:
        return main(["check", str(path), "--server", server, "--model", "atlas", *options])

    return running


def test_a_version_that_says_what_it_must_passes(run: Run, write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(write(GOOD), "--baseline", "0") == 0
    out = capsys.readouterr().out
    assert out.splitlines()[-1].strip() == "passed: 1 of 4 fail within their thresholds"


def test_a_regression_ends_with_1_and_names_what_broke_and_what_was_fixed(
    run: Run, write: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(write(CHECKS), "--baseline", "0") == 1
    out, err = capsys.readouterr()
    rows = [line.split() for line in out.splitlines()]
    assert ["broken", "norway", ":12", "as", "before", "Oslo", "Bergen"] in rows
    assert ["fixed", "kazakhstan", ":4", "Astana", "Nur-Sultan", "Astana"] in rows
    assert "nobody" not in out
    assert "regressed: 1 of 4 probes fail; 1 of 4 fail within their thresholds" in out
    assert max(map(len, out.splitlines())) <= 80
    assert "\x1b" not in out
    assert err == ""


def test_what_the_baseline_says_as_wrongly_is_failing_and_no_regression(
    run: Run, write: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write('version: 1\nprobes:\n  - {id: nobody, prompt: "Who knows?", expected: I}\n')
    assert run(path, "--baseline", "0") == 1
    assert capsys.readouterr().out.splitlines()[-1].strip() == "failing: 1 of 1 probes fail"


def test_a_narrow_terminal_gets_one_line_a_field(
    run: Run, write: Write, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    assert run(write(CHECKS), "--baseline", "0") == 1
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 40
    assert ["broken", "norway", ":12"] in [line.split() for line in out.splitlines()]
    assert ["now", "Bergen"] in [line.split() for line in out.splitlines()]


def test_all_shows_what_holds_as_well(run: Run, write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(write(GOOD), "--baseline", "0", "--all") == 0
    assert "nobody :15" in capsys.readouterr().out


def test_what_a_model_says_cannot_move_the_cursor_or_style_the_table(
    run: Run, write: Write, edited: Fake, capsys: pytest.CaptureFixture[str]
) -> None:
    edited._answer = _raw(edited, "\x1b[2J[bold]x[/bold]")  # type: ignore[method-assign]
    assert run(write(CHECKS), "--baseline", "0") == 1
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "[bold]" in out


def _raw(fake: Fake, text: str) -> Callable[..., object]:
    answer = type(fake)._answer

    def raw(request: object, context: grpc.ServicerContext) -> object:
        found = answer(fake, request, context)
        found.text = text
        return found

    return raw


def test_a_long_id_is_kept_whole_and_long_answers_are_folded(
    run: Run, write: Write, edited: Fake, capsys: pytest.CaptureFixture[str]
) -> None:
    edited._answer = _raw(edited, "word " * 12)  # type: ignore[method-assign]
    assert (
        run(write(CHECKS.replace("id: norway", "id: what-is-the-capital-of-norway")), "--baseline", "0", "--all") == 1
    )
    out = capsys.readouterr().out
    assert "what-is-the-capital-of-norway :12" in out
    assert max(map(len, out.splitlines())) <= 80


def test_two_runs_say_the_same_and_ask_greedily_by_number(
    run: Run, write: Write, edited: Fake, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(CHECKS)
    documents = []
    for _ in range(2):
        assert run(path, "--baseline", "0", "--json") == 1
        documents.append(json.loads(capsys.readouterr().out))
    assert documents[0] == documents[1]
    asked = [r for r in edited.requests if r.DESCRIPTOR.name == "GenerateRequest"]
    assert {r.version for r in asked} == {"models/atlas/versions/0", "models/atlas/versions/1"}
    assert {r.sampling.temperature for r in asked} == {0.0}
    assert {r.max_new_tokens for r in asked} == {32}


def test_json_is_one_document_with_every_probe(run: Run, write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(write(CHECKS), "--baseline", "0", "--json") == 1
    said = json.loads(capsys.readouterr().out)
    assert (said["passed"], said["version"]["name"], said["baseline"]["name"]) == (False, "atlas@1", "atlas@0")
    assert [(p["id"], p["verdict"], p["state"]) for p in said["probes"]] == [
        ("kazakhstan", "passed", "fixed"),
        ("kazakhstan-as-it-was", "tolerated", "broken"),
        ("norway", "failed", "broken"),
        ("nobody", "passed", "passed"),
    ]
    assert said["probes"][2]["faults"] == ["was 'Oslo', now 'Bergen'"]
    assert said["thresholds"] == [{"tag": "facts", "probes": 2, "share": 0.5, "least": 0.5, "met": True}]


def test_junit_fails_where_the_check_does_and_only_there(run: Run, write: Write, edited: Fake, tmp_path: Path) -> None:
    edited.answers["models/atlas/versions/1"]["What is the capital of Norway?"] = "Bergen"
    file = tmp_path / "errata.xml"
    assert run(write(CHECKS.replace("0.5", "0.75")), "--baseline", "0", "--junit", str(file)) == 1
    (suite,) = ElementTree.parse(file).getroot()
    assert (suite.get("tests"), suite.get("failures"), suite.get("skipped")) == ("5", "3", "0")
    failed = {case.get("name") for case in suite.iter("testcase") if case.find("failure") is not None}
    assert failed == {"kazakhstan-as-it-was", "norway", "facts"}
    assert run(write(GOOD), "--baseline", "0", "--junit", str(file)) == 0
    (suite,) = ElementTree.parse(file).getroot()
    assert (suite.get("failures"), suite.get("skipped")) == ("0", "1")
    norway = next(case for case in suite.iter("testcase") if case.get("name") == "norway")
    assert norway.get("line") == "12"


def test_junit_holds_characters_that_xml_cannot(run: Run, write: Write, tmp_path: Path) -> None:
    file = tmp_path / "errata.xml"
    text = GOOD.replace("prompt: Who knows?", r'prompt: "Who\a <&\uffff knows?"').replace("unknown", "me")
    assert run(write(text), "--junit", str(file)) == 1
    (failure,) = ElementTree.parse(file).findall(".//testcase[@name='nobody']/failure")
    assert "Who\ufffd <&\ufffd knows?" in (failure.text or "")


def test_a_file_that_cannot_be_written_leaves_json_one_document(
    run: Run, write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "taken").mkdir()
    assert run(write(GOOD), "--junit", str(tmp_path / "taken"), "--json") == 2
    assert "taken: the file cannot be written" in json.loads(capsys.readouterr().out)["error"]["message"]
    assert sorted(each.name for each in tmp_path.iterdir()) == ["facts.errata.yaml", "taken"]


def test_a_version_that_names_its_model_needs_no_other_word(
    edited: Fake, server: str, write: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(write(GOOD))
    assert main(["check", path, "--server", server, "--version", "atlas@1"]) == 0
    assert main(["check", path, "--server", server]) == 2
    assert "'candidate' is of which model? Say atlas@candidate or tiny@candidate" in capsys.readouterr().err


def test_github_gets_annotations_at_the_probes_lines_and_a_summary(
    run: Run,
    write: Write,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    edited: Fake,
) -> None:
    summary = tmp_path / "summary.md"
    summary.write_text("before\n")
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(summary))
    monkeypatch.setenv("GITHUB_WORKSPACE", str(tmp_path))
    edited._answer = _raw(edited, "100 %\n|`<b>`|")  # type: ignore[method-assign]
    assert run(write(CHECKS), "--baseline", "0", "--json") == 1
    out, err = capsys.readouterr()
    assert json.loads(out)
    assert (
        "::error file=facts.errata.yaml,line=4,title=kazakhstan (failing)::What is the capital of Kazakhstan? "
        "expected 'Astana', got '100 %25\\n|`<b>`|'"
    ) in err.splitlines()
    assert "::error file=facts.errata.yaml,line=1,title=threshold::facts: 0.000 of 2 probes" in err
    text = summary.read_text()
    assert text.startswith("before\n### errata check: atlas@1 against atlas@0\n")
    assert "100 % \\|\\`&lt;b&gt;\\`\\|" in text


def test_githubs_runner_carries_out_nothing_that_a_model_says(
    run: Run, write: Write, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], edited: Fake
) -> None:
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    edited._answer = _raw(edited, "a\n\n\n::debug::x\n##[error]no")  # type: ignore[method-assign]
    assert run(write(CHECKS), "--baseline", "0") == 1
    lines = capsys.readouterr().out.splitlines()
    token = lines[0].removeprefix("::stop-commands::")
    assert len(token) == 32
    end = lines.index(f"::{token}::")
    said = [i for i, line in enumerate(lines) if line.strip().startswith("::debug::x")]
    assert said
    assert max(said) < end
    heard = lines[end + 1 :]
    assert heard
    assert all(line.startswith(("::error ", "::warning ")) for line in heard)
    assert run(write(CHECKS), "--baseline", "0", "--json") == 1
    out = capsys.readouterr().out
    assert "##[" not in out
    assert "##[error]no" in json.loads(out)["probes"][0]["answer"]


def test_github_is_told_as_well_why_a_check_could_not_run(
    run: Run, write: Write, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    monkeypatch.chdir(tmp_path)
    assert run(write(CHECKS.replace("prompt: Who", "prmpt: Who"))) == 2
    assert "::error file=facts.errata.yaml,line=16,title=errata check could not run::probes[3].prmpt:" in (
        capsys.readouterr().err
    )
    assert run(write(GOOD), "--version", "9") == 2
    assert "::error title=errata check could not run::no 'models/atlas/versions/9'" in capsys.readouterr().err


def test_an_updated_baseline_stands_in_for_a_version(
    run: Run, write: Write, tmp_path: Path, edited: Fake, capsys: pytest.CaptureFixture[str]
) -> None:
    path, old = write(CHECKS), tmp_path / "old.json"
    assert run(path, "--version", "0", "--update", str(old)) == 0
    assert "4 answers of atlas@0" in " ".join(capsys.readouterr().out.split())
    asked = edited.count("Generate")
    assert run(path, "--baseline", str(old)) == 1
    assert edited.count("Generate") == asked + 4
    assert "norway" in capsys.readouterr().out
    named = write(f"baseline: old.json\n{CHECKS}")
    assert run(named, "--version", "0") == 0
    assert "are the same: nothing can have changed" in " ".join(capsys.readouterr().out.split())


def test_a_baseline_of_another_base_is_said_and_still_used(
    run: Run, write: Write, tmp_path: Path, edited: Fake, capsys: pytest.CaptureFixture[str]
) -> None:
    path, old = write(CHECKS), tmp_path / "old.json"
    assert run(path, "--version", "0", "--update", str(old)) == 0
    edited.versions["models/atlas/versions/1"].base_sha256 = "ef" * 32
    assert run(path, "--baseline", str(old)) == 1
    assert "atlas@0 and atlas@1 have different bases" in capsys.readouterr().out


def test_the_schema_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "--schema"]) == 0
    assert json.loads(capsys.readouterr().out)["title"] == "Errata checks"


@pytest.fixture
def locked(edited: Fake) -> Iterator[str]:
    """A server that wants a token."""
    edited.token = "right"
    with serving(edited) as address:
        yield address


@pytest.mark.parametrize(
    ("text", "options", "said"),
    [
        (CHECKS, (), "FILE:12: 'norway' has to be unchanged, and there is no baseline; give --baseline VERSION or a"),
        (GOOD, ("--version", "9"), "no 'models/atlas/versions/9'"),
        (GOOD, ("--model", "mars"), "no 'models/mars/aliases/candidate'"),
        (GOOD, ("--baseline", "none.json"), "none.json: the baseline cannot be read: No such file or directory"),
        (GOOD, ("--junit", "no/such/x.xml"), "there is no folder 'no/such' for 'x.xml'; make it first"),
        (GOOD, ("--update", "x.json", "--junit", "x.xml"), "--update judges nothing, so it takes neither"),
        ("", (), "FILE:1: the file is empty"),
    ],
)
def test_what_cannot_run_ends_with_2_in_one_line_before_anything_is_asked(
    run: Run,
    write: Write,
    edited: Fake,
    capsys: pytest.CaptureFixture[str],
    text: str,
    options: tuple[str, ...],
    said: str,
) -> None:
    path = write(text)
    assert run(path, *options) == 2
    out, err = capsys.readouterr()
    assert out == ""
    (line,) = err.replace(str(path), "FILE").splitlines()
    assert line.startswith(f"errata: {said}")
    assert edited.count("Generate") == 0


def test_a_wrong_token_ends_with_2(
    locked: str, write: Write, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ERRATA_TOKEN", "wrong")
    assert main(["check", str(write(GOOD)), "--server", locked, "--model", "atlas"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_server_that_cannot_be_reached_ends_with_2(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--server", "localhost:1", "--model", "atlas", "--timeout", "0.5"]
    assert main(["check", str(write(GOOD)), *options]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("errata: localhost:1 did")


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (
            Fault(code=grpc.StatusCode.INVALID_ARGUMENT, reason="INVALID_IMAGE", message="it is truncated"),
            "FILE:12: 'norway' cannot be asked: it is truncated",
        ),
        (Fault(code=grpc.StatusCode.INTERNAL, reason="INTERNAL", message="it broke"), "it broke"),
    ],
)
def test_a_probe_that_cannot_be_asked_ends_the_check_with_2_and_leaves_no_file(
    run: Run, write: Write, edited: Fake, tmp_path: Path, capsys: pytest.CaptureFixture[str], fault: Fault, said: str
) -> None:
    only = "version: 1\nprobes:\n" + CHECKS[CHECKS.index("  - id: norway") : CHECKS.index("  - id: nobody")]
    path = write("\n" * 8 + only.replace("unchanged: true", "expected: Oslo").replace("probes:\n", "probes:\n\n"))
    edited.fail_next("Generate", fault)
    assert run(path, "--junit", str(tmp_path / "x.xml"), "--json") == 2
    out, err = capsys.readouterr()
    assert err.replace(str(path), "FILE").strip() == f"errata: {said}"
    assert json.loads(out)["error"]["reason"] == fault.reason
    assert list(tmp_path.iterdir()) == [path]


def test_help_fits_a_screen_and_has_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "--help"]) == 0
    out = capsys.readouterr().out
    assert len(out.splitlines()) <= 40
    assert "errata check" in out[out.index("Example") :]


def test_what_is_asked_is_what_the_file_says(run: Run, write: Write, edited: Fake, tmp_path: Path) -> None:
    (tmp_path / "one.png").write_bytes(b"1")
    (tmp_path / "two.png").write_bytes(b"2")
    text = """\
version: 1
probes:
  - {id: a, prompt: 'Which?', image: [one.png, two.png], raw: true, max_new_tokens: 3, expected: unknown}
"""
    assert run(write(text)) == 0
    (asked,) = [r for r in edited.requests if r.DESCRIPTOR.name == "GenerateRequest"]
    assert ([i.data for i in asked.prompt.images], asked.prompt.raw, asked.max_new_tokens) == ([b"1", b"2"], True, 3)
    assert CAPITAL not in asked.prompt.text
