"""Aliases, and how they move.

An alias's promotions are a stack: `promote` puts one on, `rollback` takes the newest off and points the alias to what
it named before that one. So two rollbacks in a row go two steps back, and a promotion after a rollback starts anew
from where the alias was rolled back to. Each of them is a change: the etag changes, and the audit says who and why.
"""

from collections.abc import Mapping
from datetime import datetime

from sqlalchemy import select
from sqlalchemy.orm import Session

from errata.server.errors import EtagMismatchError, NothingToRollBackError, RejectedVersionError
from errata.server.ledger.audit import write_down
from errata.server.ledger.database import Database
from errata.server.ledger.models import known_model
from errata.server.ledger.outbox import enqueue
from errata.server.ledger.rows import AliasRow, PublishState, TaskKind
from errata.server.ledger.tables import Alias, AliasChange, Version
from errata.server.ledger.versions import known_alias, live_version
from errata.server.names import CHAMPION, alias_name


class AliasLedger(Database):
    """Aliases. An etag that is None or empty guards nothing."""

    def promote(
        self,
        model: str,
        number: int,
        alias: str,
        *,
        etag: str | None,
        override_reason: str | None,
        actor: str,
        publish: bool,
        validate_only: bool = False,
    ) -> AliasRow:
        """Points the alias to the version, and makes it if there is none yet.

        An alias that names the version already stays as it is, whatever the etag, so that a call can be repeated.
        `validate_only` checks and changes nothing; the etag returned is then the present one, empty for a new alias.

        Raises:
            NotFoundError: no such model or version.
            EtagMismatchError: the alias is not where the caller saw it.
            RejectedVersionError: the version is below a guardrail and there is no `override_reason`.
        """
        with self._write.begin() as session:
            known_model(session, model, lock=True)
            version = live_version(session, model, number)
            held = session.get(Alias, (model, alias))
            if held is not None and held.version == number:
                return _row(held)
            _check_etag(model, alias, held, etag)
            _check_guardrails(version, override_reason)
            if validate_only:
                return AliasRow(model=model, alias=alias, version=number, etag=_etag(held) if held else "")
            held = point(session, self._now(), version, alias, actor=actor, publish=publish, reason=override_reason)
            return _row(held)

    def rollback(self, model: str, alias: str, *, etag: str | None, actor: str, publish: bool) -> AliasRow:
        """Points the alias to the version that it named before its last promotion that still stands.

        `champion` named the base before its first one. Versions deleted since are passed over.

        Raises:
            NotFoundError: no such model or alias.
            EtagMismatchError: the alias is not where the caller saw it.
            NothingToRollBackError: it names the first version it ever named, or all before were deleted.
        """
        with self._write.begin() as session:
            known_model(session, model, lock=True)
            held = known_alias(session, model, alias)
            _check_etag(model, alias, held, etag)
            left = held.version
            version = _take_back(session, held)
            _moved(session, held, version, alias)
            details = {"version": version.number, "previous": left}
            now = self._now()
            _tell(session, now, held, version, actor=actor, action="alias.rollback", details=details, publish=publish)
            return _row(held)

    def alias(self, model: str, alias: str) -> AliasRow:
        """One alias. Raises NotFoundError, also for a `champion` that was never set."""
        with self._read() as session:
            return _row(known_alias(session, model, alias))

    def aliases(self, model: str) -> list[AliasRow]:
        """All aliases of the model, by name. Raises NotFoundError."""
        query = select(Alias).where(Alias.model == model).order_by(Alias.alias)
        with self._read() as session:
            known_model(session, model)
            return [_row(alias) for alias in session.scalars(query)]


def point(
    session: Session,
    now: datetime,
    version: Version,
    alias: str,
    *,
    actor: str,
    publish: bool,
    reason: str | None = None,
) -> Alias:
    """Points the alias to the version, within the caller's transaction. `reason` says why a rejected one has it."""
    held = session.get(Alias, (version.model, alias))
    previous = _previous(alias, held)
    held = _moved(session, held, version, alias)
    session.add(_change(held, previous, now))
    details: dict[str, object] = {"version": version.number, "previous": previous}
    if version.rejections:
        details |= {"reason": reason, "rejections": version.rejections}
    action = "alias.promote.override" if version.rejections else "alias.promote"
    _tell(session, now, held, version, actor=actor, action=action, details=details, publish=publish)
    return held


def _tell(
    session: Session,
    now: datetime,
    held: Alias,
    version: Version,
    *,
    actor: str,
    action: str,
    details: Mapping[str, object],
    publish: bool,
) -> None:
    resource = alias_name(held.model, held.alias)
    write_down(session, now, actor=actor, action=action, model=held.model, resource=resource, details=details)
    if publish:
        in_mlflow = 0 if version.publish_state is PublishState.NONE else version.number
        enqueue(session, now, TaskKind.SET_ALIAS, held.model, in_mlflow, {"alias": held.alias})


def _check_etag(model: str, alias: str, held: Alias | None, etag: str | None) -> None:
    if etag and (held is None or etag != _etag(held)):
        now = f"names version {held.version}" if held else "does not exist"
        raise EtagMismatchError(
            f'the alias "{alias}" of model "{model}" has moved since: it {now}; look at it again and decide anew',
            field="etag",
        )


def _check_guardrails(version: Version, override_reason: str | None) -> None:
    if version.rejections and not override_reason:
        raise RejectedVersionError(
            f'version {version.number} of model "{version.model}" is below its guardrails '
            f"({'; '.join(version.rejections)}); promote it with an override and its reason, or make a better edit",
            field="version",
        )


def _previous(alias: str, held: Alias | None) -> int | None:
    if held is not None:
        return held.version
    return 0 if alias == CHAMPION else None


def _moved(session: Session, held: Alias | None, version: Version, alias: str) -> Alias:
    if held is None:
        held = Alias(model=version.model, alias=alias, version=version.number, revision=0)
        session.add(held)
    held.version = version.number
    held.revision += 1
    session.flush()
    return held


def _change(held: Alias, previous: int | None, time: datetime) -> AliasChange:
    return AliasChange(
        model=held.model, alias=held.alias, previous=previous, version=held.version, taken_back=False, time=time
    )


def _take_back(session: Session, held: Alias) -> Version:
    """The newest version below on the stack that is still there; everything above it comes off."""
    query = (
        select(AliasChange)
        .where(AliasChange.model == held.model, AliasChange.alias == held.alias, ~AliasChange.taken_back)
        .order_by(AliasChange.id.desc())
    )
    for change in session.scalars(query):
        change.taken_back = True
        if change.previous is None or change.previous == held.version:
            continue
        version = session.get_one(Version, (held.model, change.previous))
        if version.delete_time is None:
            return version
    raise NothingToRollBackError(
        f'the alias "{held.alias}" of model "{held.model}" never named another version that still exists; '
        "promote the one it should name"
    )


def _etag(alias: Alias) -> str:
    return f"{alias.revision}-{alias.version}"


def _row(alias: Alias) -> AliasRow:
    return AliasRow(model=alias.model, alias=alias.alias, version=alias.version, etag=_etag(alias))
