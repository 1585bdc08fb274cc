"""The ledger of a server, as a replica sees it: looked at, never written, and owned by that server alone."""

from sqlalchemy import event
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.pool import ConnectionPoolEntry

from errata.server.errors import BaseChangedError, NotFoundError
from errata.server.ledger.ledger import Ledger

_READ_ONLY = {
    "sqlite": "PRAGMA query_only = ON",
    "postgresql": "SET SESSION CHARACTERISTICS AS TRANSACTION READ ONLY",
}


class LedgerReader(Ledger):
    """A ledger whose database refuses every write of this process. Raises LedgerError, NotMigratedError."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        statement = _READ_ONLY[self._url.get_backend_name()]

        def connected(connection: DBAPIConnection, _: ConnectionPoolEntry) -> None:
            cursor = connection.cursor()
            cursor.execute(statement)
            cursor.close()
            connection.commit()  # PostgreSQL would take the setting back with the transaction

        event.listen(self._engine, "connect", connected)
        self.check_migrated()

    def ensure_model(self, model: str) -> None:
        """Looks whether the server entered it. Raises NotFoundError."""
        try:
            self.model(model)
        except NotFoundError as error:
            said = f'the server has no model "{model}"; start it with these settings before its replicas'
            raise NotFoundError(said, reason=error.said_reason) from None

    def describe_model(self, model: str, *, base_sha256: str, architecture: str, layers: int) -> None:
        """Compares the checkpoint with the server's. Raises BaseChangedError."""
        known = self.model(model).base_sha256
        if known not in ("", base_sha256):
            raise BaseChangedError(
                f'the checkpoint of model "{model}" is {base_sha256} here and {known} at the server; give both the same'
            )
