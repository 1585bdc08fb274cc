"""The command `errata check`: chooses who is asked, runs the check, and says its result in every form that is wanted.

Exit codes: 0 passed, 1 regressed, 2 could not run. Files are written once every answer is there.
"""

import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from errata.client.cli.output import line
from errata.client.cli.problems import NO, UsageError
from errata.client.cli.session import Session
from errata.client.errors import ErrataError
from errata.client.names import full_name, model_part

# pydantic and PyYAML take a moment to import, which no other command should wait for.
if TYPE_CHECKING:
    from errata.client.check.answering import Answerer, Step
    from errata.client.check.baseline import Baseline
    from errata.client.check.checks import Checks
    from errata.client.check.judging import Report

_FILES = (".json",)


def check(
    session: Session,
    checks: Annotated[Path | None, typer.Argument(metavar="CHECKS.yaml", help="What the version must say.")] = None,
    model: Annotated[str | None, typer.Option(metavar="MODEL", help="Default: a server's only one.")] = None,
    version: Annotated[str, typer.Option(metavar="VERSION", help="A number or alias.")] = "candidate",
    baseline: Annotated[
        str | None, typer.Option(metavar="VERSION|FILE", help="What `unchanged` means: a version, or answers on file.")
    ] = None,
    local: Annotated[
        str | None, typer.Option(metavar="TARGET", help="No server: models:/NAME/3, an adapter folder, a checkpoint.")
    ] = None,
    base: Annotated[str, typer.Option(metavar="MODEL", help="With --local: what an adapter goes on.")] = "atlas",
    update: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Judge nothing; write the version's answers as a baseline.")
    ] = None,
    junit: Annotated[Path | None, typer.Option(metavar="FILE", help="Write JUnit XML.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="Show the probes that hold, too.")] = False,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON schema of CHECKS.yaml, and end.")] = False,
) -> None:
    """Check a version against a file of probes, and fail where it regressed.

    --local takes `0` as --baseline for the base itself. On GitHub Actions, failing probes are annotated where they
    stand, and the step gets a summary.
    """
    from errata.client.check.errors import CheckError, Problem
    from errata.client.check.output import github

    if schema:
        from errata.client.check.format import schema_text

        typer.echo(schema_text(), nl=False)
        return
    chosen = _Chosen(model=model, version=version, baseline=baseline, local=local, base=base)
    actions = _Actions.of(os.environ)
    try:
        _check_usage(checks, update, junit, baseline)
        assert checks is not None
        if update:
            _update(session, checks, chosen, update)
            return
        report = _report(session, checks, chosen)
        _say(session, report, actions, junit, everything)
    except ErrataError as error:
        if actions:
            problems = error.problems if isinstance(error, CheckError) else (Problem(message=str(error)),)
            _annotate(session, github.problems(problems, actions.root))
        raise
    if not report.passed:
        raise typer.Exit(NO)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Chosen:
    """Who is asked."""

    model: str | None
    version: str
    baseline: str | None
    local: str | None
    base: str


@dataclass(frozen=True, slots=True)
class _Actions:
    """GitHub Actions, where the command runs there: the checkout, and the file of the step's summary."""

    root: Path
    summary: Path | None

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> "_Actions | None":
        if environment.get("GITHUB_ACTIONS") != "true":
            return None
        summary = environment.get("GITHUB_STEP_SUMMARY")
        return cls(Path(environment.get("GITHUB_WORKSPACE") or "."), Path(summary) if summary else None)


def _check_usage(checks: Path | None, update: Path | None, junit: Path | None, baseline: str | None) -> None:
    """What would otherwise come out only after every probe was asked."""
    if checks is None:
        raise UsageError("name a file of checks: errata check CHECKS.yaml")
    if update and (junit or baseline):
        raise UsageError("--update judges nothing, so it takes neither --junit nor --baseline")
    for file in (update, junit):
        if file and not file.parent.is_dir():
            raise UsageError(f"there is no folder {str(file.parent)!r} for {file.name!r}; make it first")


def _report(session: Session, path: Path, chosen: _Chosen) -> "Report":
    from errata.client.check.format import load_checks
    from errata.client.check.running import needs_baseline, run_checks

    checks = load_checks(path)
    named = chosen.baseline or (str(checks.baseline) if checks.baseline else None)
    if named is None:
        needs_baseline(checks)
    compared: Answerer | Baseline | None = None
    if named is not None and (chosen.baseline is None or named.endswith(_FILES)):
        from errata.client.check.baseline import read_baseline

        compared = read_baseline(Path(named))
        compared.answers_to(checks)
    version, opened = _answerers(session, chosen, named if compared is None else None)
    asked = len(checks.probes) * (1 if opened is None else 2)
    with _progress(session, asked) as step:
        return run_checks(checks, version, compared or opened, step)


def _answerers(session: Session, chosen: _Chosen, baseline: str | None) -> "tuple[Answerer, Answerer | None]":
    """The version, and the baseline where it is a version as well."""
    from errata.client.check.answering import ServerAnswerer, local_opener, open_local

    if chosen.local is not None:
        opener = local_opener()
        found = open_local(opener, chosen.local, chosen.base)
        return found, None if baseline is None else open_local(opener, baseline, chosen.base)
    named = session.version(chosen.version, model=chosen.model)
    asked = ServerAnswerer(session.client, named)
    if baseline is None:
        return asked, None
    # A version that names its model says enough on a server that has several.
    compared = session.version(baseline, model=chosen.model or model_part(full_name(named)))
    return asked, ServerAnswerer(session.client, compared)


def _update(session: Session, path: Path, chosen: _Chosen, into: Path) -> None:
    from errata.client.check.baseline import write_baseline
    from errata.client.check.format import load_checks

    checks: Checks = load_checks(path)
    version, _ = _answerers(session, chosen, None)
    with _progress(session, len(checks.probes)) as step:
        answers = version.answers(checks.path, checks.probes, step)
    write_baseline(into, checks, version.subject, answers)
    said = f"{into}: {len(answers)} answers of {version.subject.name}"
    session.output.show({"baseline": into, "answers": len(answers), "version": version.subject.name}, line(said))


def _say(session: Session, report: "Report", actions: _Actions | None, junit: Path | None, everything: bool) -> None:
    from errata.client.check.baseline import write_whole
    from errata.client.check.output import github
    from errata.client.check.output.document import document
    from errata.client.check.output.junit import junit as junit_xml
    from errata.client.check.output.table import tables

    # Files first: where one cannot be written, that alone is what stdout says.
    if junit:
        write_whole(junit, junit_xml(report))
    if actions and actions.summary:
        with actions.summary.open("a", encoding="utf-8") as file:
            file.write(github.summary(report))
    told = list(tables(report, everything=everything, width=session.output.console.width))
    if not actions:
        session.output.show(document(report), *told)
        return
    # A runner carries out commands wherever they stand in a line of their own, in an answer as well.
    off, on = map(line, github.silence(secrets.token_hex(16)))
    session.output.show(document(report), off, *told, on)
    for command in github.annotations(report, actions.root):
        # Where they are heard again for certain: two streams have no order. Stdout may be a JSON document.
        (session.output.note if session.output.as_json else session.output.say)(command)


def _annotate(session: Session, commands: Iterator[str]) -> None:
    # To stderr, where GitHub reads them as well: stdout may be a JSON document.
    for command in commands:
        session.output.note(command)


@contextmanager
def _progress(session: Session, total: int) -> "Iterator[Step]":
    """Counts answers on a terminal."""
    errors = session.output.errors
    columns = (TextColumn("asking"), BarColumn(bar_width=30), MofNCompleteColumn())
    with Progress(*columns, console=errors, transient=True, disable=not errors.is_terminal) as shown:
        task = shown.add_task("asking", total=total)
        yield lambda: shown.advance(task)
