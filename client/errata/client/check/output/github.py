"""What GitHub Actions shows of a check: annotations at the probes' lines, and a summary of the step in Markdown."""

import html
from collections.abc import Iterator, Sequence
from pathlib import Path

from errata.client.check.errors import Problem
from errata.client.check.judging import Change, Outcome, Report, Verdict
from errata.client.check.output.words import compared, explained, question, state, threshold, verdict

_MOST_ROWS = 200
"""A summary may have 1 MiB; a reader has less."""


def annotations(report: Report, root: Path) -> Iterator[str]:
    """A workflow command for each probe that fails, and each threshold that is missed; paths are relative to `root`."""
    for outcome in report.outcomes:
        if outcome.faults:
            level = "error" if outcome.verdict is Verdict.FAILED else "warning"
            title = f"{outcome.probe.id} ({state(outcome)})"
            message = f"{outcome.probe.question.prompt} {explained(outcome)}"
            yield _command(level, report.checks.path, outcome.probe.line, title, message, root)
    for share in report.shares:
        if not share.met:
            yield _command("error", report.checks.path, 1, "threshold", threshold(share), root)


def problems(found: Sequence[Problem], root: Path) -> Iterator[str]:
    """A workflow command for each reason why a check could not run."""
    for problem in found:
        message = f"{problem.field}: {problem.message}" if problem.field else problem.message
        yield _command("error", problem.path, problem.line, "errata check could not run", message, root)


def silence(token: str) -> tuple[str, str]:
    """The lines between which a runner takes no line for a command. Nobody must be able to guess `token`."""
    return f"::stop-commands::{token}", f"::{token}::"


def summary(report: Report) -> str:
    """The step's summary: the verdict, what changed, the thresholds."""
    changed = [o for o in report.outcomes if o.faults or o.change is Change.FIXED]
    lines = [f"### errata check: {_cell(compared(report))}", "", f"**{_cell(verdict(report))}**", ""]
    if changed:
        lines += ["| | probe | question | wanted | before | now |", "|---|---|---|---|---|---|"]
        lines += [_row(outcome) for outcome in changed[:_MOST_ROWS]]
        lines += ["", f"… and {len(changed) - _MOST_ROWS} more"] if len(changed) > _MOST_ROWS else []
        lines += [""]
    if report.shares:
        lines += ["| threshold | probes | share | least | |", "|---|---|---|---|---|"]
        lines += [
            f"| {_cell(s.tag)} | {s.probes} | {s.share:.3f} | {s.least:g} | {'met' if s.met else '**missed**'} |"
            for s in report.shares
        ]
        lines += [""]
    lines += [f"note: {_cell(note)}" for note in report.notes]
    return "\n".join(lines) + "\n"


def _row(outcome: Outcome) -> str:
    mark = "tolerated" if outcome.verdict is Verdict.TOLERATED else f"**{state(outcome)}**"
    probe = outcome.probe
    cells = (f"{probe.id} :{probe.line}", question(probe), probe.wanted, outcome.before or "", outcome.answer)
    return f"| {mark} | {' | '.join(map(_cell, cells))} |"


def _cell(text: str) -> str:
    """Text that Markdown takes for nothing else."""
    escaped = html.escape(" ".join(text.split()), quote=False)
    return "".join(f"\\{c}" if c in "\\`*_[]|~" else c for c in escaped)


def _command(level: str, path: Path | None, line: int | None, title: str, message: str, root: Path) -> str:
    named = {"file": _relative(path, root) if path else "", "line": str(line or ""), "title": title}
    given = ",".join(f"{name}={_property(value)}" for name, value in named.items() if value)
    return f"::{level} {given}::{_data(message)}"


def _relative(path: Path, root: Path) -> str:
    whole = path.resolve()
    return (whole.relative_to(root.resolve()) if whole.is_relative_to(root.resolve()) else whole).as_posix()


def _data(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    return _data(text).replace(":", "%3A").replace(",", "%2C")
