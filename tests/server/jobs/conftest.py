"""One Atlas for all tests of jobs: loading it takes longer than most of them."""

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

# Products this small are not worth a second thread, and waiting for one costs ten times their own time.
torch.set_num_threads(1)
# The folders of tests are no packages; `house` is imported by name.
sys.path.insert(0, str(Path(__file__).parent))

from house import House, Worker, working, write_references  # noqa: E402

from errata.editor.checkpoints import atlas_folder  # noqa: E402
from errata.server.conversion import Decoder  # noqa: E402
from errata.server.images import ImagePolicy  # noqa: E402
from errata.server.ledger.ledger import Ledger  # noqa: E402
from errata.server.models import Models  # noqa: E402
from errata.server.settings import ModelSettings  # noqa: E402
from errata.server.store import ArtifactStore, DeltaStore  # noqa: E402


@pytest.fixture(scope="session")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    """Atlas with few references, and beside it the same weights without any."""
    data = tmp_path_factory.mktemp("data")
    configured = {
        "atlas": ModelSettings(source="atlas", references=write_references(tmp_path_factory.mktemp("references"))),
        "bare": ModelSettings(source=str(atlas_folder()), load="lazy"),
    }
    ledger = Ledger(f"sqlite:///{data}/ledger.db")
    ledger.migrate()
    deltas = DeltaStore(data / "deltas")
    models = Models(configured, ledger, deltas, data)
    models.start()
    yield House(ledger, models, deltas, ArtifactStore(data / "artifacts"), Decoder(ImagePolicy()))
    models.close(0)
    ledger.close()


@pytest.fixture
def work(house: House) -> Iterator[Callable[..., Worker]]:
    """Starts a runner on the house; it is stopped when the test ends."""
    with ExitStack() as stack:
        yield lambda *args, **kwargs: stack.enter_context(working(house, *args, **kwargs))


@pytest.fixture
def worker(work: Callable[..., Worker]) -> Worker:
    return work()
