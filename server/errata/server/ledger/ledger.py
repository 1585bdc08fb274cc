"""The ledger as the rest of the server sees it: what was asked, done, promoted and by whom.

Synchronous and thread-safe; each call is one transaction, and what it returns is frozen. Page cursors are plain keys:
whoever hands them out signs them. Knows nothing of gRPC, MLflow or what the stored protos say, but for the
versions that summaries name.
"""

from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager

from alembic import command
from sqlalchemy import func, select

from errata.server.errors import LedgerError, LedgerUnavailableError
from errata.server.ledger.aliases import AliasLedger
from errata.server.ledger.audit import AuditLedger
from errata.server.ledger.edits import EditLedger
from errata.server.ledger.jobs import JobLedger
from errata.server.ledger.migrate import check_revision, configuration
from errata.server.ledger.models import ModelLedger
from errata.server.ledger.outbox import OutboxLedger
from errata.server.ledger.ownership import held_ledger
from errata.server.ledger.rows import JobKind, JobState
from errata.server.ledger.tables import Job
from errata.server.ledger.tokens import TokenLedger
from errata.server.ledger.versions import VersionLedger


class Ledger(ModelLedger, JobLedger, EditLedger, VersionLedger, AliasLedger, OutboxLedger, AuditLedger, TokenLedger):
    """All of it, on one database: `sqlite:///path` or `postgresql+psycopg://user@host/name`."""

    def migrate(self) -> None:
        """Brings the schema up to this release's. Raises LedgerError if the database cannot be used."""
        try:
            command.upgrade(configuration(self._url), "head")
        except LedgerUnavailableError as error:
            raise self._unusable(error) from error

    def check_migrated(self) -> None:
        """Raises NotMigratedError with the command to run, or LedgerError if the database cannot be used."""
        try:
            check_revision(self._engine)
        except LedgerUnavailableError as error:
            raise self._unusable(error) from error

    def held(self, lost: Callable[[], None]) -> AbstractContextManager[None]:
        """Holds the ledger for this process alone; see `ownership`. Raises SettingsError where another one does."""
        return held_ledger(self._url, lost)

    def open_jobs(self) -> Counter[tuple[str, JobKind, JobState]]:
        """How many jobs are PENDING and RUNNING, by model and kind."""
        which = Job.model, Job.kind, Job.state
        query = select(*which, func.count()).where(Job.state.in_([JobState.PENDING, JobState.RUNNING])).group_by(*which)
        with self._read() as session:
            return Counter({(model, kind, state): count for model, kind, state, count in session.execute(query)})

    def _unusable(self, error: LedgerUnavailableError) -> LedgerError:
        shown = self._url.render_as_string(hide_password=True)
        why = " ".join(str(error.__cause__).split())
        return LedgerError(f"the ledger {shown} cannot be used: {why}; check the URL and that its server runs")
