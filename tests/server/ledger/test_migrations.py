import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from alembic import command
from sqlalchemy import inspect, text

from errata.server.errors import LedgerError, NotMigratedError
from errata.server.ledger import migrate
from errata.server.ledger.database import database_url, open_engine
from errata.server.ledger.ledger import Ledger
from errata.server.ledger.migrate import configuration
from errata.server.ledger.tables import VERSION_TABLE, Base

Opened = Callable[[], Ledger]


@pytest.fixture
def url(empty: str) -> str:
    return empty


def tables(url: str) -> set[str]:
    engine = open_engine(database_url(url))
    found = set(inspect(engine).get_table_names())
    engine.dispose()
    return found


def run(url: str, statement: str) -> None:
    engine = open_engine(database_url(url))
    with engine.begin() as connection:
        connection.execute(text(statement))
    engine.dispose()


def test_migrations_go_up_down_and_up_again(url: str) -> None:
    config = configuration(database_url(url))
    command.upgrade(config, "head")
    assert tables(url) == {*Base.metadata.tables, VERSION_TABLE}
    command.downgrade(config, "base")
    assert tables(url) == {VERSION_TABLE}
    command.upgrade(config, "head")
    assert tables(url) == {*Base.metadata.tables, VERSION_TABLE}


def test_the_migrations_make_the_tables_that_the_code_expects(url: str) -> None:
    config = configuration(database_url(url))
    command.upgrade(config, "head")
    command.check(config)


def test_a_column_that_no_migration_makes_is_noticed(url: str) -> None:
    config = configuration(database_url(url))
    command.upgrade(config, "head")
    run(url, "ALTER TABLE errata_models DROP COLUMN architecture")
    with pytest.raises(Exception, match=r"add_column.*architecture"):
        command.check(config)


def test_a_database_can_be_shared_with_tables_that_are_not_ours(url: str) -> None:
    run(url, "CREATE TABLE jobs (id INTEGER)")
    run(url, "CREATE TABLE alembic_version (version_num VARCHAR(32))")
    config = configuration(database_url(url))
    command.upgrade(config, "head")
    command.check(config)
    command.downgrade(config, "base")
    assert tables(url) == {"jobs", "alembic_version", VERSION_TABLE}


def test_a_migration_that_fails_leaves_nothing_behind(url: str) -> None:
    run(url, "CREATE TABLE errata_tokens (name TEXT)")
    with pytest.raises(Exception, match="errata_tokens"):
        command.upgrade(configuration(database_url(url)), "head")
    assert tables(url) == {"errata_tokens"}


def test_migrating_twice_changes_nothing(opened: Opened) -> None:
    ledger = opened()
    ledger.migrate()
    ledger.ensure_model("atlas")
    ledger.migrate()
    ledger.check_migrated()
    assert [model.name for model in ledger.models(None, 10)] == ["atlas"]


def test_an_unmigrated_ledger_is_refused_with_the_command_that_migrates_it(opened: Opened) -> None:
    ledger = opened()
    with pytest.raises(NotMigratedError, match="revision none") as refused:
        ledger.check_migrated()
    said = str(refused.value).rpartition("run: python ")[2]
    # Typed into a shell as it stands.
    shell = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run(f"{sys.executable} {said}", shell=True, check=True, capture_output=True, env=shell)
    ledger.check_migrated()


def test_a_ledger_of_a_later_release_is_refused(url: str, opened: Opened) -> None:
    ledger = opened()
    ledger.migrate()
    run(url, f"UPDATE {VERSION_TABLE} SET version_num = '9999'")
    with pytest.raises(NotMigratedError, match="revision 9999"):
        ledger.check_migrated()


def test_no_error_shows_the_password() -> None:
    ledger = Ledger("postgresql://ada:geheim@/none?host=/nowhere")
    with pytest.raises(LedgerError, match=r"ada:\*\*\*@") as refused:
        ledger.check_migrated()
    assert "geheim" not in str(refused.value)
    ledger.close()


def test_a_folder_that_does_not_exist_is_named(tmp_path: Path) -> None:
    ledger = Ledger(f"sqlite:///{tmp_path}/no/ledger.db")
    with pytest.raises(LedgerError, match=r"no/ledger\.db cannot be used"):
        ledger.migrate()
    ledger.close()


@pytest.mark.parametrize("url", ["sqlite://", "sqlite:///:memory:", "mysql://host/name", "no url"])
def test_a_ledger_that_could_not_keep_its_promises_is_refused(url: str) -> None:
    with pytest.raises(LedgerError):
        Ledger(url)


def test_the_command_line_asks_for_a_ledger(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("ERRATA_LEDGER_URL", raising=False)
    with pytest.raises(SystemExit):
        migrate.main(["upgrade", "head"])
    assert "ERRATA_LEDGER_URL" in capsys.readouterr().err


def test_the_command_line_takes_the_ledger_from_the_environment(
    url: str, opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ERRATA_LEDGER_URL", url)
    migrate.main(["upgrade", "head"])
    opened().check_migrated()


def test_sqlite_keeps_a_log_ahead_of_its_writes_and_enforces_foreign_keys(tmp_path: Path) -> None:
    engine = open_engine(database_url(f"sqlite:///{tmp_path}/ledger.db"))
    with engine.connect() as connection:
        pragmas = {
            name: connection.exec_driver_sql(f"PRAGMA {name}").scalar() for name in ("journal_mode", "foreign_keys")
        }
    engine.dispose()
    assert pragmas == {"journal_mode": "wal", "foreign_keys": 1}
