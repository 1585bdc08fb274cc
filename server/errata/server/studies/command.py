"""`python -m errata.server study`: runs a study's file, or says what it consists of."""

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from errata.editor.errors import ErrataError, InvalidInputError

if TYPE_CHECKING:
    from errata.server.studies.running import Measure

studies = typer.Typer(help="Studies: many measurements from one file.", no_args_is_help=True)

StudyFile = Annotated[Path, typer.Argument(metavar="STUDY.yaml", help="docs/studies.md says what it holds.")]
Out = Annotated[Path, typer.Option("--out", metavar="FOLDER", help="Where results are kept; a rerun goes on there.")]

AsJson = Annotated[bool, typer.Option("--json", help="One JSON document on stdout, of errors, too.")]

_INTERRUPTED = 130


class FolderInUseError(ErrataError):
    """Another run of a study has the folder."""

    reason = "FOLDER_IN_USE"


@studies.command("run")
def run(
    file: StudyFile,
    out: Out,
    jobs: Annotated[int, typer.Option(min=1, max=256, help="Processes that measure at once.")] = 1,
    cluster: Annotated[
        str | None,
        typer.Option(metavar="ADDRESS", help="Measure on this Ray cluster: auto, HOST:PORT; docs/cluster.md."),
    ] = None,
    gpus: Annotated[float, typer.Option(min=0, help="GPUs of each of a cluster's processes; parts, too.")] = 0.0,
    mlflow: Annotated[
        str | None,
        typer.Option(metavar="URI", help="MLflow's, or none; else MLFLOW_TRACKING_URI, else a database in FOLDER."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Measures what is missing, writes the page, and publishes everything as one MLflow experiment.

    Exit code 1: some cells failed, and the page says why; or nothing was run.
    """
    with _explained(as_json=as_json):
        if gpus and not cluster:
            raise InvalidInputError("--gpus is for --cluster; models say their own device", field="gpus")
        # The parts need seconds to import; `--help` does not wait for them.
        from errata.server.studies.format import read_study
        from errata.server.studies.whole import Report, run_study

        def told(line: str) -> None:
            typer.echo(line, err=True)

        uri = mlflow or os.environ.get(_TRACKING)
        measured = _on_cluster(cluster, jobs, gpus) if cluster else None
        read_study(file)  # one with faults makes no folder
        with _held(out):
            try:
                report: Report = run_study(file, out, jobs=jobs, mlflow=uri, told=told, measured=measured)
            except KeyboardInterrupt:
                told("stopped; what is finished stays, and the same command goes on")
                raise typer.Exit(_INTERRUPTED) from None
    typer.echo(report.as_json())
    if report.failed:
        raise typer.Exit(1)


_TRACKING = "MLFLOW_TRACKING_URI"


def _on_cluster(address: str, jobs: int, gpus: float) -> "Measure":
    from errata.server.cluster.errors import ClusterError

    try:
        from errata.server.cluster.connection import ClusterSettings
        from errata.server.cluster.studies import on_cluster
        from errata.server.cluster.workers import WorkerSettings
    except ModuleNotFoundError as error:
        if error.name != "ray":
            raise
        raise ClusterError("a cluster needs Ray: pip install 'errata[server,ray]'") from None
    return on_cluster(WorkerSettings(workers=jobs, gpus=gpus), ClusterSettings(address=address))


@studies.command("plan")
def plan(file: StudyFile, out: Out, as_json: AsJson = False) -> None:
    """Checks a study and lists its cells, and which of them are finished."""
    with _explained(as_json=as_json):
        from errata.server.studies.plan import planned

        cells = planned(file, out)
    if as_json:
        listed = [{"cell": cell.label, "finished": finished} for cell, finished in cells]
        typer.echo(json.dumps({"cells": listed}, ensure_ascii=False))
    else:
        for cell, finished in cells:
            typer.echo(f"{'finished' if finished else 'missing'}\t{cell.label}")


@contextmanager
def _held(out: Path) -> Iterator[None]:
    """The folder for one run at a time. Raises FolderInUseError where another has it."""
    out.mkdir(parents=True, exist_ok=True)
    with (out / ".lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            said = f"another run is at work in {str(out)!r}; wait for it, or give another --out"
            raise FolderInUseError(said) from None
        yield


@contextmanager
def _explained(*, as_json: bool) -> Iterator[None]:
    """Ends with exit code 1 and what is wrong; `as_json`: on stdout as well, as every command of ours says it."""
    try:
        yield
    except ErrataError as error:
        typer.echo(str(error), err=True)
        if as_json:
            said = {"reason": error.reason, "message": str(error), "field": ""}
            typer.echo(json.dumps({"error": said}, ensure_ascii=False))
        raise typer.Exit(1) from None
