"""One database, SQLite or PostgreSQL, and the two kinds of transaction on it.

SQLite: WAL, foreign keys on, and a writing transaction takes the write lock at its BEGIN, so that what it reads is
still true when it writes. PostgreSQL: READ COMMITTED, and whoever must not be overtaken locks the row it decides by;
the order is always model, then job. Knows no table.

A database that does not answer is a LedgerUnavailableError wherever it is met; every call tries it anew.
"""

import logging
import sqlite3
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import URL, Connection, Engine, ExceptionContext, create_engine, event, make_url
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.exc import ArgumentError, TimeoutError
from sqlalchemy.orm import sessionmaker
from sqlalchemy.pool import ConnectionPoolEntry, PoolProxiedConnection, QueuePool

from errata.server.errors import LedgerError, LedgerUnavailableError

_log = logging.getLogger(__name__)

LOCK_WAIT = 30.0
"""Seconds to wait for SQLite's write lock."""

_WRITES = "errata_writes"

_RETRY_AFTER = 1.0
"""Seconds after which a caller may ask a ledger again that did not answer."""

_POSTGRESQL = {"connect_timeout": "10", "tcp_user_timeout": "30000"}
"""libpq's own would wait for minutes for a machine that is gone. Seconds and milliseconds."""

_SQLITE_STATE = frozenset(
    {
        sqlite3.SQLITE_AUTH,
        sqlite3.SQLITE_BUSY,
        sqlite3.SQLITE_CANTOPEN,
        sqlite3.SQLITE_CORRUPT,
        sqlite3.SQLITE_FULL,
        sqlite3.SQLITE_IOERR,
        sqlite3.SQLITE_LOCKED,
        sqlite3.SQLITE_NOTADB,
        sqlite3.SQLITE_PERM,
        sqlite3.SQLITE_PROTOCOL,
        sqlite3.SQLITE_READONLY,
    }
)
"""SQLite's codes for the state of its file; the others speak of a statement."""


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


def impatient(url: URL) -> URL:
    """The URL of a PostgreSQL with time limits for connecting and sending, where it names none."""
    return url.update_query_dict({k: v for k, v in _POSTGRESQL.items() if k not in url.query})


def open_engine(url: URL, *, foreign_keys: bool = True, lock_wait: float = LOCK_WAIT) -> Engine:
    """An engine that connects on first use, and raises LedgerUnavailableError where the database does not answer.

    `foreign_keys` False is for migrations that rebuild SQLite's tables. `lock_wait` is in seconds, for SQLite.
    """
    if url.get_backend_name() == "sqlite":
        # A pool of 15 at most would make the server's threads wait for connections rather than for the lock.
        engine = create_engine(url, poolclass=_Pool, max_overflow=-1)
        _set_up_sqlite(engine, foreign_keys, lock_wait)
    else:
        url = impatient(url)
        engine = create_engine(url, poolclass=_Pool, pool_pre_ping=True)
    event.listen(engine, "handle_error", _translated, retval=True)
    return engine


def writing(engine: Engine) -> Engine:
    """The same engine and pool; its transactions on SQLite take the write lock at once."""
    return engine.execution_options(**{_WRITES: True})


class _Pool(QueuePool):
    def connect(self) -> PoolProxiedConnection:
        try:
            return super().connect()
        except TimeoutError as error:  # all connections are at work: on a database that hangs, most likely
            raise _unavailable(error) from error


def _translated(context: ExceptionContext) -> BaseException | None:
    """What is raised in place of a driver's error; None: what SQLAlchemy makes of it."""
    if context.is_pre_ping:  # the pool itself finds that out, and connects anew
        return None
    error = context.original_exception
    return _unavailable(error) if context.is_disconnect or _tells_of_state(error, context.dialect.dbapi) else None


def _tells_of_state(error: BaseException, driver: Any) -> bool:
    """Whether an error is about the database's state, not about what it was asked."""
    if isinstance(error, sqlite3.Error):
        # The lower byte; the rest of an extended code says more.
        return getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF in _SQLITE_STATE
    # PostgreSQL's driver has everything in these classes that another try may not meet: connections, locks, memory.
    return isinstance(error, (driver.OperationalError, driver.InterfaceError))


def _unavailable(error: BaseException) -> LedgerUnavailableError:
    _log.error("the ledger's database does not answer: %s", _line(error))
    return LedgerUnavailableError(
        "the server's ledger does not answer at the moment; ask again in a moment",
        retry_after=_RETRY_AFTER,
    )


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _set_up_sqlite(engine: Engine, foreign_keys: bool, lock_wait: float) -> None:
    def connected(connection: DBAPIConnection, _: ConnectionPoolEntry) -> None:
        # The driver would begin transactions by itself, later and without the lock.
        connection.isolation_level = None
        cursor = connection.cursor()
        cursor.execute(f"PRAGMA busy_timeout = {round(1000 * lock_wait)}")
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

    def __init__(self, url: str, clock: Callable[[], datetime] = now_utc, *, lock_wait: float = LOCK_WAIT) -> None:
        self._url = database_url(url)
        self._now = clock
        self._engine = open_engine(self._url, lock_wait=lock_wait)
        self._read = sessionmaker(self._engine)
        self._write = sessionmaker(writing(self._engine), expire_on_commit=False)

    def close(self) -> None:
        """Closes its connections."""
        self._engine.dispose()
