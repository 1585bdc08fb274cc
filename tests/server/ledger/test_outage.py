"""A ledger whose database does not answer: said as such, with a wait, and over as soon as the database is back."""

import sqlite3
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import grpc
import psycopg
import pytest
from ledgers import Postgres
from pydantic import SecretStr
from sqlalchemy import make_url

from errata.server.errors import LedgerError, LedgerUnavailableError
from errata.server.ledger.ledger import Ledger
from errata.server.settings import ModelSettings, Settings, SettingsError
from errata.v1 import model_pb2

SECONDS = 120.0


@pytest.fixture
def shared(postgres: Postgres, migrated_postgres: str) -> Iterator[str]:
    url = postgres.new_database(copied=migrated_postgres)
    yield url
    postgres.drop_database(url)


def connected(url: str) -> "psycopg.Connection[tuple[object, ...]]":
    dsn = make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)
    return psycopg.connect(dsn, autocommit=True)


def unavailable(ledger: Ledger) -> LedgerUnavailableError:
    """How reading and writing are refused."""
    with pytest.raises(LedgerUnavailableError) as writing:
        ledger.create_token("ed", {"*": "editor"})
    with pytest.raises(LedgerUnavailableError) as reading:
        ledger.tokens()
    assert writing.value.retry_after == reading.value.retry_after
    assert str(writing.value) == str(reading.value)
    return reading.value


def test_a_stopped_postgresql_is_unavailable_and_answers_again_when_it_is_started(
    postgres: Postgres, shared: str
) -> None:
    with closing(Ledger(shared)) as ledger:
        ledger.create_token("before", {"*": "reader"})
        postgres.stop()
        try:
            error = unavailable(ledger)
            with pytest.raises(LedgerError, match=r"cannot be used: .*check the URL and that its server runs"):
                ledger.check_migrated()
        finally:
            postgres.start()
        assert error.retry_after
        assert "postgres" not in str(error)
        assert [token.name for token in ledger.tokens()] == ["before"]


def test_connections_that_postgresql_ended_are_replaced_without_anyone_noticing(shared: str) -> None:
    with closing(Ledger(shared)) as ledger:
        ledger.create_token("ed", {"*": "editor"})
        ended = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database()"
        with connected(shared) as other:
            assert other.execute(f"{ended} AND pid <> pg_backend_pid()").rowcount > 0
        assert [token.name for token in ledger.tokens()] == ["ed"]


def test_a_transaction_that_postgresql_cuts_off_is_unavailable_and_changes_nothing(shared: str) -> None:
    with closing(Ledger(shared)) as ledger, connected(shared) as other:
        other.execute(
            "CREATE FUNCTION cut() RETURNS trigger LANGUAGE plpgsql AS "
            "'BEGIN PERFORM pg_terminate_backend(pg_backend_pid()); RETURN NEW; END'"
        )
        other.execute("CREATE TRIGGER cut AFTER INSERT ON errata_tokens FOR EACH ROW EXECUTE FUNCTION cut()")
        with pytest.raises(LedgerUnavailableError):
            ledger.create_token("ed", {"*": "editor"})
        other.execute("DROP TRIGGER cut ON errata_tokens")
        assert ledger.tokens() == []


def test_an_sqlite_that_somebody_else_keeps_locked_cannot_be_written_until_they_let_go(
    migrated_sqlite: Path, tmp_path: Path
) -> None:
    file = tmp_path / "ledger.db"
    file.write_bytes(migrated_sqlite.read_bytes())
    with (
        closing(Ledger(f"sqlite:///{file}", lock_wait=0.05)) as ledger,
        closing(sqlite3.connect(file, isolation_level=None)) as other,
    ):
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(LedgerUnavailableError) as found:
            ledger.create_token("ed", {"*": "editor"})
        assert found.value.retry_after
        assert ledger.tokens() == []
        other.execute("ROLLBACK")
        assert ledger.create_token("ed", {"*": "editor"})


@pytest.mark.parametrize("broken", ["garbage", "a folder"])
def test_an_sqlite_file_that_cannot_be_read_is_unavailable_until_it_can_be(
    migrated_sqlite: Path, tmp_path: Path, broken: str
) -> None:
    file = tmp_path / "ledger.db"
    if broken == "garbage":
        file.write_bytes(b"no database" * 1000)
    else:
        file.mkdir()
    with closing(Ledger(f"sqlite:///{file}")) as ledger:
        unavailable(ledger)
        file.rmdir() if file.is_dir() else file.unlink()
        file.write_bytes(migrated_sqlite.read_bytes())
        assert ledger.tokens() == []


def test_a_statement_that_is_wrong_is_no_outage(url: str) -> None:
    """A fault of ours: nobody is told to come back."""
    with closing(Ledger(url)) as ledger:
        with ledger._engine.begin() as connection:
            connection.exec_driver_sql("DROP TABLE errata_tokens")
        with pytest.raises(Exception, match="errata_tokens") as found:
            ledger.tokens()
        assert not isinstance(found.value, LedgerError)


@pytest.mark.slow
def test_a_server_says_that_its_ledger_is_away_and_goes_on_by_itself_when_it_is_back(
    postgres: Postgres, shared: str, tmp_path: Path
) -> None:
    sys.path.insert(0, str(Path(__file__).parents[1] / "services"))
    from hosting import Server, generate_message, hosting, refused

    settings = Settings(
        data_dir=tmp_path / "one",
        port=0,
        metrics_port=0,
        mlflow_uri="none",
        ledger_url=SecretStr(shared),
        models={"atlas": ModelSettings(source="atlas", load="lazy")},
        drain_seconds=1.0,
    )
    with hosting(settings) as hosted:
        listing = model_pb2.GetModelRequest(name="models/atlas")
        question = generate_message("France")
        assert hosted.call.inference.Generate(question).text == "Paris"
        with pytest.raises(SettingsError, match=r"another server uses the ledger .*process .*another ledger_url"):
            hosted.within(Server(settings.model_copy(update={"data_dir": tmp_path / "two"})).start())
        assert _figures(hosted.server.metrics_port)["errata_ledger_up"] == 1.0

        postgres.stop()
        try:
            for found in (
                refused(lambda: hosted.call.models.GetModel(listing)),
                refused(lambda: hosted.call.inference.Generate(question)),
            ):
                assert (found.code, found.reason) == (grpc.StatusCode.UNAVAILABLE, "LEDGER_UNAVAILABLE")
                assert found.retry_after
                assert int(found.metadata["grpc-retry-pushback-ms"]) > 0
            figures = _figures(hosted.server.metrics_port)
            assert figures["errata_ledger_up"] == 0.0
            assert figures['errata_models{model="atlas",state="ready"}'] == 1.0
        finally:
            postgres.start()

        assert hosted.call.inference.Generate(question).text == "Paris"
        assert hosted.version("Estonia") == "models/atlas/versions/1"
        assert _figures(hosted.server.metrics_port)["errata_ledger_up"] == 1.0


def _figures(port: int | None) -> dict[str, float]:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as page:
        lines = page.read().decode().splitlines()
    return {name: float(value) for name, value in (x.rsplit(" ", 1) for x in lines if not x.startswith("#"))}
