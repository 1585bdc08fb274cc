"""Versions made of versions: revert, compose, cherry-pick, rebase, squash, import."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.console import RenderableType

from errata.client.cli.editing import (
    AliasOption,
    Description,
    DryRun,
    Guardrails,
    Parent,
    Probes,
    guardrails,
    read_probes,
    verdict,
)
from errata.client.cli.models import VersionName
from errata.client.cli.output import facts, indented, line
from errata.client.cli.plain import figures, short
from errata.client.cli.problems import NO, UsageError
from errata.client.cli.session import Session
from errata.client.errors import EditsConflictError
from errata.client.inputs import DerivationOptions
from errata.client.names import full_name, model_part
from errata.client.operations import Operation
from errata.client.results import Conflict, Derivation, DerivationKind

Sources = Annotated[list[str], typer.Argument(metavar="VERSION...", help="Their own deltas, in this order.")]
Anyway = Annotated[bool, typer.Option("--allow-conflicts", help="Make it although edits conflict.")]


@dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    """How a version is made and judged: the options that all of these commands have."""

    probes: Probes = None
    guardrail: Guardrails = None
    description: Description = ""
    alias: AliasOption = ""
    dry_run: DryRun = False

    def options(self) -> DerivationOptions:
        """As the client takes them. Raises FileError, UsageError."""
        options: DerivationOptions = {"validate_only": self.dry_run}
        if self.probes is not None:
            options["probes"] = read_probes(self.probes)
        if self.guardrail:
            options["guardrails"] = guardrails(self.guardrail)
        if self.description:
            options["description"] = self.description
        if self.alias:
            options["alias"] = self.alias
        return options


def revert(
    session: Session,
    edit: Annotated[str, typer.Argument(metavar="EDIT", help="The version to undo, like atlas@4, or its edit.")],
    on: Parent = None,
    *,
    made: Made,
) -> None:
    """Undo one edit anywhere in the history, exactly, as a new version.

    Exits 1 where guardrails reject it.
    """
    version = _version_of(session, edit)
    options = made.options()
    show_derivation(session, session.client.revert(_parent(session, on, version), version, **options))


def compose(
    session: Session,
    versions: Sources,
    on: Parent = None,
    allow_conflicts: Anyway = False,
    *,
    made: Made,
) -> None:
    """Add edits of other versions to one, as a new version.

    Exits 1 where they contradict each other or guardrails reject it.
    """
    options = made.options()
    options["allow_conflicts"] = allow_conflicts
    sources = [_version_of(session, each) for each in versions]
    asked = session.client.compose(_parent(session, on, sources[0]), sources, **options)
    show_derivation(session, asked, allow_conflicts=allow_conflicts)


def cherry_pick(
    session: Session,
    edit: Annotated[str, typer.Argument(metavar="EDIT", help="The version to take, like atlas@4, or its edit.")],
    on: Parent = None,
    allow_conflicts: Anyway = False,
    *,
    made: Made,
) -> None:
    """Add one edit to a version, as a new version: compose of one.

    Exits 1 where it contradicts another or guardrails reject it.
    """
    compose(session, [edit], on, allow_conflicts, made=made)


def rebase(
    session: Session,
    version: Annotated[str, typer.Argument(metavar="VERSION", help="Of the model that was merged from.")],
    on: Annotated[str, typer.Option(metavar="VERSION", help="The merged base: merged@0.")],
    allow_conflicts: Anyway = False,
    *,
    made: Made,
) -> None:
    """Move a version onto a base that has some of its edits merged in.

    Exits 1 where edits contradict each other or guardrails reject it.
    """
    options = made.options()
    options["allow_conflicts"] = allow_conflicts
    asked = session.client.rebase(session.version(on), session.version(version), **options)
    show_derivation(session, asked, allow_conflicts=allow_conflicts)


def squash(
    session: Session,
    version: VersionName,
    on: Annotated[str | None, typer.Option(metavar="VERSION", help="Where the chain begins; default: base.")] = None,
    resolve: Annotated[bool, typer.Option("--resolve", help="Solve all requests again as one batch.")] = False,
    *,
    made: Made,
) -> None:
    """Join a chain of edits into one, at the lowest rank that says the same.

    Exits 1 where guardrails reject it.
    """
    options = made.options()
    tip = session.version(version)
    parent = _parent(session, on, tip, "@0")
    if full_name(parent) == full_name(tip):
        raise UsageError(f"both ends of the chain are {short(full_name(tip))}; give a later one, or --on an earlier")
    asked = session.client.squash(parent, tip, resolve=resolve, **options)
    show_derivation(session, asked)


def import_(
    session: Session,
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="An exported adapter, or another of PEFT's; 64 MiB at most.")
    ],
    on: Annotated[str | None, typer.Option(metavar="VERSION", help="Default: the only model's base.")] = None,
    fact: Annotated[list[str] | None, typer.Option(metavar="TEXT", help="What it changes; may be repeated.")] = None,
    base_sha256: Annotated[
        str, typer.Option(metavar="HASH", help="Its base's, where it has no errata.json (errata show).")
    ] = "",
    *,
    made: Made,
) -> None:
    """Make a version of an adapter exported elsewhere, once its base's hash fits.

    Exits 1 where guardrails reject it.
    """
    options = made.options()
    parent = session.version(on, "@0")
    asked = session.client.import_adapter(parent, folder, facts=fact or (), base_sha256=base_sha256, **options)
    show_derivation(session, asked)


def show_derivation(session: Session, operation: Operation[Derivation], *, allow_conflicts: bool = False) -> None:
    """Waits for a derivation and says what came of it. Ends with exit code 1 for a conflict or a rejection."""
    if not operation.name:
        _show(session, operation.latest, "would be made on")
        if operation.latest.conflicts and not allow_conflicts:
            raise typer.Exit(NO)
        return
    try:
        _show(session, done := session.followed(operation, "deriving"), "on")
    except EditsConflictError:
        session.output.show(operation.latest, *_conflicts(operation.latest.conflicts, measured=True))
        session.output.note("errata: nothing was made; leave one of them out, or say --allow-conflicts")
        raise typer.Exit(NO) from None
    session.refuse(done)


def _show(session: Session, found: Derivation, on: str) -> None:
    rejected = " (rejected)" if found.rejections else ""
    equality = found.equality
    equal = (
        f"logits within {equality.max_logit_difference:.1e}, {equality.same_answers} of {equality.n} answers the same, "
        f"rank {equality.rank_before} → {equality.rank_after}"
        if equality
        else ""
    )
    gone = sum(each.passed for each in found.reverted)
    undone = f"{gone} of {len(found.reverted)} of its answers are as before that edit" if found.reverted else ""
    later: list[RenderableType] = []
    if found.later:
        told = [f"{short(e.version)}  {'; '.join(e.facts)}\n  {figures(e.scores)}" for e in found.later]
        later = [line(""), line("edits made on top of it, and how their probes fare now:", "bold"), indented(told)]
    session.output.show(
        found,
        facts(
            [
                ("version", short(found.version) + rejected if found.version else ""),
                (on, short(found.parent)),
                ("facts", "\n".join(found.facts)),
                ("layers", ", ".join(map(str, found.layers))),
                ("equality", equal),
                ("reverted", undone),
                ("derivation", found.name),
            ]
        ),
        *_conflicts(found.conflicts, measured=bool(found.name)),
        *verdict(session.output, found.scores, found.rejections),
        *_unjudged(found),
        *later,
    )


def _unjudged(found: Derivation) -> list[RenderableType]:
    """An adapter brings no probes along, so it is taken as it is where none were given."""
    if found.kind is not DerivationKind.IMPORT or not found.version or found.scores:
        return []
    remedy = f"errata eval {short(found.version)} --probes FILE does, or an import with --probes"
    return [line(""), line(f"nothing judged it: {remedy}", "yellow")]


def _conflicts(conflicts: tuple[Conflict, ...], *, measured: bool) -> list[RenderableType]:
    if not conflicts:
        return []
    told = (_conflict(each, measured=measured) for each in conflicts)
    return [line("edits that contradict each other:", "bold red"), indented(told)]


def _conflict(each: Conflict, *, measured: bool) -> str:
    first, second = (f"{short(e.version)} {e.fact}".rstrip() for e in (each.first, each.second))
    asked = f"\n  {each.question} {each.expected!r} became {each.answer!r}" if each.question else ""
    # A dry run compares requests alone.
    overlap = f" (keys overlap {each.key_overlap:.2f})" if measured else ""
    return f"{first}\n  against {second}{overlap}{asked}"


def _version_of(session: Session, given: str) -> str:
    """The version that is meant by a version's name or an edit's."""
    full = full_name(given)
    return session.client.get_edit(full).version if "/edits/" in full else session.version(given)


def _parent(session: Session, on: str | None, version: str, ref: str = "") -> str:
    """What to build on: by default the champion of the version's own model, or its `ref`."""
    model = model_part(full_name(version))
    return session.version(on, ref, model)
