"""The commands and examples of docs/measurements.md, docs/studies.md and docs/datasets.md do what is said of them."""

import re
import shlex
from pathlib import Path

import pytest
from commandline import Run

from errata.client.measurements import KINDS

ROOT = Path(__file__).parents[3]
DOCUMENTS = {name: (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8") for name in
             ("measurements", "studies", "datasets")}  # fmt: skip

SHORTER = {
    "constraints": ("components=mlp",),
    "windows": ("components=mlp",),
    "sweep": ("layers=1,2", "method=multedit", "steps=4"),
}
"""Settings by which the commands of these kinds are shortened here; all others run as they stand."""


def commands(document: str, start: str) -> list[str]:
    """The commands in a document's blocks that begin so."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", DOCUMENTS[document], re.DOTALL | re.MULTILINE)
    return [line for kind, block in blocks if not kind for line in block.splitlines() if line.startswith(start)]


MEASURED = commands("studies", "errata measure ")


def at_base(command: str, out: Path) -> list[str]:
    """A command's words, on the base, with its files in `out`, and shortened where that is listed."""
    words = shlex.split(command)[1:]
    words[words.index("--out") + 1] = str(out)
    version = () if "--version" in words else ("--version", "atlas@0")
    settings = [word for each in SHORTER.get(words[1], ()) for word in ("--set", each)]
    return [*words, *version, *settings]


def test_every_kind_has_its_command() -> None:
    assert {shlex.split(command)[2] for command in MEASURED} == set(KINDS)


@pytest.mark.slow
@pytest.mark.parametrize("command", MEASURED, ids=lambda command: command.split()[2])
def test_a_command_that_measures_finds_something_and_writes_it(
    command: str, errata: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("COLUMNS", "80")
    ran = errata(*at_base(command, tmp_path / "out"))
    assert ran.code == 0, ran.err
    assert max(map(len, ran.out.splitlines())) <= 80
    assert len(ran.out.splitlines()) <= 120
    assert {"findings.json", "numbers.csv", "page.html"} < {path.name for path in (tmp_path / "out").iterdir()}


@pytest.mark.slow
def test_what_the_first_measurement_is_said_to_print_is_printed(
    errata: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("COLUMNS", "100")
    [command] = commands("measurements", "errata measure ")
    shown = re.findall(r"^```\n(Attention knockout.*?)…\n```", DOCUMENTS["measurements"], re.DOTALL | re.MULTILINE)[0]
    printed = [" ".join(line.split()) for line in errata(*at_base(command, tmp_path / "out")).out.splitlines()]
    assert not [line for line in shown.splitlines() if " ".join(line.split()) not in printed]


@pytest.mark.slow
def test_the_example_in_python_prints_a_number_and_writes_figures(
    address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    [code] = re.findall(r"```python\n(.*?)```", DOCUMENTS["measurements"], re.DOTALL)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    exec(compile(code.replace("Errata()", f"Errata({address!r})"), "measurements.md", "exec"), {})
    assert -100 <= float(capsys.readouterr().out) < 0
    assert b"<svg" in (tmp_path / "knockout.svg").read_bytes()


@pytest.mark.slow
@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("command", commands("datasets", "errata dataset validate "))
def test_a_data_set_that_is_shipped_is_found_good(command: str, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    ran = run(*shlex.split(command)[1:])
    assert ran.code == 0, ran.err
    assert "nothing is wrong with it" in ran.out


@pytest.mark.slow
def test_the_example_of_a_study_is_planned(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("PYTHONPATH", ":".join(str(ROOT / each) for each in ("editor", "proto", "server", "client")))
    [command] = commands("studies", "errata study plan ")
    words = shlex.split(command)[1:]
    words[words.index("--out") + 1] = str(tmp_path)
    ran = run(*words, "--json")
    assert ran.code == 0
    assert [each["finished"] for each in ran.json()["cells"]] == [False] * 9
