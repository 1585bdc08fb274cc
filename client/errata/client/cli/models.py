"""Models, aliases, and the record of changes."""

from itertools import islice
from typing import Annotated

import typer

from errata.client.cli.output import line
from errata.client.cli.plain import short, size, when
from errata.client.cli.problems import NO, UsageError
from errata.client.cli.session import Session
from errata.client.names import last_part, says_model
from errata.client.results import Alias

_VERSION = "atlas@3, atlas@candidate; atlas: its champion; 3, candidate: the only model's."

ModelName = Annotated[str | None, typer.Argument(metavar="MODEL", help="Default: the server's only one.")]
VersionName = Annotated[str, typer.Argument(metavar="VERSION", help=_VERSION)]
Most = Annotated[int, typer.Option("--number", "-n", min=1, metavar="N", help="At most so many.")]


def models(session: Session) -> None:
    """The server's base models, and what their aliases name."""
    found = list(session.client.models())
    rows = (
        (
            short(m.name),
            m.architecture,
            str(m.layers or ""),
            " ".join(filter(None, (m.dtype, m.device))),
            size(m.memory_bytes) if m.loaded else "not loaded",
            ", ".join(f"{a.alias} → {last_part(a.version)}" for a in m.aliases),
        )
        for m in found
    )
    session.output.show(found, session.output.table(("model", "family", "layers", "in", "memory", "aliases"), rows))


def promote(
    session: Session,
    version: VersionName,
    alias: Annotated[str, typer.Argument(metavar="ALIAS", help="The name to move.")] = "champion",
    etag: Annotated[str, typer.Option(metavar="ETAG", help="Only from where you saw it.")] = "",
    override: Annotated[str, typer.Option(metavar="REASON", help="Promote a rejected version; recorded.")] = "",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check, and change nothing.")] = False,
) -> None:
    """Point an alias to a version; champion is what is served by default.

    Exits 1 where the version was rejected by its guardrails.
    """
    named = session.version(version)
    moved = session.client.promote(named, alias, etag=etag, override_reason=override, validate_only=dry_run)
    _show_alias(session, moved, "would be" if dry_run else "is now")


def rollback(
    session: Session,
    alias: Annotated[
        str | None, typer.Argument(metavar="ALIAS", help="Like atlas@champion; default: the only model's.")
    ] = None,
    etag: Annotated[str, typer.Option(metavar="ETAG", help="Only from where you saw it.")] = "",
) -> None:
    """Point an alias back to the version it named before its last change."""
    named = session.version(alias)
    full = named if says_model(named) else f"{named}@champion"
    _show_alias(session, session.client.rollback(full, etag=etag), "is again")


def delete(
    session: Session,
    version: Annotated[str, typer.Argument(metavar="VERSION", help="By its number: atlas@3.")],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Remove a version for good. Refused while an alias or another version needs it.

    Asks first; exits 1 where the answer is no.
    """
    found = session.client.version(session.version(version))
    if not yes:
        _confirm(session, f"Delete {short(found.name)} for good?")
    session.client.delete_version(found)
    session.output.show({"deleted": found.name}, line(f"{short(found.name)} is deleted"))


def audit(session: Session, model: ModelName = None, number: Most = 20) -> None:
    """What was changed by whom, the newest first."""
    entries = list(islice(session.client.audit(session.model(model)), number))
    rows = ((when(e.time), e.actor, e.action, short(e.resource)) for e in entries)
    session.output.show(entries, session.output.table(("when", "who", "what", "to"), rows))


def _show_alias(session: Session, alias: Alias, how: str) -> None:
    session.output.show(alias, line(f"{short(alias.name)} {how} {short(alias.version)}"))


def _confirm(session: Session, question: str) -> None:
    if session.output.as_json or not typer.get_text_stream("stdin").isatty():
        raise UsageError(f"{question} Say --yes; nobody can be asked here")
    if not typer.confirm(question, err=True):
        raise typer.Exit(NO)
