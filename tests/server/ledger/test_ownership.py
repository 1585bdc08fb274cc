"""One server on a ledger or a data folder: the second is told who the first is, and commands come and go beside it."""

import logging
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import psycopg
import pytest
from ledgers import Postgres
from sqlalchemy import make_url

from errata.server.errors import LedgerError
from errata.server.ledger.database import database_url
from errata.server.ledger.ledger import Ledger
from errata.server.ledger.ownership import held_folder, held_ledger
from errata.server.settings import SettingsError

WAIT = 60.0
SOON = 0.05
"""Seconds: how often the lock is looked after here."""

_HOLDS = """
import sys
from errata.server.ledger.ledger import Ledger

with Ledger(sys.argv[1]).held(lost=print):
    print("held", flush=True)
    sys.stdin.read()
"""


def never() -> None:
    raise AssertionError("the ledger was not lost")


def refused(holding: AbstractContextManager[None]) -> str:
    """What a second holder is told."""
    with pytest.raises(SettingsError) as found, holding:
        pass
    return str(found.value)


def test_a_second_holder_is_told_who_the_first_is_and_comes_in_once_that_has_ended(url: str) -> None:
    parsed = database_url(url)
    with held_ledger(parsed, never):
        said = refused(held_ledger(parsed, never, patience=SOON))
        assert f"process {os.getpid()} on " in said
        assert re.fullmatch(
            r"another server uses the ledger .*, since 20.*; stop it, or set (another )?ledger_url", said
        )
    with held_ledger(parsed, never, patience=SOON):
        pass


def test_a_killed_holder_is_out_at_once(url: str) -> None:
    paths = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(
        [sys.executable, "-c", _HOLDS, url], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=paths
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        assert f"process {process.pid} " in refused(held_ledger(database_url(url), never, patience=SOON))
        process.send_signal(signal.SIGKILL)
        process.wait(WAIT)
        with held_ledger(database_url(url), never):
            pass


def test_migrations_and_tokens_come_and_go_beside_a_server(url: str) -> None:
    server, command = Ledger(url), Ledger(url)
    with server.held(never):
        command.migrate()
        command.check_migrated()
        secret = command.create_token("ed", {"*": "editor"})
        assert server.caller(secret) is not None
        command.revoke_token("ed")
    server.close()
    command.close()


def test_two_ledgers_of_one_database_server_do_not_shut_each_other_out(postgres: Postgres) -> None:
    one, other = postgres.new_database(), postgres.new_database()
    with held_ledger(database_url(one), never), held_ledger(database_url(other), never, patience=SOON):
        pass
    for url in (one, other):
        postgres.drop_database(url)


def test_a_data_folder_is_held_by_one_process_that_it_names(tmp_path: Path) -> None:
    for _ in range(2):
        with held_folder(tmp_path / "data"):
            said = refused(held_folder(tmp_path / "data"))
            assert f"another server uses the data folder '{tmp_path}/data': process {os.getpid()} on " in said
            assert "another data_dir" in said


def test_a_ledger_in_a_folder_that_is_not_there_cannot_be_held(tmp_path: Path) -> None:
    url = database_url(f"sqlite:///{tmp_path}/nowhere/ledger.sqlite")
    with pytest.raises(LedgerError, match="No such file or directory; check"), held_ledger(url, never):
        pass


@contextmanager
def heard(wanted: str) -> Iterator[threading.Event]:
    """Set once the log says so."""
    event = threading.Event()

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if wanted in record.getMessage():
                event.set()

    logger, listener = logging.getLogger("errata.server.ledger.ownership"), Listener()
    level = logger.level
    logger.addHandler(listener)
    logger.setLevel(logging.INFO)
    yield event
    logger.removeHandler(listener)
    logger.setLevel(level)


@pytest.fixture
def shared(postgres: Postgres) -> Iterator[str]:
    url = postgres.new_database()
    yield url
    postgres.drop_database(url)


def locks(url: str, condition: str) -> int:
    """Ends the sessions that hold the lock, or counts those that wait for it."""
    dsn = make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)
    what = "pg_terminate_backend(pid)" if condition == "granted" else "pid"
    chosen = f"pg_locks JOIN pg_database d ON d.oid = database WHERE locktype = 'advisory' AND {condition}"
    with psycopg.connect(dsn, autocommit=True) as connection:
        return connection.execute(f"SELECT {what} FROM {chosen} AND datname = current_database()").rowcount


def test_a_lock_that_ended_with_its_connection_is_taken_again(shared: str) -> None:
    with held_ledger(database_url(shared), never, beat=SOON):
        with heard("held again") as again:
            assert locks(shared, "granted") == 1
            assert again.wait(WAIT)
        assert refused(held_ledger(database_url(shared), never, patience=SOON))


def test_a_server_whose_ledger_another_one_took_meanwhile_is_told_so(shared: str) -> None:
    taken, lost, leave = threading.Event(), threading.Event(), threading.Event()

    def hold_next() -> None:
        with held_ledger(database_url(shared), never, patience=WAIT):
            taken.set()
            leave.wait(WAIT)

    with held_ledger(database_url(shared), lost.set, patience=SOON, beat=SOON):
        second = threading.Thread(target=hold_next)
        second.start()
        while not locks(shared, "NOT granted"):
            pass  # PostgreSQL alone knows when the second one is next
        locks(shared, "granted")
        assert taken.wait(WAIT)
        assert lost.wait(WAIT)
        leave.set()
        second.join(WAIT)
