"""One cluster on this machine, with two cores to give, for all tests that need one: it takes seconds to start."""

import os
import secrets
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

# Read when Ray is first used, so set before. A token of its own: Ray would make one and keep it in the user's home.
os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}

# Products this small are not worth a second thread, and workers of one core have one.
torch.set_num_threads(1)
_TESTS = Path(__file__).parents[2]
_HELPERS = [Path(__file__).parent, _TESTS / "server" / "services", _TESTS / "server" / "studies", _TESTS / "editor"]
# The folders of tests are no packages; their helpers are imported by name, in workers too.
sys.path += [str(folder) for folder in _HELPERS if str(folder) not in sys.path]

with warnings.catch_warnings():
    # Ray Serve warns of its own code when it is imported: fields of pydantic that are declared the old way.
    warnings.filterwarnings("ignore", "Using extra keyword arguments on `Field`", DeprecationWarning)
    from ray import serve as _serve  # noqa: F401

from errata.server.cluster.connection import ClusterSettings, connected  # noqa: E402


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cluster that this process is connected to."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        # The paths of its sockets may not be long.
        folder = tmp_path_factory.mktemp("ray")
        with connected(ClusterSettings(cpus=2, object_store_bytes=100_000_000, folder=folder)):
            yield
