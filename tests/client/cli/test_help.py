"""What `--help` says: one screen a command, with an example."""

import pytest
from commandline import Ran, Run
from typer.main import get_command

from errata.client.cli.app import build, release

COMMANDS = sorted(get_command(build()).commands)  # type: ignore[attr-defined]
WANTED = (
    "ask audit bisect check cherry-pick compose dataset delete demo diff edit eval export import log measure models "
    "promote rebase revert rollback show squash study trace up"
)


def test_every_command_is_there() -> None:
    assert WANTED.split() == COMMANDS


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_of_a_command_fits_a_screen_and_has_an_example(
    command: str, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    ran = run(command, "--help")
    lines = ran.out.splitlines()
    assert ran.code == 0
    assert len(lines) <= 24
    assert max(map(len, lines)) <= 80
    assert f"Example: errata {command}" in ran.out
    assert "--json" in ran.out


def test_the_help_of_all_names_every_command_the_exit_codes_and_fits_a_screen(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    ran = run("--help")
    assert len(ran.out.splitlines()) <= 24
    assert set(COMMANDS) <= set(ran.out.split())
    assert "Exit codes: 0 done; 1 the answer is no" in ran.out
    assert run().out == ran.out


def test_the_help_folds_on_a_narrow_terminal(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    lines = run("ask", "--help").out.splitlines()
    assert max(map(len, [line for line in lines if "Example" not in line])) <= 40


def test_a_shell_can_complete_commands(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("_ERRATA_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", "errata che")
    monkeypatch.setenv("COMP_CWORD", "1")
    monkeypatch.setenv("_TYPER_COMPLETE_ARGS", "errata che")
    with pytest.raises(SystemExit):
        run()
    assert capsys.readouterr().out.split() == ["check", "cherry-pick"]


def test_the_release_is_printed(run: Run) -> None:
    assert run("--version") == Ran(code=0, out=f"{release()}\n", err="")


def test_options_of_the_connection_stand_before_or_after_the_command(run: Run) -> None:
    named = ("--server", "example.invalid:1", "--token", "secret")
    for arguments in ((*named, "models"), ("models", *named), ("--server", "localhost:1", "models", *named)):
        assert "the token would go to example.invalid:1 in clear" in run(*arguments).err


def test_a_mistyped_command_is_answered_with_the_right_one(run: Run) -> None:
    ran = run("chery-pick", "atlas@1")
    assert ran.code == 2
    assert ran.err.count("\n") == 1
    assert "Did you mean 'cherry-pick'" in ran.err
