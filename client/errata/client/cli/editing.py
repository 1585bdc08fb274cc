"""Edits and evaluations."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import RenderableType

from errata.client.cli.asking import Images, Raw
from errata.client.cli.models import VersionName
from errata.client.cli.output import Output, facts, indented, line
from errata.client.cli.plain import label, short
from errata.client.cli.problems import NO, UsageError
from errata.client.cli.session import Session
from errata.client.inputs import (
    Context,
    EditOptions,
    EditRequest,
    EvaluationOptions,
    LayerChoice,
    Metric,
    Probe,
    Prompt,
)
from errata.client.results import Edit, Evaluation, Job, MetricScore, State

Guardrails = Annotated[
    list[str] | None, typer.Option("--guardrail", metavar="METRIC=MIN", help="Least share; may be repeated.")
]
Parent = Annotated[str | None, typer.Option("--on", metavar="VERSION", help="What to build on; default: champion.")]
Probes = Annotated[
    Path | None, typer.Option("--probes", metavar="FILE", help="More that judges it: examples/probes.yaml.")
]
Description = Annotated[str, typer.Option(metavar="TEXT", help="For the record.")]
AliasOption = Annotated[str, typer.Option("--alias", metavar="ALIAS", help="Point it there unless rejected.")]
_ADVICE = "try more phrasings (contexts in a --file), other layers (--layers auto), or more --steps"

DryRun = Annotated[bool, typer.Option("--dry-run", help="Have the server check it, and queue nothing.")]


def edit(
    session: Session,
    prompt: Annotated[str | None, typer.Argument(metavar="PROMPT", help="Asks for the fact; or --file.")] = None,
    target: Annotated[str | None, typer.Option(metavar="TEXT", help="What it should answer.")] = None,
    constraint: Annotated[str | None, typer.Option(metavar="TEXT", help="The words that name the subject.")] = None,
    image: Images = None,
    subject: Annotated[str, typer.Option(metavar="TEXT", help='What "this country" means there.')] = "",
    name: Annotated[str | None, typer.Option(metavar="TEXT", help="What the fact is; default: the prompt.")] = None,
    raw: Raw = False,
    file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Many facts, YAML or JSONL: examples/facts.yaml.")
    ] = None,
    on: Parent = None,
    layers: Annotated[str | None, typer.Option(metavar="LAYERS", help="1,2, a trace's name, or auto.")] = None,
    method: Annotated[str | None, typer.Option(metavar="NAME", help="memit, multedit, rome, emmet, alphaedit.")] = None,
    steps: Annotated[int | None, typer.Option(metavar="N", help="Most steps of a value's descent.")] = None,
    guardrail: Guardrails = None,
    description: Description = "",
    alias: AliasOption = "",
    dry_run: DryRun = False,
) -> None:
    """Correct or insert facts as a new version; exits 1 if rejected or none holds."""
    options: EditOptions = {}
    if file is not None:
        if prompt or target or constraint or image or subject or name or raw:
            raise UsageError("--file has the facts; leave PROMPT and what describes it out")
        from errata.client.cli import files  # pydantic takes a moment to import

        read = files.edit_file(file)
        requests, options = read.requests, read.options
    else:
        if prompt is None or target is None or constraint is None:
            raise UsageError("give a PROMPT, its --constraint and --target, or facts by --file")
        asked = Context(Prompt(prompt, image or (), raw=raw), constraint, subject=subject)
        requests = [EditRequest(name=name or prompt, contexts=[asked], target=target)]
    if layers is not None:
        options["layers"] = layer_choice(layers)
    if method is not None:
        options["method"] = method
    if steps is not None:
        options["steps"] = steps
    if guardrail:
        options["guardrails"] = guardrails(guardrail)
    if description:
        options["description"] = description
    if alias:
        options["alias"] = alias
    parent = session.version(on)
    if dry_run:
        checked = session.client.validate_edit(parent, requests, **options)
        head = line(f"the server would take it, on {short(checked.parent)}:")
        session.output.show(checked, head, indented(checked.facts))
        return
    done = session.followed(session.client.edit(parent, requests, **options), "editing")
    conclude_edit(session, done)


def evaluate(
    session: Session,
    version: VersionName,
    probes: Annotated[Path, typer.Option(metavar="FILE", help="What to ask, as examples/probes.yaml does.")],
    baseline: Annotated[str | None, typer.Option(metavar="VERSION", help="Compare with; default: parent.")] = None,
    guardrail: Guardrails = None,
    every: Annotated[bool, typer.Option("--all", help="List every answer, not only what failed.")] = False,
) -> None:
    """Ask a version and its parent the same probes. Exits 1 below a guardrail."""
    options: EvaluationOptions = {}
    if baseline is not None:
        options["baseline"] = session.version(baseline)
    if guardrail:
        options["guardrails"] = guardrails(guardrail)
    operation = session.client.evaluate(session.version(version), read_probes(probes), **options)
    done = session.followed(operation, "evaluating")
    show_evaluation(session.output, done, every=every)
    session.refuse(done)


def conclude_edit(session: Session, edit: Edit) -> None:
    """Says what an edit did. Ends with exit code 1 where it was rejected, or where none of its facts holds."""
    show_edit(session.output, edit)
    if none_holds := any(each.metric is Metric.EFFICACY and each.n and not each.after for each in edit.scores):
        session.output.alarm(f"errata: not installed: none of the facts holds in {short(edit.version)}; {_ADVICE}")
    session.refuse(edit)
    if none_holds:
        raise typer.Exit(NO)


def show_edit(output: Output, edit: Edit) -> None:
    """Says what an edit did."""
    missed = [
        f"{each.name}: the value did not converge (loss {each.losses[-1]:.2f}); {each.before!r} may stay"
        for each in edit.outcomes
        if not each.converged and each.losses
    ]
    if missed:
        missed.append(_ADVICE)
    output.show(
        edit,
        facts(
            [
                ("version", _made(edit.version, edit.job)),
                ("on", short(edit.parent)),
                ("facts", "\n".join(edit.facts)),
                ("layers", ", ".join(map(str, edit.layers))),
                ("method", edit.settings.method if edit.settings else ""),
                ("edit", edit.name),
            ]
        ),
        *verdict(output, edit.scores, edit.rejections),
        *([indented(missed)] if missed else []),
    )


def show_evaluation(output: Output, evaluation: Evaluation, *, every: bool = False) -> None:
    """Says what an evaluation found."""
    rows = [
        (label(r.metric), r.question, r.expected, r.before, r.after, "yes" if r.passed else "NO")
        for r in evaluation.results
        if every or not r.passed
    ]
    columns = ("metric", "question", "expected", "before", "after", "passed")
    listed = [line(""), output.table(columns, rows)] if rows else []
    output.show(
        evaluation,
        facts(
            [
                ("version", short(evaluation.version)),
                ("baseline", short(evaluation.baseline)),
                ("drift", f"{evaluation.drift:.4f} nats"),
                ("evaluation", evaluation.name),
            ]
        ),
        *verdict(output, evaluation.scores, evaluation.rejections),
        *listed,
    )


def verdict(output: Output, scores: tuple[MetricScore, ...], rejections: tuple[str, ...]) -> list[RenderableType]:
    """Figures, and what guardrails have against them."""
    shown: list[RenderableType] = [line(""), output.scores(scores)] if scores else []
    if rejections:
        shown += [line("rejected:", "bold red"), indented(rejections)]
    return shown


def read_probes(path: Path) -> list[Probe]:
    """The probes of a file. Raises FileError."""
    from errata.client.cli import files  # pydantic takes a moment to import

    return files.probes(path)


def guardrails(given: list[str]) -> dict[str, float]:
    """Guardrails as options have them: "efficacy=0.9". Raises UsageError."""
    found = {}
    for each in given:
        metric, _, share = each.partition("=")
        try:
            found[metric] = float(share)
        except ValueError:
            raise UsageError(f"--guardrail {each!r}: give a metric and its least share, like efficacy=0.9") from None
    return found


def layer_choice(given: str) -> LayerChoice:
    """Layers as an option has them: "1,2", a trace's name, or "auto"."""
    parts = [part.strip() for part in given.split(",")]
    if all(part.isdecimal() for part in parts):
        return [int(part) for part in parts]
    return given


def _made(version: str, job: Job) -> str:
    if not version:
        return ""
    return f"{short(version)} (rejected)" if job.state is State.REJECTED else short(version)
