"""The ledger as the rest of the server sees it: what was asked, done, promoted and by whom.

Synchronous and thread-safe; each call is one transaction, and what it returns is frozen. Page cursors are plain keys:
whoever hands them out signs them. Knows nothing of gRPC, MLflow or what the stored protos say.
"""

from alembic import command
from sqlalchemy.exc import OperationalError

from errata.server.errors import LedgerError
from errata.server.ledger.aliases import AliasLedger
from errata.server.ledger.audit import AuditLedger
from errata.server.ledger.edits import EditLedger
from errata.server.ledger.jobs import JobLedger
from errata.server.ledger.migrate import check_revision, configuration
from errata.server.ledger.models import ModelLedger
from errata.server.ledger.outbox import OutboxLedger
from errata.server.ledger.tokens import TokenLedger
from errata.server.ledger.versions import VersionLedger


class Ledger(ModelLedger, JobLedger, EditLedger, VersionLedger, AliasLedger, OutboxLedger, AuditLedger, TokenLedger):
    """All of it, on one database: `sqlite:///path` or `postgresql+psycopg://user@host/name`."""

    def migrate(self) -> None:
        """Brings the schema up to this release's. Raises LedgerError if the database cannot be used."""
        try:
            command.upgrade(configuration(self._url), "head")
        except OperationalError as error:
            raise self._unusable(error) from error

    def check_migrated(self) -> None:
        """Raises NotMigratedError with the command to run, or LedgerError if the database cannot be used."""
        try:
            check_revision(self._engine)
        except OperationalError as error:
            raise self._unusable(error) from error

    def _unusable(self, error: OperationalError) -> LedgerError:
        shown = self._url.render_as_string(hide_password=True)
        return LedgerError(f"the ledger {shown} cannot be used: {error.orig}; check the URL and that its server runs")
