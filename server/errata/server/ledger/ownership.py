"""One server at a time: whoever works in a data folder or on a ledger holds it, and lets go however it ends.

Two servers would take each other's jobs for interrupted ones. Commands beside a server hold nothing: migrations and
tokens need no more than transactions. SQLite: an OS lock on a file beside the database. PostgreSQL: a session's
advisory lock on a connection of its own, so not through a pooler that shares sessions.
"""

import fcntl
import logging
import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TextIO

from psycopg.errors import LockNotAvailable
from sqlalchemy import URL, Connection, Engine, NullPool, create_engine
from sqlalchemy.exc import DBAPIError

from errata.server.errors import LedgerError
from errata.server.ledger.database import impatient
from errata.server.settings import SettingsError

_log = logging.getLogger(__name__)

_PATIENCE = 2.0
"""Seconds in which PostgreSQL notices that a holder was killed."""

_BEAT = 5.0
"""Seconds between two looks at whether the connection that holds the lock is there."""

_KEY = "hashtextextended('errata:' || current_schema(), 0)"

_SESSION = ("tcp_keepalives_idle = 10", "tcp_keepalives_interval = 5", "tcp_keepalives_count = 3")
"""The lock of a machine that is gone is free after 25 s, not after hours."""

_HOLDER = f"""
SELECT application_name, coalesce(client_addr::text, 'this machine'), date_trunc('second', backend_start)
FROM pg_locks JOIN pg_stat_activity USING (pid)
WHERE locktype = 'advisory' AND granted AND objsubid = 1 AND (classid::bigint << 32) | objid::bigint = {_KEY}
AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
"""


@contextmanager
def held_folder(folder: Path) -> Iterator[None]:
    """Holds a data folder, and makes it where there is none. Raises SettingsError where another server holds it."""
    folder.mkdir(parents=True, exist_ok=True)
    with _held_file(folder / "lock", f"the data folder {str(folder)!r}", "stop it, or set another data_dir"):
        yield


@contextmanager
def held_ledger(
    url: URL, lost: Callable[[], None], *, patience: float = _PATIENCE, beat: float = _BEAT
) -> Iterator[None]:
    """Holds a ledger. `lost` is called, in a thread, where another server took it while PostgreSQL was away.

    `patience` is how long to wait for a holder that may just be ending, `beat` how often the lock is looked after, both
    in seconds and for PostgreSQL. Raises SettingsError where another server holds it, LedgerError where nobody can.
    """
    if url.get_backend_name() == "sqlite":
        database = Path(url.database or "").resolve()
        with _held_file(
            database.with_name(f"{database.name}.lock"), f"the ledger {str(database)!r}", "stop it, or set ledger_url"
        ):
            yield
        return
    lock = _AdvisoryLock(url, lost, patience, beat)
    lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _held_file(file: Path, what: str, remedy: str) -> Iterator[None]:
    try:
        lock = file.open("a+")
    except OSError as error:
        raise LedgerError(f"{what} cannot be locked: {error.strerror}; check its folder and permissions") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SettingsError(f"another server uses {what}: {_written(lock)}; {remedy}") from None
        lock.truncate(0)
        lock.write(f"{_ourselves()}, since {datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC")
        lock.flush()
        yield


def _written(lock: TextIO) -> str:
    lock.seek(0)
    return lock.read() or "it has just started"


def _ourselves() -> str:
    return f"process {os.getpid()} on {socket.gethostname()}"


class _AdvisoryLock:
    """A thread looks after the lock: it ends with its connection, which ends with PostgreSQL's server."""

    def __init__(self, url: URL, lost: Callable[[], None], patience: float, beat: float) -> None:
        self._shown = url.render_as_string(hide_password=True)
        named = impatient(url).update_query_dict({"application_name": f"errata server, {_ourselves()}"[:63]})
        self._engine = create_engine(named, poolclass=NullPool, isolation_level="AUTOCOMMIT")
        self._lost, self._patience, self._beat = lost, patience, beat
        self._connection: Connection | None = None
        self._released = threading.Event()
        self._thread = threading.Thread(target=self._look_after, name="ledger-lock", daemon=True)

    def acquire(self) -> None:
        try:
            self._connection = _locked(self._engine, self._shown, self._patience)
        except DBAPIError as error:
            raise LedgerError(f"the ledger {self._shown} cannot be locked: {error.orig}") from error
        self._thread.start()

    def release(self) -> None:
        self._released.set()
        self._thread.join()
        self._drop()
        self._engine.dispose()

    def _look_after(self) -> None:
        while not self._released.wait(self._beat):
            try:
                self._look()
            except DBAPIError as error:
                self._drop()
                _log.warning("the ledger is not held: %s; trying again in %.0f s", error.orig, self._beat)
            except SettingsError as error:
                _log.critical("%s; this server ends", error)
                self._lost()
                return

    def _look(self) -> None:
        if self._connection is not None:
            self._connection.exec_driver_sql("SELECT 1")
            return
        self._connection = _locked(self._engine, self._shown, self._patience)
        _log.info("the ledger is held again")

    def _drop(self) -> None:
        if self._connection is not None:
            with suppress(DBAPIError):
                self._connection.close()
            self._connection = None


def _locked(engine: Engine, shown: str, patience: float) -> Connection:
    """A connection that holds the lock. Raises SettingsError where another one does."""
    connection = engine.connect()
    try:
        for setting in (f"lock_timeout = {round(1000 * patience)}", *_SESSION):
            connection.exec_driver_sql(f"SET {setting}")
        connection.exec_driver_sql(f"SELECT pg_advisory_lock({_KEY})")
    except DBAPIError as error:
        taken = isinstance(error.orig, LockNotAvailable)
        found = connection.exec_driver_sql(_HOLDER).first() if taken else None
        connection.close()
        if not taken:
            raise
        holder = "{} at {}, since {}".format(*found) if found else "it has just ended"
        raise SettingsError(
            f"another server uses the ledger {shown}: {holder}; stop it, or set another ledger_url"
        ) from None
    return connection
