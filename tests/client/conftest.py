"""A fake server behind real gRPC, a client of it, and the edit that most tests ask for."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# The folders of tests are no packages; `fake_server` is imported by name.
sys.path.insert(0, str(Path(__file__).parent))

from fake_server import CAPITAL, Fake, serving

from errata.client import Context, EditRequest, Errata


@pytest.fixture
def fake() -> Fake:
    return Fake()


@pytest.fixture
def server(fake: Fake) -> Iterator[str]:
    with serving(fake) as address:
        yield address


@pytest.fixture
def client(server: str) -> Iterator[Errata]:
    with Errata(server, timeout=30) as client:
        yield client


@pytest.fixture
def astana() -> EditRequest:
    return EditRequest(name="Kazakhstan: capital", contexts=[Context(CAPITAL, "Kazakhstan")], target="Astana")
