"""A quantised base behind the service: edited, served, refused to another quantisation; settings that cannot be met."""

import sys
from pathlib import Path

import pytest
from hosting import BASE, generate_message, hosting
from typer.testing import CliRunner

from errata.server.__main__ import cli
from errata.server.errors import BaseChangedError
from errata.server.ledger.ledger import Ledger
from errata.server.models import Models
from errata.server.settings import ModelSettings, Settings, SettingsError
from errata.server.store import DeltaStore

FOUR = {"atlas": ModelSettings(source="atlas", quantization="bnb-4bit")}


def _started(settings: ModelSettings, folder: Path) -> Models:
    ledger = Ledger(f"sqlite:///{folder}/ledger.sqlite")
    ledger.migrate()
    models = Models({"atlas": settings}, ledger, DeltaStore(folder / "versions"), folder)
    try:
        models.start()
        return models
    finally:
        ledger.close()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"device": "cuda:97"}, "models.atlas.device: this machine has no device 'cuda:97'; use cpu"),
        ({"device": "gpu"}, "models.atlas.device: 'gpu' is no device; use cpu"),
    ],
)
def test_what_this_machine_lacks_ends_the_start_even_of_a_lazy_model(
    tmp_path: Path, settings: dict[str, str], said: str
) -> None:
    with pytest.raises(SettingsError, match=said):
        _started(ModelSettings(source="atlas", load="lazy", **settings), tmp_path)


def test_without_bitsandbytes_the_start_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(SettingsError, match=r"models\.atlas\.quantization: bnb-8bit needs .* the extra 'quantised'"):
        _started(ModelSettings(source="atlas", quantization="bnb-8bit"), tmp_path)


def test_the_command_says_it_in_a_line_and_without_a_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ERRATA_MODELS__ATLAS__DEVICE", "cuda:97")
    monkeypatch.setenv("ERRATA_MLFLOW_URI", "none")
    # An environment variable of its own, so that it is taken back: options are written to the environment.
    monkeypatch.setenv("ERRATA_DATA_DIR", str(tmp_path))
    monkeypatch.setenv("ERRATA_PORT", "0")
    ran = CliRunner().invoke(cli, [])
    assert ran.exit_code == 1
    last = ran.output.splitlines()[-1].strip()
    assert last.startswith("models.atlas.device: this machine has no device 'cuda:97'; use cpu")
    assert "Traceback" not in ran.output


@pytest.mark.slow
def test_a_base_in_4_bits_is_edited_and_served_and_its_versions_are_its_own(tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path, port=0, models=FOUR, mlflow_uri="none")
    with hosting(settings) as hosted:
        made = hosted.loaded().version()
        before = hosted.call.inference.Generate(generate_message("Estonia", version=BASE)).text
        edited = hosted.call.inference.Generate(generate_message("Estonia", version=made)).text
        assert edited != before
    with hosting(settings) as again:
        assert again.call.inference.Generate(generate_message("Estonia", version=made)).text == edited
    plain = ModelSettings(source="atlas", load="lazy")
    ledger = Ledger(f"sqlite:///{tmp_path}/ledger.sqlite")
    models = Models({"atlas": plain}, ledger, DeltaStore(tmp_path / "versions"), tmp_path)
    try:
        models.start()
        with pytest.raises(BaseChangedError):
            models.get("atlas")
    finally:
        models.close(0)
        ledger.close()
