"""`python -m errata.server study`: runs a study's file, or says what it consists of."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from errata.editor.errors import ErrataError

studies = typer.Typer(help="Studies: many measurements from one file.", no_args_is_help=True)

StudyFile = Annotated[Path, typer.Argument(metavar="STUDY.yaml", help="docs/studies.md says what it holds.")]
Out = Annotated[Path, typer.Option("--out", metavar="FOLDER", help="Where results are kept; a rerun goes on there.")]

_INTERRUPTED = 130


@studies.command("run")
def run(
    file: StudyFile,
    out: Out,
    jobs: Annotated[int, typer.Option(min=1, max=256, help="Processes that measure at once.")] = 1,
    mlflow: Annotated[
        str | None,
        typer.Option(metavar="URI", help="MLflow's; MLFLOW_TRACKING_URI unless given, else a database in FOLDER."),
    ] = None,
) -> None:
    """Measures what is missing, writes the page, and publishes everything as one MLflow experiment.

    Exit code 1: some cells failed, and the page says why; or nothing was run.
    """
    with _explained():
        # The parts need seconds to import; `--help` does not wait for them.
        from errata.server.studies.whole import Report, run_study

        def told(line: str) -> None:
            typer.echo(line, err=True)

        with _held(out):
            try:
                report: Report = run_study(file, out, jobs=jobs, mlflow=mlflow or os.environ.get(_TRACKING), told=told)
            except KeyboardInterrupt:
                told("stopped; what is finished stays, and the same command goes on")
                raise typer.Exit(_INTERRUPTED) from None
    typer.echo(report.as_json())
    if report.failed:
        raise typer.Exit(1)


_TRACKING = "MLFLOW_TRACKING_URI"


@studies.command("plan")
def plan(file: StudyFile, out: Out) -> None:
    """Checks a study and lists its cells, and which of them are finished."""
    with _explained():
        from errata.server.studies.whole import planned

        for cell, finished in planned(file, out):
            typer.echo(f"{'finished' if finished else 'missing'}\t{cell.label}")


@contextmanager
def _held(out: Path) -> Iterator[None]:
    """The folder for one run at a time. Raises ErrataError where another has it."""
    out.mkdir(parents=True, exist_ok=True)
    with (out / ".lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ErrataError(f"another run is at work in {str(out)!r}; wait for it, or give another --out") from None
        yield


@contextmanager
def _explained() -> Iterator[None]:
    try:
        yield
    except ErrataError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(1) from None
