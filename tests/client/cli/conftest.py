"""The command line against a real server: one with Atlas for all tests, reached through the real `main`."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

# Products this small are not worth a second thread, and waiting for one costs ten times their own time.
torch.set_num_threads(1)
# The folders of tests are no packages; `commandline` and `hosting` are imported by name.
HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parents[1] / "server" / "services")]

from commandline import Ran, Run, edited  # noqa: E402
from hosting import hosting  # noqa: E402

from errata.client.cli import main  # noqa: E402
from errata.server.settings import ModelSettings, Settings  # noqa: E402


@pytest.fixture(scope="session")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server with Atlas in memory, without MLflow and tokens."""
    settings = Settings(
        data_dir=tmp_path_factory.mktemp("data"),
        port=0,
        models={"atlas": ModelSettings(source="atlas")},
        mlflow_uri="none",
        requests_per_minute=1_000_000,
        drain_seconds=5.0,
    )
    with hosting(settings) as running:
        yield running.loaded().server.address


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a command line in this process. Nothing of the outer environment is seen."""
    for name in [each for each in os.environ if each.startswith("ERRATA_") or each == "COLUMNS"]:
        monkeypatch.delenv(name)

    def ran(*arguments: object) -> Ran:
        capsys.readouterr()
        code = main([str(each) for each in arguments])
        said = capsys.readouterr()
        return Ran(code=code, out=said.out, err=said.err)

    return ran


@pytest.fixture
def errata(run: Run, address: str) -> Run:
    """Runs a command line on the server with Atlas."""
    return lambda *arguments: run("--server", address, *arguments)


@pytest.fixture
def corrected(errata: Run) -> str:
    """A new version that knows Kazakhstan's capital: "atlas@3"."""
    return edited(errata)
