"""What runs on this machine: a server with MLflow's pages, the demo, studies. All are child processes."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import RenderableType

from errata.client.cli.output import facts, line
from errata.client.cli.problems import UNDONE, MissingExtraError, UsageError
from errata.client.cli.session import Session

_SERVER = ("errata.server", "torch", "mlflow", "sqlalchemy", "pydantic_settings")
_SECONDS = 60.0
_KILLED = 128
"""A shell's exit code of a process that a signal ended is so much more than the signal."""
_INTERRUPTED = _KILLED + signal.SIGINT

DataDir = Annotated[Path, typer.Option("--data-dir", metavar="FOLDER", help="Where everything is kept.")]


def up(
    session: Session,
    data_dir: DataDir = Path("errata-data"),
    port: Annotated[int, typer.Option(metavar="PORT", help="The server's.")] = 50051,
    ui_port: Annotated[int, typer.Option(metavar="PORT", help="That of MLflow's pages.")] = 5000,
    ui: Annotated[bool, typer.Option("--ui/--no-ui", help="MLflow's pages beside the server.")] = True,
    config: Annotated[Path | None, typer.Option(metavar="FILE", help="The server's settings (TOML).")] = None,
) -> None:
    """Run a server and MLflow's pages on this machine, until Ctrl-C.

    Needs pip install 'errata[server]'. Prints where the server listens as JSON.
    """
    _require_server()
    shared = ["--data-dir", str(data_dir), *(["--config", str(config)] if config else [])]
    with ExitStack() as stack:
        server = stack.enter_context(_child(["errata.server", *shared, "--port", str(port)], stdout=subprocess.PIPE))
        assert server.stdout is not None
        listening = next((line for line in server.stdout if line.startswith("{")), None)
        if listening is None:
            raise typer.Exit(server.wait() and UNDONE)
        typer.echo(listening.rstrip())
        if ui:
            stack.enter_context(_child(["errata.server", "ui", *shared, "--port", str(ui_port)], stdout=2))
            session.output.note(f"MLflow's pages will be at http://127.0.0.1:{ui_port}; Ctrl-C stops both")
        _wait(server)


def demo(
    session: Session,
    keep: Annotated[bool, typer.Option("--keep", help="Leave MLflow's pages running at the end.")] = False,
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Where the demo keeps everything.")] = Path("out/demo"),
) -> None:
    """Correct an old atlas through a server of its own: ask, trace, edit, promote.

    Takes minutes. Needs pip install 'errata[server]'.
    """
    _require_server()
    command = [sys.executable, str(_demo_script()), "--out", str(out), "--keep" if keep else "--no-keep"]
    with _running(command, stdout=2 if session.output.as_json else None) as process:
        status = process.wait()
    session.output.show({"exit_code": status, "folder": out})
    if status:
        raise typer.Exit(UNDONE)


def study(
    session: Session,
    action: Annotated[Literal["run", "plan"], typer.Argument(metavar="ACTION", help="run; or plan: list its cells.")],
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The study; examples/studies/atlas.yaml is one.")],
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Where results are kept; a rerun goes on there.")],
    jobs: Annotated[int, typer.Option(min=1, help="Processes that measure at once.")] = 1,
    mlflow: Annotated[str | None, typer.Option(metavar="URI", help="By default a database in FOLDER; or none.")] = None,
    cluster: Annotated[str | None, typer.Option(metavar="ADDRESS", help="A Ray cluster to measure on.")] = None,
    gpus: Annotated[float, typer.Option(min=0, help="GPUs of each of its workers.")] = 0.0,
) -> None:
    """Run a file of measurements: figures, a page, an MLflow experiment.

    Needs pip install 'errata[server]'. A study that was stopped goes on. Exit code 1: some cells failed.
    """
    if gpus and not cluster:
        raise UsageError("--gpus is for --cluster; the study's models say their own device")
    _require_server()
    options = ["--jobs", str(jobs), *(["--mlflow", mlflow] if mlflow else [])] if action == "run" else []
    if cluster and action == "run":
        options += ["--cluster", cluster, "--gpus", str(gpus)]
    command = [sys.executable, "-m", "errata.server", "study", action, str(file), "--out", str(out), "--json", *options]
    with _running(command, stdout=subprocess.PIPE, stop=signal.SIGINT) as process:
        assert process.stdout is not None
        said = process.stdout.read()
        status = process.wait()
    result = json.loads(said) if said else {"error": {}}
    if said and ("error" not in result or session.output.as_json):
        session.output.show(result, *_study(result))
    if status:
        raise typer.Exit(_study_status(status, failed="error" not in result))


def _study_status(status: int, *, failed: bool) -> int:
    """Ours for a study's: 1 where cells `failed`, 130 after Ctrl-C, else nothing was run."""
    return status if status == _INTERRUPTED or failed else UNDONE


def _study(result: Mapping[str, Any]) -> Iterator[RenderableType]:
    """What a study's run or plan came to."""
    for each in result.get("cells", ()):
        yield line(f"{'finished' if each['finished'] else 'missing '}  {each['cell']}")
    if "page" in result:
        counts = f"{result['measured']} measured, {result['earlier']} finished before, {len(result['failed'])} failed"
        names = ("page", "experiment", "mlflow")
        yield facts([("cells", counts), *((name, str(result[name])) for name in names if result[name])])
        yield from (line(f"failed: {cell}: {reason}", "red") for cell, reason in result["failed"].items())


def _require_server() -> None:
    missing = [name for name in _SERVER if find_spec(name) is None]
    if missing:
        raise MissingExtraError(f"a server needs {', '.join(missing)}; pip install 'errata[server]'")


def _demo_script() -> Path:
    """Where the demo is: in a checkout's examples/."""
    spec = find_spec("errata.server")
    assert spec is not None
    assert spec.origin is not None
    script = Path(spec.origin).parents[3] / "examples" / "demo.py"
    if script.is_file():
        return script
    raise MissingExtraError("the demo is not part of this installation; run make demo in a checkout of errata")


@contextmanager
def _child(module: Sequence[str], *, stdout: int) -> Iterator["subprocess.Popen[str]"]:
    with _running([sys.executable, "-m", *module], stdout=stdout) as process:
        yield process


@contextmanager
def _running(
    command: Sequence[str], *, stdout: int | None, stop: signal.Signals = signal.SIGTERM
) -> Iterator["subprocess.Popen[str]"]:
    """A child of its own process group, so that Ctrl-C reaches it through us, once; asked to end on the way out."""
    process = subprocess.Popen(command, stdout=stdout, text=True, start_new_session=True)
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, stop)
            try:
                process.wait(_SECONDS)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        if process.stdout is not None:
            process.stdout.close()


def _wait(server: "subprocess.Popen[str]") -> None:
    """Until the server ends, or Ctrl-C or SIGTERM ends us."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(_KILLED + number))
    try:
        status = server.wait()
    except KeyboardInterrupt:
        return
    raise typer.Exit(UNDONE if status else 0)
