"""The command line, but for serving itself, which tests/e2e does with a real process."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from errata.server.__main__ import cli, mlflow_command
from errata.server.app import mlflow_place
from errata.server.ledger.ledger import Ledger
from errata.server.settings import Settings


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ERRATA_DATA_DIR", str(tmp_path))
    monkeypatch.setenv("ERRATA_LEDGER_URL", "")
    monkeypatch.delenv("ERRATA_LEDGER_URL")
    return tmp_path


def run(*arguments: str) -> tuple[int, str]:
    found = CliRunner().invoke(cli, arguments)
    return found.exit_code, found.output


def test_a_token_is_shown_once_listed_by_its_name_and_revoked(data: Path) -> None:
    code, secret = run("tokens", "create", "ed", "--role", "editor", "--model", "atlas")
    assert (code, secret.startswith("errata_")) == (0, True)
    assert run("tokens", "list") == (0, "ed\tatlas=editor\tvalid\n")
    assert run("tokens", "revoke", "ed") == (0, "")
    assert run("tokens", "list") == (0, "ed\tatlas=editor\trevoked\n")
    assert secret.strip().encode() not in (data / "ledger.sqlite").read_bytes()


def test_a_token_without_a_model_is_for_all(data: Path) -> None:
    run("tokens", "create", "rita")
    assert run("tokens", "list") == (0, "rita\t*=reader\tvalid\n")


@pytest.mark.parametrize("arguments", [("--role", "king"), ("--model", "../etc")])
def test_a_token_for_no_role_or_model_is_refused_without_a_traceback(data: Path, arguments: tuple[str, ...]) -> None:
    code, said = run("tokens", "create", "x", *arguments)
    assert code == 1
    assert "Traceback" not in said
    assert run("tokens", "list") == (0, "")


def test_a_ledger_is_migrated_by_command(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = f"sqlite:///{data}/other.sqlite"
    monkeypatch.setenv("ERRATA_LEDGER_URL", url)
    code, said = run("tokens", "list")
    assert code == 1
    assert "upgrade head" in said
    assert run("migrate")[0] == 0
    ledger = Ledger(url)
    ledger.check_migrated()
    ledger.close()
    assert run("tokens", "list") == (0, "")


def test_settings_that_do_not_fit_are_named(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ERRATA_HOST", "0.0.0.0")
    code, said = run()
    assert code == 1
    assert "tls_certificate" in said


def test_mlflow_answers_this_machine_only_and_by_its_names_only() -> None:
    command = " ".join(mlflow_command("sqlite:////x/mlflow.sqlite", "/x/mlruns", 5001))
    assert "--host 127.0.0.1" in command
    assert "--workers 1" in command
    assert "--allowed-hosts 127.0.0.1:5001,localhost:5001" in command
    assert "--cors-allowed-origins http://127.0.0.1:5001,http://localhost:5001" in command
    assert "--disable-security-middleware" not in command


def test_a_server_without_mlflow_has_no_pages(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ERRATA_MLFLOW_URI", "none")
    code, said = run("ui")
    assert code == 1
    assert "nothing is published" in said


def test_what_a_database_of_mlflows_refers_to_is_kept_with_the_servers_own_data(tmp_path: Path) -> None:
    for uri in (None, "sqlite:////elsewhere/mlflow.sqlite", "postgresql://mlflow@db/mlflow"):
        place = mlflow_place(Settings(data_dir=tmp_path, mlflow_uri=uri))
        assert place is not None
        assert place.artifact_root == tmp_path / "mlruns"
    remote = mlflow_place(Settings(data_dir=tmp_path, mlflow_uri="https://mlflow.example.org"))
    assert remote is not None
    assert remote.artifact_root is None
