"""The history of edits, read and searched: log, show, diff, bisect."""

import hashlib
import json
from itertools import islice
from pathlib import Path
from typing import Annotated

import typer
from rich.console import RenderableType
from rich.text import Text

from errata.client.cli import graph
from errata.client.cli.deriving import show_derivation
from errata.client.cli.editing import conclude_edit, read_probes, show_evaluation, verdict
from errata.client.cli.found import show_measurement
from errata.client.cli.models import Most
from errata.client.cli.output import Output, facts, indented, line
from errata.client.cli.plain import clean, figures, plain, short, size, when
from errata.client.cli.session import Session
from errata.client.cli.tracing import show_trace
from errata.client.errors import NothingToBisectError
from errata.client.inputs import BisectionOptions, Probe
from errata.client.names import last_part
from errata.client.results import (
    Bisection,
    Comparison,
    Job,
    ProbeResult,
    State,
    Version,
    VersionFact,
    VersionState,
)

_FACTS = 3
_LISTED = 20
_GRAPH, _HANGING = "yellow", 4
"""The graph's colour; how far a folded headline is set in."""


def log(
    session: Session,
    of: Annotated[
        str | None, typer.Argument(metavar="MODEL|VERSION", help="All versions, or one and its ancestors.")
    ] = None,
    number: Most = 50,
) -> None:
    """The graph of versions, the newest first: facts, who, when, figures, aliases."""
    client = session.client
    named = session.version(of)
    one = "@" in named or "/versions/" in named or "/aliases/" in named
    # One more than is shown tells that there are more, without asking for them all.
    found = tuple(islice(client.lineage(named) if one else client.versions(named), number + 1))
    shown = found[:number]
    rejected = frozenset(v.name for v in shown if v.state is VersionState.REJECTED)
    strokes = graph.ASCII if session.output.console.options.ascii_only else graph.UNICODE
    drawn = [part for row in graph.rows(shown, strokes, rejected) for part in _log_lines(row, session.output)]
    left = [line("… and more; see them with -n", "dim")] if len(found) > len(shown) else []
    session.output.show(shown, *drawn, *left)


def show(
    session: Session,
    name: Annotated[str, typer.Argument(metavar="NAME", help="A version, or atlas/edits/ID, measurements/ID, …")],
) -> None:
    """A version: facts, figures, layers, size. Or an edit, trace, measurement, evaluation, and so on.

    Work that still runs is waited for. Exits 1 for what was rejected.
    """
    client, output = session.client, session.output
    name = _full(session, name)
    match name.split("/"):
        case ["models", _, "edits", _]:
            conclude_edit(session, session.followed(client.operation(client.get_edit(name)), "editing"))
        case ["models", _, "traces", _]:
            show_trace(session, session.followed(client.operation(client.get_trace(name)), "tracing"))
        case ["models", _, "measurements", _]:
            measurement = client.operation(client.get_measurement(name))
            show_measurement(output, session.followed(measurement, "measuring"))
        case ["models", _, "evaluations", _]:
            evaluation = session.followed(client.operation(client.get_evaluation(name)), "evaluating")
            show_evaluation(output, evaluation)
            session.refuse(evaluation)
        case ["models", _, "derivations", _]:
            derivation = client.operation(client.get_derivation(name))
            show_derivation(session, derivation)
        case ["models", _, "bisections", _]:
            show_bisection(output, session.followed(client.operation(client.get_bisection(name)), "bisecting"))
        case _:
            _show_version(session, client.version(session.version(name)))


def _full(session: Session, name: str) -> str:
    """A piece of work's full name: of atlas/edits/0197, or of edits/0197 where there is one model."""
    match name.split("/"):
        case [model, _, _] if model != "models":
            return f"models/{name}"
        case [kind, _] if kind != "models":
            return f"models/{session.model(None)}/{name}"
    return name


def diff(
    session: Session,
    first: Annotated[str, typer.Argument(metavar="A", help="A version, like atlas@3.")],
    second: Annotated[str, typer.Argument(metavar="B", help="Another one of the same model.")],
    probes: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Questions to both; default: those of the differing edits.")
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="List the answers that are the same, too.")] = False,
) -> None:
    """What two versions differ in: facts, layers, answers."""
    found = session.client.compare(
        session.version(first), session.version(second), read_probes(probes) if probes else ()
    )
    session.output.show(found, *_comparison(session.output, found, every))


def bisect(
    session: Session,
    bad: Annotated[str, typer.Argument(metavar="BAD", help="The version that fails, like atlas@16.")],
    probes: Annotated[Path, typer.Option(metavar="FILE", help="It must pass all of these (examples/probes.yaml).")],
    good: Annotated[str | None, typer.Option(metavar="VERSION", help="One that passes; default: the base.")] = None,
    again: Annotated[bool, typer.Option("--again", help="Search anew, although it was searched before.")] = False,
) -> None:
    """Find the edit that broke a probe, by halves.

    The server searches: interrupted, the same command goes on where it is.
    """
    client = session.client
    asked = read_probes(probes)
    failing = client.version(session.version(bad))
    passing = client.version(session.version(good)) if good is not None else None
    options: BisectionOptions = {}
    if passing is not None:
        options["good"] = passing
    if not again:
        options["request_id"] = _request_id(failing.name, passing.name if passing else "", asked)
    operation = client.bisect(failing, asked, **options)
    while not again and _came_to_nothing(operation.latest.job):
        # What stopped it has passed, maybe: the next search is as easily found again as the first.
        options["request_id"] = _request_id(failing.name, operation.name, asked)
        operation = client.bisect(failing, asked, **options)
    show_bisection(session.output, session.followed(operation, "bisecting"))


def _came_to_nothing(job: Job) -> bool:
    """Whether a search was stopped, rather than ended: one without anything to find would end so again."""
    nothing = job.error is not None and job.error.reason == NothingToBisectError.default_reason
    return job.state in (State.FAILED, State.CANCELLED) and not nothing


def show_bisection(output: Output, found: Bisection) -> None:
    """Says which version broke the probes, and what was tried."""
    steps = [(short(s.version), "passes" if s.good else "fails", "\n".join(_failed(s.failed))) for s in found.steps]
    tried = [line(""), output.table(("tried", "", "wrong answers"), steps)] if steps else []
    output.show(
        found,
        facts(
            [
                ("first bad", short(found.first_bad)),
                ("facts", "\n".join(found.facts)),
                ("between", f"{short(found.good)} (good) and {short(found.bad)} (bad), {len(steps)} tried"),
                ("bisection", found.name),
            ]
        ),
        *tried,
    )


def _failed(results: tuple[ProbeResult, ...]) -> list[str]:
    return [f"{each.question} {each.after!r}, not {each.expected or each.before!r}" for each in results]


def _request_id(bad: str, after: str, probes: list[Probe]) -> str:
    """The same for the same search `after` the good version or a failed one, so that asking for it again finds it."""
    images = [str(path) for probe in probes for path in getattr(probe.prompt, "images", ())]
    digest = hashlib.sha256(json.dumps([bad, after, plain(probes)], sort_keys=True).encode())
    for image in images:
        digest.update(Path(image).read_bytes())
    return f"bisect-{digest.hexdigest()[:40]}"


def _log_lines(row: graph.Row, output: Output) -> list[RenderableType]:
    """A version beside the graph."""
    version = row.version
    told = list(version.facts[:_FACTS]) if version.parent else ["the base"]
    if len(version.facts) > _FACTS:
        told.append(f"… {len(version.facts) - _FACTS} more facts")
    if said := figures(version.scores):
        told.append(said)
    below = row.below or " "
    lines = [Text(row.closing, style=_GRAPH)] if row.closing else []
    lines += _beside(_headline(version), "", row.first, below, output)
    for each in told:
        lines += _beside(Text(clean(each)), "  ", below, below, output)
    return [*lines, *([Text(row.below, style=_GRAPH)] if row.below else [])]


def _headline(version: Version) -> Text:
    head = Text(short(version.name), style="bold")
    if version.aliases:
        head.append(f" ({', '.join(map(last_part, version.aliases))})", "green")
    if version.state is VersionState.REJECTED:
        head.append(" rejected", "red")
    return head.append(f"  {clean(version.created_by)} {when(version.create_time)}", "not bold dim")


def _beside(text: Text, indent: str, first: str, below: str, output: Output) -> list[Text]:
    """A text right of the graph, folded where it is too long; the graph goes on at its left."""
    room = output.console.width - max(len(first), len(below)) - 1 - len(indent) - (0 if indent else _HANGING)
    made = []
    for i, part in enumerate(text.wrap(output.console, max(room, 10))):
        part.rstrip()
        left = f"{below if i else first} {indent if indent or not i else ' ' * _HANGING}"
        made.append(Text.assemble((left, _GRAPH), part))
    return made


def _show_version(session: Session, version: Version) -> None:
    output = session.output
    made_by = version.edit or version.derivation
    head = facts(
        [
            ("version", short(version.name)),
            ("state", version.state),
            ("aliases", ", ".join(map(last_part, version.aliases))),
            ("parent", short(version.parent) if version.parent else ""),
            ("by", f"{version.created_by}, {when(version.create_time)}"),
            ("facts", "\n".join(version.facts) if version.parent else "the base"),
            ("layers", ", ".join(map(str, version.layers))),
            ("size", size(version.delta_bytes)),
            ("MLflow", f"{version.publish_state}, version {version.mlflow_version}" if version.mlflow_version else ""),
            ("made by", made_by),
            ("base", version.base_sha256),
            ("delta", version.delta_sha256),
        ]
    )
    output.show(version, head, *verdict(output, version.scores, version.rejections))


def _comparison(output: Output, found: Comparison, every: bool) -> list[RenderableType]:
    first, second = short(found.first), short(found.second)
    parts: list[RenderableType] = []
    for name, only in ((first, found.only_first), (second, found.only_second)):
        if only:
            parts += [line(f"only {name}", "bold"), indented(_facts_of(only))]
    if found.layers:
        rows = ((str(each.layer), f"{each.relative_norm:.2%}", str(each.rank)) for each in found.layers)
        parts += [line(""), output.table(("layer", "‖ΔW‖/‖W‖", "rank"), rows)]
    answers = [each for each in found.answers if every or each.changed]
    if answers:
        table = ((a.question, a.first, a.second, a.expected) for a in answers)
        parts += [line(""), output.table(("question", first, second, "expected"), table)]
    changed = sum(each.changed for each in found.answers)
    same = "nothing differs" if not parts else ""
    asked = f"{changed} of {len(found.answers)} answers changed" if found.answers else same
    return [*parts, line(""), line(asked)] if asked else parts


def _facts_of(only: tuple[VersionFact, ...]) -> list[str]:
    told = [f"{short(each.version)}  {each.fact}" for each in only]
    return [*told[:_LISTED], *([f"… {len(told) - _LISTED} more"] if len(told) > _LISTED else [])]
