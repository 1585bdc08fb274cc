"""Settings: environment over file over defaults, nothing unknown, nothing secret shown, nothing open by accident."""

import os
from pathlib import Path

import pytest
from pydantic import SecretStr, ValidationError

from errata.editor.evaluation import Metric
from errata.server.conversion import configured_guardrails
from errata.server.settings import METRICS, ModelSettings, Settings, SettingsError, is_loopback, load_settings


@pytest.fixture(autouse=True)
def _bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in list(os.environ):
        if variable.upper().startswith("ERRATA_"):
            monkeypatch.delenv(variable)


def written(folder: Path, toml: str) -> Path:
    path = folder / "errata.toml"
    path.write_text(toml, encoding="utf-8")
    return path


@pytest.fixture
def pem(tmp_path: Path) -> Path:
    path = tmp_path / "some.pem"
    path.write_text("PEM")
    return path


def test_without_anything_given_atlas_is_served_on_loopback() -> None:
    settings = load_settings()
    assert settings.models == {"atlas": ModelSettings(source="atlas")}
    assert is_loopback(settings.host)
    assert settings.image_schemes == ()


def test_the_environment_is_above_the_file_and_the_file_above_the_defaults(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = written(tmp_path, 'port = 1\nworker_threads = 5\n[models.tiny]\nsource = "x"\ndtype = "bfloat16"\n')
    monkeypatch.setenv("ERRATA_PORT", "2")
    monkeypatch.setenv("ERRATA_MODELS__TINY__DEVICE", "cuda:1")
    settings = load_settings(config)
    assert (settings.port, settings.worker_threads, settings.drain_seconds) == (2, 5, 30.0)
    assert settings.models == {"tiny": ModelSettings(source="x", dtype="bfloat16", device="cuda:1")}


def test_the_environment_can_change_one_thing_of_the_default_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ERRATA_MODELS__ATLAS__GUARDRAILS__EFFICACY", "0.9")
    assert load_settings().models["atlas"] == ModelSettings(source="atlas", guardrails={"efficacy": 0.9})


def test_an_argument_is_above_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ERRATA_PORT", "2")
    assert Settings(port=3).port == 3


def test_every_fault_is_listed_at_once_with_its_place(tmp_path: Path) -> None:
    config = written(tmp_path, 'port = 70000\nprot = 1\n[models.a]\ndtype = "int8"\n[models."a/../b"]\nsource = "x"\n')
    with pytest.raises(SettingsError) as caught:
        load_settings(config)
    lines = str(caught.value).splitlines()[1:]
    assert sorted(line.split(":")[0].strip() for line in lines) == [
        "models.a.dtype",
        "models.a.source",
        "models.a/../b",
        "port",
        "prot",
    ]


@pytest.mark.parametrize("name", ["", "..", "a/b", "A", ".a", "a..b", "a" * 65, "а", "a b", "a%2f"])
def test_a_model_cannot_have_a_name_that_could_be_a_path(name: str) -> None:
    with pytest.raises(ValidationError):
        Settings(models={name: ModelSettings(source="x")})


@pytest.mark.parametrize("name", ["a", "llava-1.5_7b", "0", "a" * 64])
def test_a_model_can_have_an_ordinary_name(name: str) -> None:
    assert list(Settings(models={name: ModelSettings(source="x")}).models) == [name]


def test_a_misspelt_variable_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ERRATA_AUHT", "true")
    with pytest.raises(SettingsError, match="ERRATA_AUHT: there is no such setting"):
        load_settings()


def test_the_clients_variables_do_not_disturb_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ERRATA_TOKEN", "secret")
    assert load_settings() == Settings()


def test_a_list_that_is_no_json_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ERRATA_IMAGE_SCHEMES", "https")
    with pytest.raises(SettingsError, match="JSON"):
        load_settings()


@pytest.mark.parametrize("content", ["port = ", "port = 1\nport = 2", "\udcff"])
def test_a_file_that_is_no_toml_is_refused(tmp_path: Path, content: str) -> None:
    config = tmp_path / "errata.toml"
    config.write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(SettingsError, match="is no TOML"):
        load_settings(config)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="cannot be read"):
        load_settings(tmp_path / "nowhere.toml")


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.org", "::ffff:10.0.0.1", ""])
def test_beyond_this_machine_tls_and_tokens_are_needed(host: str, pem: Path) -> None:
    for given in ({}, {"auth": True}, {"tls_certificate": pem, "tls_key": pem}):
        with pytest.raises(ValidationError):
            Settings(host=host, **given)


def test_what_is_missing_for_it_is_named(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"set tls_certificate and tls_key and auth = true.*insecure_ok"):
        load_settings(written(tmp_path, 'host = "0.0.0.0"\n'))


def test_with_both_or_told_so_it_listens_beyond(pem: Path) -> None:
    assert Settings(host="0.0.0.0", auth=True, tls_certificate=pem, tls_key=pem).host == "0.0.0.0"
    assert Settings(host="0.0.0.0", insecure_ok=True).host == "0.0.0.0"


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "::1", "[::1]", "localhost"])
def test_loopback_needs_neither(host: str) -> None:
    assert Settings(host=host).host == host


def test_half_of_tls_is_refused(pem: Path, tmp_path: Path) -> None:
    for given in ({"tls_key": pem}, {"tls_certificate": pem}, {"tls_client_ca": pem}):
        with pytest.raises(ValidationError):
            Settings(**given)  # type: ignore[arg-type]
    with pytest.raises(ValidationError, match="does not point to a file"):
        Settings(tls_certificate=pem, tls_key=tmp_path / "nowhere.pem")


def test_files_are_served_from_named_folders_only(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="image_folders"):
        Settings(image_schemes=("file",))
    assert Settings(image_schemes=("file",), image_folders=(tmp_path,)).image_folders == (tmp_path,)


def test_no_secret_is_described() -> None:
    described = Settings(
        ledger_url=SecretStr("postgresql+psycopg://errata:hunter/2?@db:5432/errata?password=hunter2"),
        mlflow_uri="https://user:hunter2@mlflow.example.org/",
        page_token_secret=SecretStr("hunter2" * 10),
    ).described()
    assert "hunter" not in described
    assert "mlflow_uri = https://***@mlflow.example.org/" in described
    assert "db:5432" in described


def test_no_secret_stands_in_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ERRATA_PAGE_TOKEN_SECRET", "hunter2")
    monkeypatch.setenv("ERRATA_LEDGER_URL", '["hunter2"]')
    monkeypatch.setenv("ERRATA_HOST", "0.0.0.0")
    with pytest.raises(SettingsError) as caught:
        load_settings()
    assert "page_token_secret" in str(caught.value)
    assert "hunter2" not in str(caught.value)


def test_every_setting_is_described() -> None:
    described = [line.split(" = ")[0] for line in Settings().described().splitlines()]
    assert described == list(Settings.model_fields)


def test_settings_and_editor_know_the_same_metrics() -> None:
    assert {m.name.lower() for m in Metric} == set(METRICS)
    assert set(configured_guardrails(dict.fromkeys(METRICS, 0.5))) == set(Metric)


@pytest.mark.parametrize("guardrails", [{"efficiency": 0.9}, {"efficacy": 1.1}, {"efficacy": float("nan")}])
def test_a_guardrail_of_no_metric_or_no_share_is_refused(guardrails: dict[str, float]) -> None:
    with pytest.raises(ValidationError):
        ModelSettings(source="x", guardrails=guardrails)
