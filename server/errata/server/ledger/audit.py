"""The record of who changed what, when. Written in the same transaction as the change itself."""

import json
from collections.abc import Mapping
from datetime import datetime

from sqlalchemy import select
from sqlalchemy.orm import Session

from errata.server.ledger.database import Database
from errata.server.ledger.rows import AuditRow
from errata.server.ledger.tables import AuditEntry


def write_down(
    session: Session,
    time: datetime,
    *,
    actor: str,
    action: str,
    model: str,
    resource: str,
    details: Mapping[str, object] | None = None,
) -> None:
    """Adds an entry to the session's transaction."""
    session.add(
        AuditEntry(
            time=time,
            actor=actor,
            action=action,
            model=model,
            resource=resource,
            details=json.dumps(dict(details or {})),
        )
    )


class AuditLedger(Database):
    """The audit."""

    def record(self, actor: str, action: str, model: str, resource: str, details: Mapping[str, object]) -> None:
        """Adds an entry for a change that is not the ledger's own. `model` is "" for the whole service."""
        with self._write.begin() as session:
            write_down(
                session, self._now(), actor=actor, action=action, model=model, resource=resource, details=details
            )

    def audit(self, model: str, before: int | None, limit: int) -> list[AuditRow]:
        """A model's entries, the newest first, from those older than the id `before`; model "": the service's own."""
        query = select(AuditEntry).where(AuditEntry.model == model).order_by(AuditEntry.id.desc()).limit(limit)
        if before is not None:
            query = query.where(AuditEntry.id < before)
        with self._read() as session:
            return [_row(entry) for entry in session.scalars(query)]


def _row(entry: AuditEntry) -> AuditRow:
    return AuditRow(
        id=entry.id,
        time=entry.time,
        actor=entry.actor,
        action=entry.action,
        model=entry.model,
        resource=entry.resource,
        details=entry.details,
    )
