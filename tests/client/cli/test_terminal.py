"""The real program: in a pipe, on terminals of several widths, without its extras, without a server, as a server."""

import json
import os
import pty
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from commandline import CAPITAL, Run, edited
from hosting import Hosted, hosting

from errata.server.settings import ModelSettings, Settings

ROOT = Path(__file__).parents[3]
PATHS = os.pathsep.join(str(ROOT / portion) for portion in ("editor", "proto", "server", "client"))
ERRATA = (sys.executable, "-m", "errata.client")
NO_SERVER = ("--server", "localhost:1")


def environment(**more: str) -> dict[str, str]:
    inherited = {
        k: v for k, v in os.environ.items() if not k.startswith("ERRATA_") and k not in ("COLUMNS", "NO_COLOR")
    }
    return {**inherited, "PYTHONPATH": PATHS, "TERM": "xterm-256color", **more}


def piped(*arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*ERRATA, *arguments], env=environment(**more), capture_output=True, text=True, check=False, timeout=120
    )


def on_terminal(width: int, *arguments: str) -> str:
    """What a terminal of so many columns is given."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [*ERRATA, *arguments], env=environment(COLUMNS=str(width)), stdin=theirs, stdout=theirs, stderr=theirs
    )
    os.close(theirs)
    said = b""
    try:
        while piece := os.read(ours, 4096):
            said += piece
    except OSError:  # the other end is closed
        pass
    os.close(ours)
    assert process.wait(60) == 0, said.decode()
    return said.decode()


def without(module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs `errata` where a module is not installed."""
    program = f"import sys; sys.modules[{module!r}] = None; from errata.client.cli import main; sys.exit(main())"
    return subprocess.run(
        [sys.executable, "-c", program, *arguments], env=environment(), capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosted]:
    """A server that wants tokens; it loads no model."""
    settings = Settings(
        data_dir=tmp_path_factory.mktemp("guarded"),
        port=0,
        models={"atlas": ModelSettings(source="atlas", load="lazy")},
        mlflow_uri="none",
        auth=True,
    )
    with hosting(settings) as running:
        yield running


@pytest.mark.slow
def test_in_a_pipe_there_are_no_control_codes(address: str) -> None:
    for arguments in (("ask", CAPITAL), ("log",), ("models",), ("show", "atlas@0")):
        ran = piped(*arguments, ERRATA_SERVER=address)
        assert ran.returncode == 0
        assert ran.stdout
        assert "\x1b" not in ran.stdout + ran.stderr
        assert ran.stderr == ""


@pytest.mark.slow
@pytest.mark.parametrize("width", [40, 80])
def test_on_a_terminal_there_are_colours_and_no_line_is_too_long(width: int, address: str) -> None:
    trace = ("trace", CAPITAL, "--constraint", "Kazakhstan", "--substitute", "Norway", "--component", "mlp")
    for arguments in (trace, ("models",), ("log",)):
        said = on_terminal(width, "--server", address, *arguments)
        assert "\x1b[" in said
        lines = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", said).replace("\r\n", "\n").replace("\r", "\n").split("\n")
        assert max(map(len, lines)) <= width


@pytest.mark.slow
def test_a_reader_that_goes_away_ends_a_command_quietly(address: str) -> None:
    command = subprocess.Popen(
        [*ERRATA, "--server", address, "models"], env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert command.stdout
    assert command.stderr
    command.stdout.close()
    with command.stderr:
        said = command.stderr.read()
    assert (command.wait(60), said) == (141, b"")


@pytest.mark.parametrize(
    "arguments",
    [
        ("--help",),
        ("check", "--schema"),
        ("show", "", "--json", *NO_SERVER, "--timeout", "0.2"),
        ("models", *NO_SERVER, "--timeout", "0.2"),
    ],
)
def test_a_pipe_that_nobody_reads_is_no_error_to_tell_of(arguments: tuple[str, ...]) -> None:
    read, write = os.pipe()
    os.close(read)
    told = write if "models" in arguments else subprocess.PIPE
    ran = subprocess.run([*ERRATA, *arguments], env=environment(), stdout=write, stderr=told, check=False, timeout=120)
    os.close(write)
    assert ran.returncode == 141
    assert b"Traceback" not in (ran.stderr or b"")


def test_a_full_disk_is_one_line_and_exit_code_2() -> None:
    with Path("/dev/full").open("w") as full:
        ran = subprocess.run(
            [*ERRATA, "show", "", "--json", *NO_SERVER, "--timeout", "0.2"],
            env=environment(),
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
            timeout=120,
        )
    assert ran.returncode == 2
    assert ran.stderr.count("\n") == 1


def test_bytes_that_are_no_text_are_the_command_lines_fault() -> None:
    ran = subprocess.run(
        [*ERRATA, "ask", b"\xff", "--version", "atlas@0", "--server", "localhost:1"],
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert (ran.returncode, ran.stderr) == (
        2,
        "errata: the command line holds bytes that are not UTF-8; write them anew\n",
    )


@pytest.mark.slow
def test_a_question_answered_with_no_ends_with_1_and_deletes_nothing(address: str, run: Run) -> None:
    version = edited(lambda *arguments: run("--server", address, *arguments))
    ours, theirs = pty.openpty()
    os.write(ours, b"n\n")
    process = subprocess.Popen(
        [*ERRATA, "--server", address, "delete", version], env=environment(), stdin=theirs, stdout=theirs, stderr=theirs
    )
    os.close(theirs)
    assert process.wait(120) == 1
    assert f"Delete {version} for good?" in os.read(ours, 4096).decode()
    os.close(ours)
    assert run("--server", address, "show", version).code == 0


@pytest.mark.slow
def test_a_server_that_is_not_there_is_one_line_and_exit_code_2() -> None:
    ran = piped(*NO_SERVER, "--timeout", "20", "models", "--json")
    assert ran.returncode == 2
    remedy = "check --server, or start one with `errata up`"
    assert ran.stderr == f"errata: localhost:1 does not answer; {remedy}\n"
    assert json.loads(ran.stdout)["error"]["reason"] == "UNAVAILABLE"


@pytest.mark.slow
def test_a_token_opens_the_server_and_is_never_printed(
    guarded: Hosted, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = guarded.server.stores.ledger.create_token("ana", {"*": "admin"})  # type: ignore[dict-item]
    address = guarded.server.address
    monkeypatch.setenv("ERRATA_TOKEN", token)
    assert run("--server", address, "models").code == 0
    wrong = token[:-1] + ("a" if token[-1] != "a" else "b")
    for arguments in (("--token", wrong), ("--token", wrong, "--verbose"), ("--token", "")):
        ran = run("--server", address, "models", *arguments)
        assert ran.code == 2
        assert "token" in ran.err
        assert ran.err.splitlines()[0].endswith("; give a valid one by ERRATA_TOKEN")
        assert not [each for each in (token, wrong) if each in ran.out + ran.err]


def test_a_token_does_not_leave_this_machine_in_clear(run: Run) -> None:
    ran = run("--server", "example.invalid:50051", "--token", "secret-token", "models")
    assert ran.code == 2
    assert "in clear" in ran.err
    assert "secret-token" not in ran.err


def test_a_certificate_that_is_not_there_is_named(run: Run, tmp_path: Path) -> None:
    ran = run("models", "--ca", tmp_path / "ca.pem")
    assert ran.code == 2
    assert "ca.pem' cannot be read" in ran.err


def test_verbose_says_reason_field_and_where(run: Run) -> None:
    ran = run("ask", CAPITAL, "--version", "atlas@0", "--image", "none.png", "--verbose")
    assert ran.err.splitlines()[1:3] == ["reason: INVALID_IMAGE", "field: prompt.images[0]"]
    assert "Traceback" in ran.err


@pytest.mark.parametrize("module", ["typer", "rich"])
def test_without_the_extra_the_remedy_is_one_line(module: str) -> None:
    ran = without(module, "models")
    assert ran.returncode == 2
    assert ran.stderr.count("\n") == 1
    assert "pip install 'errata[cli]'" in ran.stderr


def test_without_pillow_a_png_is_refused_before_the_server_is_asked() -> None:
    ran = without("PIL", "--server", "localhost:1", "trace", CAPITAL, "--constraint", "Kazakhstan", "--png", "t.png")
    assert (ran.returncode, ran.stderr) == (2, "errata: --png needs Pillow; pip install pillow, or use --html\n")


@pytest.mark.parametrize("command", ["up", "demo"])
def test_without_the_server_the_remedy_is_one_line(command: str) -> None:
    ran = without("torch", command)
    assert ran.returncode == 2
    assert ran.stderr == "errata: a server needs torch; pip install 'errata[server]'\n"


@pytest.mark.slow
def test_up_serves_with_mlflows_pages_and_stops_both_on_ctrl_c(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [*ERRATA, "up", "--data-dir", str(tmp_path / "data"), "--port", "0", "--ui-port", "0"],
        env=environment(ERRATA_MODELS__ATLAS__LOAD="lazy"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout
    address = json.loads(process.stdout.readline())["address"]
    assert piped("--server", address, "models").returncode == 0
    process.send_signal(signal.SIGINT)
    # Both children hold these pipes: they end only when all three have ended.
    _, said = process.communicate(timeout=120)
    assert process.returncode == 0, said
    assert "shut down" in said


@pytest.mark.slow
def test_up_says_why_a_server_cannot_start(tmp_path: Path) -> None:
    ran = piped("up", "--data-dir", str(tmp_path), "--config", str(tmp_path / "none.toml"))
    assert ran.returncode == 2
    assert "none.toml" in ran.stderr


@pytest.mark.slow
def test_the_demo_runs_and_takes_its_server_with_it_on_ctrl_c(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [*ERRATA, "demo", "--out", str(tmp_path)],
        env=environment(ERRATA_MLFLOW_URI="none"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout
    assert next(line for line in process.stdout if "Before" in line)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 130, said
