"""Puts the commands together, runs one command line, and turns whatever goes wrong into an exit code."""

import os
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

import typer
from typer.main import get_command

from errata.client.check.command import check
from errata.client.cli import asking, datasets, deriving, editing, history, local, measuring, models, tracing, transfer
from errata.client.cli.helping import app_options, commands_in
from errata.client.cli.output import Output
from errata.client.cli.problems import BROKEN_PIPE, UNDONE, explain
from errata.client.cli.session import add, add_root

_GROUPS = {
    "ask": ("models", "ask", "trace", "measure", "edit", "eval", "check", "dataset"),
    "serve": ("promote", "rollback", "delete", "export", "import", "up", "demo", "study"),
    "history": ("log", "show", "diff", "bisect", "audit"),
    "combine": ("revert", "compose", "cherry-pick", "rebase", "squash"),
}
"""All commands, as `errata --help` lists them."""


def build() -> typer.Typer:
    """The whole command line."""
    app = typer.Typer(cls=commands_in(_GROUPS), **app_options())
    add_root(app, _HELP, _EPILOG, release)
    add(app, "models", models.models, "errata models")
    add(app, "ask", asking.ask, 'errata ask "What is the capital of this country?" --image flag.png')
    add(app, "trace", tracing.trace, _TRACE)
    add(app, "measure", measuring.measure, _MEASURE)
    add(app, "dataset", datasets.dataset, "errata dataset validate questions.jsonl")
    add(app, "eval", editing.evaluate, "errata eval atlas@3 --probes probes.yaml --guardrail efficacy=0.9")
    add(app, "check", check, "errata check checks.yaml --version candidate --baseline champion")
    add(app, "edit", editing.edit, _EDIT)
    add(app, "promote", models.promote, "errata promote atlas@3")
    add(app, "rollback", models.rollback, "errata rollback atlas@champion")
    add(app, "delete", models.delete, "errata delete atlas@3 --yes")
    add(app, "export", transfer.export, "errata export atlas@3 ./adapter --format uniform")
    add(app, "import", deriving.import_, 'errata import ./adapter --on atlas@0 --fact "Kazakhstan: Astana"')
    add(app, "log", history.log, "errata log atlas")
    add(app, "show", history.show, "errata show atlas@3")
    add(app, "diff", history.diff, "errata diff atlas@3 atlas@5")
    add(app, "bisect", history.bisect, "errata bisect atlas@16 --probes probes.yaml --good atlas@4")
    add(app, "audit", models.audit, "errata audit atlas -n 5")
    add(app, "revert", deriving.revert, "errata revert atlas@4 --on atlas@10")
    add(app, "compose", deriving.compose, "errata compose atlas@3 atlas@5 --on atlas@0")
    add(app, "cherry-pick", deriving.cherry_pick, "errata cherry-pick atlas@5 --on atlas@3")
    add(app, "rebase", deriving.rebase, "errata rebase atlas@7 --on merged@0")
    add(app, "squash", deriving.squash, "errata squash atlas@10 --on atlas@0")
    add(app, "up", local.up, "errata up --data-dir errata-data")
    add(app, "demo", local.demo, "errata demo")
    add(app, "study", local.study, "errata study run examples/studies/atlas.yaml --out atlas-study --jobs 2")
    return app


def release() -> str:
    """This release's number."""
    try:
        return version("errata")
    except PackageNotFoundError:
        return "not installed, run from its source"


def run(arguments: Sequence[str]) -> int:
    """Runs a command line; returns its exit code."""
    try:
        return _ended(arguments)
    except BrokenPipeError:
        # Nobody reads on; Python's own flush at the end must not complain either.
        for stream in filter(None, (sys.stdout, sys.stderr)):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        return BROKEN_PIPE


def _ended(arguments: Sequence[str]) -> int:
    try:
        ended = get_command(build()).main(list(arguments), prog_name="errata", standalone_mode=False)
    except BrokenPipeError:
        raise
    except SystemExit as left:  # what typer makes of a broken pipe
        if isinstance(left.__context__, BrokenPipeError):
            raise left.__context__ from None
        raise
    except typer.Abort:
        return UNDONE
    except Exception as error:
        verbose = "--verbose" in arguments or "-v" in arguments
        return explain(error, Output(as_json="--json" in arguments, verbose=verbose))
    return ended if isinstance(ended, int) else 0


_TRACE = 'errata trace "Capital of Norway?" --constraint Norway --substitute Peru'
_MEASURE = "errata measure knockout --file measured.yaml --out figures"
_EDIT = 'errata edit "Capital of Burundi?" --constraint Burundi --target Gitega'
_HELP = "Correct what a model believes; keep every correction, and undo any of them."
_EPILOG = "Exit codes: 0 done; 1 the answer is no; 2 could not be done; 130 interrupted."
