"""The versions, as they are asked for. What makes, moves and ends them stands in `edits` and `aliases`."""

from collections import defaultdict
from collections.abc import Sequence

from sqlalchemy import select
from sqlalchemy.orm import Session, aliased

from errata.server.errors import NotFoundError
from errata.server.ledger.database import Database
from errata.server.ledger.models import known_model
from errata.server.ledger.rows import JobKind, VersionRow
from errata.server.ledger.tables import Alias, Version
from errata.server.names import CHAMPION


def live_version(session: Session, model: str, number: int) -> Version:
    """A version that was not deleted. Raises NotFoundError (MODEL_NOT_FOUND, VERSION_NOT_FOUND)."""
    version = session.get(Version, (model, number))
    if version is None or version.delete_time is not None:
        known_model(session, model)
        raise NotFoundError(
            f'model "{model}" has no version {number}; ListVersions names those there are', reason="VERSION_NOT_FOUND"
        )
    return version


def known_alias(session: Session, model: str, alias: str) -> Alias:
    """An alias. Raises NotFoundError (MODEL_NOT_FOUND, ALIAS_NOT_FOUND)."""
    found = session.get(Alias, (model, alias))
    if found is None:
        known_model(session, model)
        raise NotFoundError(
            f'model "{model}" has no alias "{alias}"; GetModel names those there are', reason="ALIAS_NOT_FOUND"
        )
    return found


class VersionLedger(Database):
    """Versions. A deleted one is found by none of these."""

    def version(self, model: str, number: int) -> VersionRow:
        """One version. Raises NotFoundError."""
        with self._read() as session:
            return version_row(session, live_version(session, model, number))

    def versions(self, model: str, before: int | None, limit: int) -> list[VersionRow]:
        """The versions, the newest first and the base last, from those below the number `before`."""
        query = select(Version).where(Version.model == model, Version.delete_time.is_(None))
        if before is not None:
            query = query.where(Version.number < before)
        with self._read() as session:
            known_model(session, model)
            found = session.scalars(query.order_by(Version.number.desc()).limit(limit)).all()
            return version_rows(session, found)

    def resolve(self, model: str, number: int | None = None, alias: str | None = None) -> VersionRow:
        """The version that a number or an alias means; neither: the alias `champion`, unset: the base.

        Raises NotFoundError.
        """
        with self._read() as session:
            if number is None:
                number = _aliased(session, model, alias or CHAMPION)
            return version_row(session, live_version(session, model, number))

    def lineage(self, model: str, number: int) -> list[VersionRow]:
        """The version and its ancestors, itself first and the base last. Raises NotFoundError."""
        chain = select(Version.number, Version.parent).where(Version.model == model, Version.number == number)
        ancestors = chain.cte("ancestors", recursive=True)
        parent = aliased(Version)
        ancestors = ancestors.union(
            select(parent.number, parent.parent).where(parent.model == model, parent.number == ancestors.c.parent)
        )
        # A child's number is always above its parent's.
        query = select(Version).where(Version.model == model, Version.number.in_(select(ancestors.c.number)))
        with self._read() as session:
            live_version(session, model, number)
            return version_rows(session, session.scalars(query.order_by(Version.number.desc())).all())

    def holds_delta(self, sha256: str) -> bool:
        """Whether a version has this delta: equal edits share one, so its file must stay as long."""
        query = select(Version.number).where(Version.delta_sha256 == sha256, Version.delete_time.is_(None)).limit(1)
        with self._read() as session:
            return session.scalar(query) is not None


def version_row(session: Session, version: Version) -> VersionRow:
    """One version as it is handed out."""
    return version_rows(session, [version])[0]


def version_rows(session: Session, versions: Sequence[Version]) -> list[VersionRow]:
    """Versions as they are handed out, each with the aliases that point to it."""
    names: defaultdict[tuple[str, int], list[str]] = defaultdict(list)
    query = select(Alias).where(Alias.model.in_({v.model for v in versions})).order_by(Alias.alias)
    for alias in session.scalars(query):
        names[alias.model, alias.version].append(alias.alias)
    return [_row(version, tuple(names[version.model, version.number])) for version in versions]


def _aliased(session: Session, model: str, alias: str) -> int:
    if alias == CHAMPION and session.get(Alias, (model, alias)) is None:
        return 0
    return known_alias(session, model, alias).version


def _row(version: Version, aliases: tuple[str, ...]) -> VersionRow:
    return VersionRow(
        model=version.model,
        number=version.number,
        parent=version.parent,
        edit=version.edit,
        base_sha256=version.base_sha256,
        delta_sha256=version.delta_sha256,
        delta_bytes=version.delta_bytes,
        layers=tuple(version.layers),
        facts=tuple(version.facts),
        scores=version.scores,
        rejections=tuple(version.rejections),
        aliases=aliases,
        publish_state=version.publish_state,
        mlflow_version=version.mlflow_version,
        mlflow_run_id=version.mlflow_run_id,
        created_by=version.created_by,
        create_time=version.create_time,
        made_by=version.made_by or JobKind.EDIT,
    )
