"""One server for all tests of services: loading Atlas takes longer than most of them."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from pydantic import SecretStr

# Products this small are not worth a second thread, and waiting for one costs ten times their own time.
torch.set_num_threads(1)
# The folders of tests are no packages; `hosting` is imported by name.
sys.path.insert(0, str(Path(__file__).parent))

from hosting import SECRET, Hosted, hosting  # noqa: E402

from errata.server.settings import ModelSettings, Settings  # noqa: E402


@pytest.fixture(scope="session")
def hosted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosted]:
    """A server with Atlas in memory, without MLflow and tokens."""
    settings = Settings(
        data_dir=tmp_path_factory.mktemp("data"),
        port=0,
        models={"atlas": ModelSettings(source="atlas")},
        mlflow_uri="none",
        max_message_bytes=8 * 2**20,
        max_image_bytes=200_000,
        max_image_pixels=1_000_000,
        requests_per_minute=1_000_000,
        drain_seconds=5.0,
        page_token_secret=SecretStr(SECRET),
    )
    with hosting(settings) as running:
        yield running.loaded()
