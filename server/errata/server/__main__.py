"""`python -m errata.server`: serves; updates the ledger; hands out tokens; shows MLflow's pages; runs studies.

Options stand over the environment (ERRATA_…), and that over the file named by `--config`.
"""

import asyncio
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal

import typer

from errata.editor.errors import ErrataError
from errata.server.logs import log_to
from errata.server.security import ALL_MODELS, roles_from
from errata.server.settings import PREFIX, Settings, load_settings
from errata.server.studies.command import studies

cli = typer.Typer(
    help="The Errata server.", no_args_is_help=False, pretty_exceptions_enable=False, add_completion=False
)
tokens = typer.Typer(help="Callers' tokens.", no_args_is_help=True)
cli.add_typer(tokens, name="tokens")
cli.add_typer(studies, name="study")

Config = Annotated[Path | None, typer.Option("--config", help="A TOML file with settings.")]
LogLevel = Literal["DEBUG", "INFO", "WARNING", "ERROR"]
DataDir = Annotated[Path | None, typer.Option("--data-dir", help="Where the server keeps everything.")]

MLFLOW = {
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # takes four further processes, and Errata has its own jobs
    "MLFLOW_DISABLE_TELEMETRY": "true",
}
"""What MLflow's server is set to, where the environment does not say otherwise."""


@cli.callback(invoke_without_command=True)
def run(
    context: typer.Context,
    config: Config = None,
    data_dir: DataDir = None,
    host: Annotated[str | None, typer.Option(help="The address to listen on; 127.0.0.1 unless set.")] = None,
    port: Annotated[int | None, typer.Option(help="The port to listen on; 0 takes any free one.")] = None,
    metrics_port: Annotated[int | None, typer.Option(help="Where Prometheus finds its figures.")] = None,
    log_level: Annotated[LogLevel, typer.Option(help="The least that is logged.")] = "INFO",
) -> None:
    """Serves until it is told to end. Prints its settings, and where it listens as one line of JSON."""
    if context.invoked_subcommand:
        return
    given = {"data_dir": data_dir, "host": host, "port": port, "metrics_port": metrics_port}
    with _explained():
        settings = _settings(config, **given)
        log_to(sys.stderr, log_level)
        typer.echo(settings.described())
        asyncio.run(_serve(settings))


@cli.command()
def migrate(config: Config = None, data_dir: DataDir = None) -> None:
    """Brings the ledger's schema up to this release's."""
    from errata.server.app import ledger_url
    from errata.server.ledger.ledger import Ledger

    with _explained():
        settings = _settings(config, data_dir=data_dir)
        settings.data_dir.mkdir(parents=True, exist_ok=True)
        ledger = Ledger(ledger_url(settings))
        try:
            ledger.migrate()
        finally:
            ledger.close()
        typer.echo("the ledger is up to date")


@tokens.command("create")
def create_token(
    name: Annotated[str, typer.Argument(help="Whose token it is; what they do is recorded under it.")],
    role: Annotated[str, typer.Option(help="reader, editor or admin.")] = "reader",
    model: Annotated[list[str] | None, typer.Option(help="A model that the role is for; all unless given.")] = None,
    config: Config = None,
    data_dir: DataDir = None,
) -> None:
    """Makes a token and prints it, once: only its hash is kept."""
    from errata.server.app import open_ledger

    with _explained(), open_ledger(_settings(config, data_dir=data_dir)) as ledger:
        roles = roles_from([f"{each}={role}" for each in model or [ALL_MODELS]])
        typer.echo(ledger.create_token(name, roles))


@tokens.command("list")
def list_tokens(config: Config = None, data_dir: DataDir = None) -> None:
    """Lists whose tokens there are, and what for."""
    from errata.server.app import open_ledger

    with _explained(), open_ledger(_settings(config, data_dir=data_dir)) as ledger:
        for token in ledger.tokens():
            roles = ", ".join(f"{model}={role}" for model, role in sorted(token.roles.items()))
            typer.echo(f"{token.name}\t{roles}\t{'revoked' if token.revoked else 'valid'}")


@tokens.command("revoke")
def revoke_token(name: str, config: Config = None, data_dir: DataDir = None) -> None:
    """Makes a token worthless, at once and for good."""
    from errata.server.app import open_ledger

    with _explained(), open_ledger(_settings(config, data_dir=data_dir)) as ledger:
        ledger.revoke_token(name)


@cli.command()
def ui(
    port: Annotated[int, typer.Option(help="The port to listen on.")] = 5000,
    config: Config = None,
    data_dir: DataDir = None,
) -> None:
    """Shows the versions in MLflow's own pages, on this machine only."""
    from errata.server.app import mlflow_place

    with _explained():
        place = mlflow_place(_settings(config, data_dir=data_dir))
    if place is None:
        raise typer.Exit(_said('mlflow_uri is "none", so nothing is published'))
    if place.artifact_root is None:
        raise typer.Exit(_said(f"versions are published to {place.uri}, which has pages of its own"))
    command = mlflow_command(place.uri, str(place.artifact_root), port)
    os.execve(command[0], command, {**MLFLOW, **os.environ})


def mlflow_command(uri: str, artifacts: str, port: int) -> list[str]:
    """Starts MLflow's server on a database. It answers this machine only, and by this machine's names only."""
    return [
        *(sys.executable, "-m", "mlflow", "server"),
        *("--backend-store-uri", uri, "--default-artifact-root", artifacts, "--artifacts-destination", artifacts),
        *("--host", "127.0.0.1", "--port", str(port), "--workers", "1"),
        *("--allowed-hosts", f"127.0.0.1:{port},localhost:{port}"),
        *("--cors-allowed-origins", f"http://127.0.0.1:{port},http://localhost:{port}"),
    ]


async def _serve(settings: Settings) -> None:
    # The parts need seconds to import; `--help` and the settings' own errors do not wait for them.
    from errata.server.app import Server, faults_of, serve

    def started(server: Server) -> None:
        typer.echo(server.listening)

    await serve(settings, faults_of(os.environ), started)


def _settings(config: Path | None, **given: object) -> Settings:
    os.environ.update({PREFIX + key.upper(): str(value) for key, value in given.items() if value is not None})
    return load_settings(config)


@contextmanager
def _explained() -> Iterator[None]:
    """Ends the program with what an error says, and without a traceback."""
    try:
        yield
    except ErrataError as error:
        raise typer.Exit(_said(str(error))) from None


def _said(problem: str) -> int:
    typer.echo(problem, err=True)
    return 1


if __name__ == "__main__":
    cli(prog_name="python -m errata.server")
