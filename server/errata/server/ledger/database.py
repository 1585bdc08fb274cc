"""One database, SQLite or PostgreSQL, and the two kinds of transaction on it.

SQLite: WAL, foreign keys on, and a writing transaction takes the write lock at its BEGIN, so that what it reads is
still true when it writes. PostgreSQL: READ COMMITTED, and whoever must not be overtaken locks the row it decides by;
the order is always model, then job. Knows no table.
"""

from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import URL, Connection, Engine, create_engine, event, make_url
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.exc import ArgumentError
from sqlalchemy.orm import sessionmaker
from sqlalchemy.pool import ConnectionPoolEntry

from errata.server.errors import LedgerError

_LOCK_WAIT_MS = 30_000
_WRITES = "errata_writes"


def now_utc() -> datetime:
    """The wall clock, aware."""
    return datetime.now(UTC)


def database_url(url: str) -> URL:
    """`url` with the driver that Errata brings. Raises LedgerError for another database or an SQLite in memory."""
    try:
        parsed = make_url(url)
    except ArgumentError:
        raise LedgerError(
            "the ledger's URL cannot be read; it looks like sqlite:///path or postgresql+psycopg://user@host/name"
        ) from None
    if parsed.drivername == "postgresql":
        parsed = parsed.set(drivername="postgresql+psycopg")
    if parsed.drivername not in ("sqlite", "postgresql+psycopg"):
        raise LedgerError(f"the ledger cannot use {parsed.drivername}; give sqlite:///path or postgresql+psycopg://…")
    if parsed.drivername == "sqlite" and parsed.database in (None, "", ":memory:"):
        raise LedgerError("an SQLite ledger in memory would be lost at exit; give it a file: sqlite:///path")
    return parsed


def open_engine(url: URL, *, foreign_keys: bool = True) -> Engine:
    """An engine that connects on first use. `foreign_keys` False is for migrations that rebuild SQLite's tables."""
    if url.get_backend_name() != "sqlite":
        return create_engine(url, pool_pre_ping=True)
    # A pool of 15 at most would make the server's threads wait for connections rather than for the lock.
    engine = create_engine(url, max_overflow=-1)
    _set_up_sqlite(engine, foreign_keys)
    return engine


def writing(engine: Engine) -> Engine:
    """The same engine and pool; its transactions on SQLite take the write lock at once."""
    return engine.execution_options(**{_WRITES: True})


def _set_up_sqlite(engine: Engine, foreign_keys: bool) -> None:
    def connected(connection: DBAPIConnection, _: ConnectionPoolEntry) -> None:
        # The driver would begin transactions by itself, later and without the lock.
        connection.isolation_level = None
        cursor = connection.cursor()
        cursor.execute(f"PRAGMA busy_timeout = {_LOCK_WAIT_MS}")
        cursor.execute("PRAGMA journal_mode = WAL")
        cursor.execute(f"PRAGMA foreign_keys = {'ON' if foreign_keys else 'OFF'}")
        cursor.close()

    def begins(connection: Connection) -> None:
        options: dict[str, Any] = dict(connection.get_execution_options())
        connection.exec_driver_sql("BEGIN IMMEDIATE" if options.get(_WRITES) else "BEGIN")

    event.listen(engine, "connect", connected)
    event.listen(engine, "begin", begins)


class Database:
    """What every part of the ledger works with; safe from any thread, as each call has its own session.

    `_read()` is a session to look, `_write.begin()` a session that commits at the end or changes nothing.
    """

    def __init__(self, url: str, clock: Callable[[], datetime] = now_utc) -> None:
        self._url = database_url(url)
        self._now = clock
        self._engine = open_engine(self._url)
        self._read = sessionmaker(self._engine)
        self._write = sessionmaker(writing(self._engine), expire_on_commit=False)

    def close(self) -> None:
        """Closes its connections."""
        self._engine.dispose()
